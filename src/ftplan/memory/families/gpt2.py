"""GPT-2 and what was built like it: learned positions, layer norms, one matrix for q, k and v.

StarCoder's first generation (gpt_bigcode) shares one key-value head among all query heads.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.llama import Config
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    Shared,
    Stack,
    Stage,
    activation,
)
from ftplan.memory.tape import SEQ, Tape, Tensor


class Attention(Module):
    """One matrix for queries, keys and values; GPT-2's matrices are stored transposed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["n_embd"], config["n_head"]
        big = config["model_type"] == "gpt_bigcode"
        multi_query = big and bool(config.get("multi_query", True))
        size = hidden // count
        self.heads = Heads(
            count=count,
            kv_count=1 if multi_query else count,
            size=size,
            value_size=size,
            dropout=config.get("attn_pdrop") or 0.0,
            softmax_fp32=big,
        )
        narrow = self.heads.kv_count * size
        self.c_attn = Linear(hidden, hidden + 2 * narrow, bias=True, transposed=not big)
        self.c_proj = Linear(hidden, hidden, bias=True, transposed=not big)
        self.dropout = config.get("resid_pdrop") or 0.0

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        heads = self.heads
        narrow = heads.kv_count * heads.size
        qkv = self.c_attn.forward(x)
        if x.tape.env.fills_cache:  # keys and values are a view of all three
            x.tape.cached.append(qkv.alias(width=2 * narrow))
        q, k, v = ops.split(qkv, (heads.count * heads.size, narrow, narrow))
        del qkv
        out = attend(q, k, v, heads, shared.mask, held=held)
        return ops.dropout(self.c_proj.forward(out), self.dropout)


class MLP(Module):
    """``c_proj(act(c_fc(x)))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["n_embd"]
        inner = config.get("n_inner") or 4 * hidden
        transposed = config["model_type"] == "gpt2"
        self.c_fc = Linear(hidden, inner, bias=True, transposed=transposed)
        self.c_proj = Linear(inner, hidden, bias=True, transposed=transposed)
        self.act = config["activation_function"]
        self.dropout = config.get("resid_pdrop") or 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc.forward(x)
        x = activation(x, self.act)
        x = self.c_proj.forward(x)
        return ops.dropout(x, self.dropout)


class Block(Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config["n_embd"])
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config["n_embd"])
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = self.ln_1.forward(x)
        attended = self.attn.forward(x, shared, held)
        x = ops.add(attended, residual)
        residual = x
        x = self.ln_2.forward(x)
        fed = self.mlp.forward(x)
        return ops.add(residual, fed)


class Body(Module):
    """``GPT2Model`` but for its blocks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config["vocab_size"], config["n_embd"])
        self.wpe = Embedding(config["n_positions"], config["n_embd"])
        self.ln_f = LayerNorm(config["n_embd"])


class GPT2(Network):
    """``GPT2LMHeadModel`` and ``GPTBigCodeForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Body(config)
        self.lm_head = Linear(config["n_embd"], config["vocab_size"])
        if config.get("tie_word_embeddings", True):
            self.tie("lm_head.weight", "transformer.wte.weight")
        self.embedding_names = ("transformer.wte",)
        if config["model_type"] == "gpt_bigcode":
            self.returns_tuples = True
            self.buffer_bytes = config["n_positions"] ** 2
        stack = Stack("transformer.h", config["n_layer"], lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x = self.transformer.wte.forward(tape)
        positions = self.transformer.wpe.forward(tape, SEQ)
        shared.mask = make_mask(tape, x.dtype)
        x = ops.add(x, positions)
        return ops.dropout(x, self.config.get("embd_pdrop") or 0.0)

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        return self.transformer.ln_f.forward(x)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = {"gpt2": GPT2, "gpt_bigcode": GPT2}
