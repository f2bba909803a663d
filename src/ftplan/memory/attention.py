"""Attention: the kernel that PyTorch would choose, and what each one keeps.

Shapes: queries are tokens x (heads x head size); keys and values tokens x (key-value heads x head
size). ``SCORES`` counts one number a head and a pair of tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.memory import ops
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.env import Environment
from ftplan.memory.tape import (
    BATCH,
    ONE,
    SCORES,
    SQUARE,
    TOKENS,
    Grads,
    Kind,
    Size,
    Tape,
    Tensor,
)

__all__ = [
    "Heads",
    "additive",
    "attend",
    "attend_broadcast",
    "kernel",
    "make_mask",
    "pairs",
    "with_prefix",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The shape of an attention layer."""

    count: int
    kv_count: int
    size: int
    value_size: int
    dropout: float = 0.0
    causal: bool = True
    softcap: bool = False
    """Scores go through a tanh (Gemma 2)."""
    softmax_fp32: bool = True
    """Eager attention asks for an fp32 softmax; GPT-2's leaves it to autocast."""

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        return self.count // self.kv_count


def kernel(env: Environment, heads: Heads, dtype: str, *, masked: bool) -> str:
    """``eager``, ``flash``, ``efficient`` or ``math``: what runs on this GPU.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (conditions of each backend) and
    transformers' ``sdpa_attention.use_gqa_in_sdpa`` (heads stay unexpanded without a mask).
    """
    if env.attention == "eager":
        return "eager"
    if env.attention == "flash":
        return "flash"
    half = dtype in ("bf16", "fp16")
    if half and env.modern and not masked and heads.size == heads.value_size and heads.size <= 256:
        return "flash"
    return "math" if heads.groups > 1 and not masked else "efficient"


