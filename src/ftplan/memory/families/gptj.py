"""GPT-J, CodeGen and GPT-Neo: eager attention with fp32 scores, and nothing faster.

GPT-J and CodeGen rotate pairs of neighbours and run the MLP beside attention; GPT-Neo has learned
positions and a causal mask of its own in every layer.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.attention import make_mask, operand, pairs, with_prefix
from ftplan.memory.families.llama import Config, rotate_part
from ftplan.memory.families.neox import PlainMLP
from ftplan.memory.nn import Embedding, LayerNorm, Linear, Module, Network, Shared, Stack, Stage
from ftplan.memory.tape import SEQ, Tape, Tensor


class Attention(Module):
    """Queries and keys are cast to fp32 before the product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        name = config["model_type"]
        hidden = config["hidden_size"] if name == "gpt_neo" else config["n_embd"]
        self.name = name
        self.count = config["num_heads"] if name == "gpt_neo" else config["n_head"]
        self.size = hidden // self.count
        if name == "codegen":
            self.qkv_proj = Linear(hidden, 3 * hidden)
        else:
            self.k_proj = Linear(hidden, hidden)
            self.v_proj = Linear(hidden, hidden)
            self.q_proj = Linear(hidden, hidden)
        self.out_proj = Linear(hidden, hidden, bias=name == "gpt_neo")
        own = name == "gpt_neo"
        self.attention_dropout = config.get("attention_dropout" if own else "attn_pdrop") or 0.0
        self.dropout = config.get("resid_dropout" if own else "resid_pdrop") or 0.0
        self.rotary = None if own else config.get("rotary_dim") or self.size

    def _rotated(self, x: Tensor) -> Tensor:
        """Sines are spread anew for queries and keys; CodeGen's stay fp32."""
        assert self.rotary is not None
        tape = x.tape
        dtype = "fp32" if self.name == "codegen" else x.dtype
        sin = tape.tensor(SEQ, self.rotary, dtype, "rope")
        cos = tape.tensor(SEQ, self.rotary, dtype, "rope")
        return rotate_part(x, cos, sin, self.rotary / self.size)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.name == "codegen":
            pieces = ops.split(self.qkv_proj.forward(x), [x.width] * 3)
            q, v, k = (ops.copy(piece) for piece in pieces)
            return q, k, v
        return self.q_proj.forward(x), self.k_proj.forward(x), self.v_proj.forward(x)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        q, k, v = self._project(x)
        if self.rotary is not None:
            k, q = self._rotated(k), self._rotated(q)
        out = self._attend(q, k, v, shared, held)
        return ops.dropout(self.out_proj.forward(out), self.dropout)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Shared, held: list[Tensor]
    ) -> Tensor:
        k, v, mask = with_prefix(k, v, shared.mask)
        q, k = ops.to(q, "fp32"), ops.to(k, "fp32")
        left, right = operand(ops.autocast(q)), operand(ops.autocast(k))
        weights = ops.matmul(left, right, pairs(q.tape) * self.count, 1, "scores")
        del left, right
        if self.name == "gptj":
            weights = ops.scale(weights)
        if self.name == "gpt_neo":
            weights = ops.scale(weights, "where")
        if mask is None:
            raise UnsupportedError(
                f"flash attention of {self.name}", remedy="use attention: sdpa, or eager"
            )
        weights = ops.add(weights, mask)
        if self.name == "codegen":
            weights = ops.scale(weights)
        weights = ops.softmax(ops.autocast_fp32(weights))
        weights = ops.to(weights, v.dtype)
        weights = ops.dropout(weights, self.attention_dropout)
        held.append(weights)
        v = operand(ops.autocast(v))
        out = ops.matmul(weights, v, q.rows, v.width, "attention")
        return ops.copy(out)


class Block(Module):
    """GPT-Neo: one after the other; GPT-J and CodeGen: beside each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.serial = config["model_type"] == "gpt_neo"
        hidden = config["hidden_size"] if self.serial else config["n_embd"]
        inner = config.get("intermediate_size" if self.serial else "n_inner") or 4 * hidden
        self.ln_1 = LayerNorm(hidden)
        names = ("c_fc", "c_proj") if self.serial else ("fc_in", "fc_out")
        self.mlp = PlainMLP(names, hidden, inner, config["activation_function"])
        self.attn = Module() if self.serial else Attention(config)
        if self.serial:
            self.attn.replace("attention", Attention(config))
            self.ln_2 = LayerNorm(hidden)
        self.dropout = config.get("resid_dropout" if self.serial else "resid_pdrop") or 0.0

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        x = self.ln_1.forward(x)
        attention = self.attn.child("attention") if self.serial else self.attn
        attended = attention.forward(x, shared, held)
        if not self.serial:
            fed = ops.dropout(self.mlp.forward(x), self.dropout)
            return ops.add(ops.add(attended, fed), residual)
        x = ops.add(attended, residual)
        residual = x
        x = self.ln_2.forward(x)
        fed = ops.dropout(self.mlp.forward(x), self.dropout)
        return ops.add(residual, fed)


class GPTJ(Network):
    """``GPTJForCausalLM``, ``CodeGenForCausalLM`` and ``GPTNeoForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        neo = config["model_type"] == "gpt_neo"
        hidden = config["hidden_size"] if neo else config["n_embd"]
        positions = config["max_position_embeddings"] if neo else config["n_positions"]
        layers = config["num_layers"] if neo else config["n_layer"]
        self.dropout = config.get("embed_dropout" if neo else "embd_pdrop") or 0.0
        self.transformer = Module()
        self.transformer.replace("wte", Embedding(config["vocab_size"], hidden))
        if neo:
            self.transformer.replace("wpe", Embedding(positions, hidden))
        self.transformer.replace("ln_f", LayerNorm(hidden))
        self.learned = neo
        self.lm_head = Linear(hidden, config["vocab_size"], bias=not neo)
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", "transformer.wte.weight")
        self.embedding_names = ("transformer.wte",)
        rotary = config.get("rotary_dim") or hidden
        self.buffer_bytes = layers * (positions**2 if neo else 4 * positions * rotary)
        stack = Stack("transformer.h", layers, lambda _layer: Block(config))
        self.stages = [Stage(stack, self._enter, self._leave)]

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.transformer.child("wte").forward(tape)
        dtype = x.dtype
        if self.learned:
            x = ops.add(x, self.transformer.child("wpe").forward(tape, SEQ))
        shared.mask = make_mask(tape, dtype, eager=True)
        return ops.dropout(x, self.dropout)

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.transformer.child("ln_f").forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head.forward(x)


MODEL_TYPES = dict.fromkeys(("gptj", "codegen", "gpt_neo"), GPTJ)
