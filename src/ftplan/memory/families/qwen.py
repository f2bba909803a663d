"""Qwen of 2023, whose modeling code is published beside its weights.

Written as Qwen/Qwen-7B modeling_qwen.py runs (the revision of December 2023, the same for 1.8B, 7B,
14B and 72B), with flash-attn 2.3 where flash attention is asked for: positions are applied in fp32
to queries and keys one after the other, one matrix makes queries, keys and values, and the model
has a loss of its own, which shifts the logits and leaves them in their dtype. flash-attn's RMSNorm
is an extension that is compiled by itself; the written-out norm is taken.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.families.decoder import Block, Config, Decoder, filled
from ftplan.memory.families.llama import rotate
from ftplan.memory.nn import Linear, Module, Network, Shared, activation
from ftplan.memory.tape import SCORES, SEQ, SQUARE, Grads, Tape, Tensor

LOGARITHMS = 32767
"""Numbers that each layer keeps to scale queries beyond the trained length."""


class Attention(Module):
    """Multi-head attention; ``c_attn`` makes queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count, size = (
            config["hidden_size"], config["num_attention_heads"], config["kv_channels"],
        )  # fmt: skip
        self.heads = Heads(
            count=count, kv_count=count, size=size, value_size=size,
            dropout=config["attn_dropout_prob"],
        )  # fmt: skip
        self.c_attn = Linear(hidden, 3 * count * size)
        self.c_attn.bias = self.c_attn.parameter("bias", 3 * count * size)
        self.c_proj = Linear(hidden, count * size, bias=not config["no_bias"])

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        env = x.tape.env
        both = self.c_attn.forward(x)
        q, k, v = ops.split(both, [both.width // 3] * 3)
        cos, sin = shared.rope[""]
        turn = _rotate_by_kernel if env.attention == "flash" else _rotate
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if x.tape.env.returns_cache:
            x.tape.cached += [k.alias(), v.alias()]
        if env.attention == "flash":
            out = self._flash(q, k, v)
        else:
            out = attend(q, k, v, self.heads, _mask(x.tape, q.dtype), held=held)
        return self.c_proj.forward(out)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A batch of several sequences is unpadded whether anything is padded or not."""
        if not q.tape.env.padding_mask or q.tape.alone:
            return attend(q, k, v, self.heads)
        k = ops.gather(k)
        q, v = ops.gather(q), ops.gather(v)
        return _scattered(attend(q, k, v, self.heads))


def _scattered(x: Tensor) -> Tensor:
    """Rows written into a tensor of zeros; their gradients are picked from it again."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "padded again")
    make = ops.like(x.rows, x.width, x.dtype, True)
    ops.record([out], "index_put", [x], lambda grad: (make(grad),))
    return out


def _mask(tape: Tape, dtype: str) -> Tensor:
    """SDPA's mask, made anew in every layer: causal, and what is padded."""
    causal = tape.tensor(SQUARE, 1, "bool", "causal mask")
    if not tape.env.padding_mask:
        return causal
    inverse = tape.tensor(SQUARE, 1, "bool", "inverted mask")
    mask = tape.tensor(SCORES, 1, dtype, "mask")
    del inverse, causal
    return mask


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In elementwise steps, in fp32, joined with the part of a head that is not turned."""
    turned = rotate(ops.to(x, "fp32"), cos, sin)
    return ops.to(ops.cat((turned,)), x.dtype)


def _rotate_by_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """flash_attn/layers/rotary.py, ``ApplyRotaryEmb``, 2.3: a new tensor each way, and a copy of
    the gradient before it; the kernel reads the halves of both tables laid out anew."""

    def kernel(rows_of: Tensor) -> Tensor:
        halves = [rows_of.tape.tensor(SEQ, cos.width // 2, "fp32", "half a table") for _ in "cs"]
        out = rows_of.tape.tensor(rows_of.rows, rows_of.width, "fp32", "rotated")
        del halves
        return out

    whole = ops.to(x, "fp32")
    out = kernel(whole)

    def apply(grad: Tensor) -> Grads:
        _kept = cos, sin
        again = ops.copy(grad.alias())
        return (kernel(again),)

    ops.record([out], "rotary kernel", [whole], apply)
    del whole
    return ops.to(out, x.dtype)


class MLP(Module):
    """``c_proj(w1(x) * silu(w2(x)))``: half of ``intermediate_size`` for each matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
        bias = not config["no_bias"]
        self.w1 = Linear(hidden, inner, bias=bias)
        self.w2 = Linear(hidden, inner, bias=bias)
        self.c_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        wide, gate = self.w1.forward(x), self.w2.forward(x)
        joined = ops.mul(wide, activation(gate, "silu"))
        return self.c_proj.forward(joined)


class Qwen(Decoder):
    """``QWenLMHeadModel``."""

    def __init__(self, config: Config) -> None:
        def block(config: Config, _layer: int) -> Module:
            return Block(
                config, Attention(config), MLP(config), mixer_name="attn", norms=("ln_1", "ln_2")
            )

        super().__init__(
            config, block, path="transformer", embed_name="wte", layers_name="h", norm_name="ln_f"
        )
        self.loss_in_fp32 = False
        self.loss_shifts = "logits"
        self.returns_tuples = True
        self.buffer_bytes = config["num_hidden_layers"] * 2 * (LOGARITHMS + 1)
        self.rope: list[Tensor] = []

    def tables(self, tape: Tape) -> list[Tensor]:
        """Sines and cosines stay from batch to batch, for twice the longest that came."""
        self.rope = [
            tape.tensor(SEQ * 2, self.config["kv_channels"], "fp32", "rope") for _ in ("cos", "sin")
        ]
        return self.rope

    def prepare(self, tape: Tape, shared: Shared, dtype: str) -> None:
        """Views of the tables; the masks are each layer's own."""
        cos, sin = self.rope or self.tables(tape)
        shared.rope[""] = (cos.alias(rows=SEQ), sin.alias(rows=SEQ))
        self.rope = []


def qwen(raw: Config) -> Network:
    """``QWenLMHeadModel`` from its config.json; 8-bit caches and partial rotation are no part."""
    return Qwen(
        {
            "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "intermediate_size": 22016, "kv_channels": 128,
            "attn_dropout_prob": 0.0, "tie_word_embeddings": False, "no_bias": True, **filled(raw),
        }
    )  # fmt: skip


MODEL_TYPES = {"qwen": qwen}