def make_mask(
    tape: Tape,
    dtype: str,
    *,
    window: int | None = None,
    causal: bool = True,
    eager: bool = False,
    always: bool = False,
) -> Tensor | None:
    """The mask of transformers' ``masking_utils``, or None where a kernel's own flag will do.

    ``dtype``: of the embeddings. A sliding ``window`` needs a mask from that length on. Eager
    attention has an additive one, (b, 1, s, s); SDPA a boolean one, shared by the sequences
    unless they are padded. ``eager``: the model has no other implementation. ``always``: the
    model asks for a mask even where a flag would do (Falcon).
    """
    env = tape.env
    eager = eager or env.attention == "eager"
    cut = window is not None and env.seq_len is not None and env.seq_len >= window
    if env.attention == "flash" and not eager:
        return None
    if not (env.padding_mask or cut or always) and not (eager and causal):
        return None
    mask = tape.tensor(SCORES if env.padding_mask else SQUARE, 1, "bool", "mask")
    if eager:
        mask = tape.tensor(SCORES, 1, dtype, "mask")
    return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    mask: Tensor | None = None,
    *,
    eager: bool = False,
    by_head: bool = False,
    bias: Tensor | None = None,
    held: list[Tensor] | None = None,
    window: int | None = None,
    reach: int = 0,
) -> Tensor:
    """Attention of all heads: tokens x (heads x value size) comes out.

    ``by_head``: the queries lie in memory head by head (a ``cat`` made them so); flash lays out
    its output like its queries, and the output is copied to lie token by token.
    ``bias``: added to the scores of every sequence alike (T5's positions), heads x s x s; what
    SDPA takes for a mask has it in already. ``eager``: the model has no other implementation.
    ``held`` receives the attention weights that eager attention returns beside its output, for
    blocks that hold them until they return. ``window``: tokens that each one sees, which flash
    knows without a mask. ``reach``: keys that a query sees where rows are no tokens (patches).
    """
    env = q.tape.env
    seen = (window, reach)
    if heads.causal:
        k, v, mask = with_prefix(k, v, mask)
    if env.repeats_heads and not eager and env.attention != "eager":
        full = heads.count * heads.size
        k, v = (ops.expand_heads(t, full // t.width) for t in (k, v))
    if env.checkpoint_attention and q.tape.grad_enabled and bias is None:

        def core(q: Tensor) -> Tensor:
            return _attend(q, k, v, heads, mask, eager, by_head, bias, None, seen)

        return checkpoint(core, q, [k, v], trains=False)
    return _attend(q, k, v, heads, mask, eager, by_head, bias, held, seen)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    mask: Tensor | None,
    eager: bool,
    by_head: bool,
    bias: Tensor | None,
    held: list[Tensor] | None,
    seen: tuple[int | None, int],
) -> Tensor:
    env = q.tape.env
    if eager or env.attention == "eager":
        return _eager(q, k, v, heads, mask, bias, held)
    given = (k.dtype, v.dtype)
    q, k, v = (ops.autocast(t) for t in (q, k, v))
    masked = mask is not None or env.padding_mask
    choice = kernel(env, heads, q.dtype, masked=masked)
    if choice == "math":
        return ops.copy(_math(q, k, v, heads))
    if masked and choice != "flash":
        # one head is repeated by a view, unless autocast then casts what was repeated
        if heads.kv_count > 1 or k.dtype != given[0]:
            k = ops.expand_heads(k, heads.groups)
        if heads.kv_count > 1 or v.dtype != given[1]:
            v = ops.expand_heads(v, heads.groups)
        mask = ops.autocast(additive(mask, q.tape, q.dtype))
    out = _fused(q, k, v, heads, mask, choice, seen)
    return ops.copy(out) if by_head and choice == "flash" else out


def with_prefix(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values behind the learned ones of prefix tuning, and the mask that fits them."""
    prefix = k.tape.prefix
    if prefix is None:
        return k, v, mask
    return prefix.join(k), prefix.join(v), prefix.mask if mask is None else mask


def pairs(tape: Tape) -> Size:
    """Pairs of a query and a key, of one head of all sequences."""
    return SCORES if tape.prefix is None else SCORES + TOKENS * tape.prefix.tokens


def additive(mask: Tensor | None, tape: Tape, dtype: str) -> Tensor:
    """SDPA turns a boolean mask into an additive one of (b, 1, s, s), in every layer anew.

    Source: aten/src/ATen/native/transformers/attention.cpp, ``convert_boolean_attn_mask``.
    """
    if mask is not None and mask.dtype != "bool":
        return mask
    inverse = tape.tensor(pairs(tape), 1, "bool", "inverted mask")
    bias = tape.tensor(pairs(tape), 1, dtype, "additive mask")
    del inverse
    if tape.prefix is not None and tape.prefix.tokens % 16:  # rows are padded to 16 numbers
        width = -(-tape.prefix.tokens // 16) * 16
        bias = tape.tensor(SCORES + TOKENS * width, 1, dtype, "additive mask")
    return bias


def _count(
    tape: Tape, pairs: Size, hidden: Size, heads: Heads, name: str, *, backward: bool
) -> None:
    """Products of a fused kernel: scores and their product with the values; on the way back the
    gradients of all four operands, and the scores anew."""
    both = heads.count * (heads.size + heads.value_size)
    each, anew = (2 * both, heads.count * heads.size) if backward else (both, 0)
    every: tuple[tuple[Size, Kind], ...] = ((pairs, "attention"), (hidden, "hidden"))
    for rows, kind in every:
        for width, again in ((each, False), (anew, True)):
            if width and any(rows):
                tape.multiply(rows, width, 1, name, kind=kind, again=again)


def _hidden(tape: Tape, every: Size, heads: Heads, window: int | None, *, masked: bool) -> Size:
    """Twice the pairs that a kernel does not compute, because it knows the mask without seeing it.

    Causal: s (s - 1) / 2 of a sequence's s^2. In a window of w: all but s w - w (w - 1) / 2.
    """
    length = tape.env.seq_len
    if masked or not heads.causal or every != SCORES:
        return Size((0,) * 7)
    if window is None or length is None or length < window or tape.env.attention != "flash":
        return SCORES + TOKENS * -1
    return SCORES * 2 + TOKENS * (-2 * window) + BATCH * (window * (window - 1))


def _fused(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor | None, choice: str,
    seen: tuple[int | None, int],
) -> Tensor:  # fmt: skip
    """Flash and memory-efficient kernels: keep q, k, v, the output and a log-sum-exp a head.

    Backward: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, ``mha_bwd``, and
    attention_backward.cu, ``_efficient_attention_backward``.
    """
    tape = q.tape
    window, reach = seen
    every = q.rows * reach if reach else pairs(tape) if heads.causal else SCORES
    skipped = _hidden(tape, every, heads, window, masked=mask is not None)
    _count(tape, every, skipped, heads, choice, backward=False)
    out = tape.kept(q.rows, heads.count * heads.value_size, q.dtype, choice)
    log_sum_exp = tape.kept(q.rows, heads.count, "fp32", f"{choice} log-sum-exp")
    random_state = [tape.allocate(ONE * 16, choice), tape.allocate(ONE * 8, choice)]
    saved = (q, k, v, mask, out.alias(), log_sum_exp, random_state)
    inputs = [q, k, v]
    shapes = [(t.rows, t.width, t.dtype) for t in inputs]
    single = choice == "efficient" and heads.kv_count == 1
    full = heads.count * heads.size
    repeats = [1] + [heads.groups if single and t.width < full else 1 for t in (k, v)]
    makers = [
        ops.like(t.rows, t.width * times, t.dtype, True)
        for t, times in zip(inputs, repeats, strict=True)
    ]
    wants = [t.requires_grad for t in inputs]
    if mask is not None and mask.requires_grad:
        inputs.append(mask)
        makers.append(ops.like(SCORES * heads.count, 1, mask.dtype, True))
        wants.append(True)
    rows, dtype = q.rows, q.dtype
    shape = None if mask is None else (mask.rows, mask.width, mask.dtype)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        tape = grad.tape
        _count(tape, every, skipped, heads, choice, backward=True)
        grads: list[Tensor | None] = [make(grad) for make in makers]
        _workspace(tape, rows, dtype, heads, choice)
        for number in (1, 2):  # one gradient for the head that all share
            if repeats[number] > 1:
                grads[number] = ops.fit(grads[number], *shapes[number])
        if len(grads) > 3 and shape is not None:  # one gradient for all sequences
            grads[3] = ops.fit(grads[3], *shape)
        return tuple(g if wanted else None for g, wanted in zip(grads, wants, strict=True))

    ops.record([out], choice, inputs, apply)
    return out


def _workspace(tape: Tape, rows: Size, dtype: str, heads: Heads, choice: str) -> None:
    """What the kernel's backward needs for a moment: row sums and an fp32 query gradient."""
    count = heads.count
    held = [tape.tensor(rows, count, "fp32", f"{choice} row sums")]
    if choice == "flash" or dtype != "fp32":
        size = -(-heads.size // 32) * 32
        size = 256 if choice == "flash" and size > 192 else size
        held.append(tape.tensor(rows, count * size, "fp32", f"{choice} accumulator"))
    if choice == "flash" and heads.groups > 1:
        for name in ("key", "value"):
            held.append(tape.tensor(rows, count * heads.size, dtype, f"flash {name} gradient"))


def attend_broadcast(q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor) -> Tensor:
    """SDPA over one key-value head that nobody expanded: no fused kernel takes it."""
    q, k, v = (ops.autocast(t) for t in (q, k, v))
    bias = additive(mask, q.tape, q.dtype)
    out = ops.copy(_math(q, k, v, heads))
    del bias
    return out


def _dense(x: Tensor) -> Tensor:
    """A product of batches copies an operand that is a part of a wider matrix."""
    return _part_copied(ops.autocast(x))


def _part_copied(x: Tensor) -> Tensor:
    if x.storage is None:
        return x
    whole = x.tape.sizes[x.storage.index - 1]
    return x if whole == x.numel * ops.item_bytes(x.dtype) else ops.copy(x)


def _math(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """The quadratic fallback inside SDPA: scaled operands, scores, softmax, product, in fp32.

    Source: aten/src/ATen/native/transformers/attention.cpp, ``_scaled_dot_product_attention_math``.
    """
    rows = SCORES * heads.count
    tape, dtype = q.tape, q.dtype
    q, k, v = (ops.to(t, "fp32") for t in (q, k, v))
    k, v = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
    q, k, v = ops.scale(q), ops.scale(k), _part_copied(v)
    weights = _safe_softmax(ops.matmul(q, k, rows, 1, "scores", exact=True))
    weights = ops.dropout(weights, heads.dropout)
    width = heads.count * heads.value_size
    out = ops.to(ops.matmul(weights, v, q.rows, width, "attention", exact=True), dtype)
    if dtype != "fp32":  # the weights are cast too, for nobody
        unused = tape.tensor(rows, 1, dtype, "weights")
        del unused
    return out


def _safe_softmax(scores: Tensor) -> Tensor:
    """Softmax, with zeros for rows that are masked in full: made twice, and a mask beside it.

    Source: aten/src/ATen/native/transformers/attention.cpp, ``_safe_softmax``.
    """
    tape = scores.tape
    first = tape.tensor(scores.rows, scores.width, scores.dtype, "softmax")
    masked = tape.tensor(scores.rows, scores.width, "bool", "masked rows")
    weights = ops.softmax(scores)
    del first, masked
    return weights


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    mask: Tensor | None,
    bias: Tensor | None,
    held: list[Tensor] | None,
) -> Tensor:
    """transformers' ``eager_attention_forward``."""
    rows = pairs(q.tape) * heads.count
    dtype = q.dtype
    keys, values = ops.expand_heads(k, heads.groups), ops.expand_heads(v, heads.groups)
    weights = ops.scale(ops.matmul(_dense(q), _dense(keys), rows, 1, "scores"))
    if heads.softcap:
        weights = ops.scale(weights)
        weights = ops.unary(weights, "tanh", "output")
        weights = ops.scale(weights)
    if bias is not None:
        weights = ops.add(weights, bias)
    if mask is not None:
        weights = ops.add(weights, mask)
    elif heads.causal and bias is None:
        weights = ops.shift(weights)
    if heads.softmax_fp32:
        weights = ops.softmax(weights, "fp32")
    else:
        weights = ops.softmax(ops.autocast_fp32(weights))
    weights = ops.to(weights, dtype)
    weights = ops.dropout(weights, heads.dropout)
    if held is not None:
        held.append(weights)
    width = heads.count * heads.value_size
    return ops.copy(ops.matmul(weights, _dense(values), q.rows, width, "attention"))
