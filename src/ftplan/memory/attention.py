"""Attention: the kernel that PyTorch would choose, and what each one keeps.

Shapes: queries are tokens x (heads x head size); keys and values tokens x (key-value heads x head
size). ``SCORES`` counts one number a head and a pair of tokens of one sequence.
"""

from __future__ import annotations

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.env import Environment
from ftplan.memory.ring import ring_attention
from ftplan.memory.tape import (
    BATCH,
    NOTHING,
    ONE,
    SCORES,
    SEQ,
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
    "KeptStates",
    "additive",
    "attend",
    "attend_broadcast",
    "count_products",
    "kernel",
    "make_mask",
    "operand",
    "pairs",
    "sequence_rows",
    "spread",
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
    shared = heads.groups > 1 and not masked and heads.size == heads.value_size <= 256
    return "math" if shared else "efficient"


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
    unless they are padded. ``eager``: the model has no SDPA, and is eager instead. ``always``: the
    model asks for a mask even where a flag would do (Falcon).
    """
    env = tape.env
    eager = env.attention == "eager" or (eager and env.attention == "sdpa")
    cut = window is not None and env.seq_len is not None and env.seq_len >= window
    if env.attention == "flash":
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
    apart: bool = False,
) -> Tensor:
    """Attention of all heads: tokens x (heads x value size) comes out.

    ``by_head``: the queries lie in memory head by head (a ``cat`` made them so); flash lays out
    its output like its queries, and the output is copied to lie token by token.
    ``bias``: added to the scores of every sequence alike (T5's positions), heads x s x s; what
    SDPA takes for a mask has it in already. ``eager``: the model has no SDPA, and is eager instead.
    ``held`` receives the attention weights that eager attention returns beside its output, for
    blocks that hold them until they return. ``window``: tokens that each one sees, which flash
    knows without a mask. ``apart``: values lie in something wider, and are laid together for the
    kernel. ``reach``: keys that a query sees where rows are no tokens (patches).
    """
    env = q.tape.env
    seen = (window, reach)
    if heads.causal:
        k, v, mask = with_prefix(k, v, mask)
        if env.copies_to_cache:  # joined to what is not there yet
            k, v = ops.cat((k,)), ops.cat((v,))
    if env.repeats_heads and not eager and env.attention != "eager":
        full = heads.count * heads.size
        k, v = (ops.expand_heads(t, full // t.width) for t in (k, v))
    if env.checkpoint_attention and q.tape.grad_enabled and bias is None:

        def core(q: Tensor) -> Tensor:
            own = ops.copy(v) if apart else v
            return _attend(q, k, own, heads, mask, eager, by_head, bias, None, seen)

        return checkpoint(core, q, [k, v], trains=False)
    v = ops.copy(v) if apart else v
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
    if env.attention == "eager" or (eager and env.attention == "sdpa"):
        return _eager(q, k, v, heads, mask, bias, held, by_head=by_head)
    masked = mask is not None or (env.padding_mask and not seen[1])  # patches are never padded
    choice = kernel(env, heads, env.autocast or q.dtype, masked=masked)
    if choice == "efficient":  # transformers repeats the heads; one head by a view
        k, v = (ops.expand_heads(t, heads.groups, copied=heads.kv_count > 1) for t in (k, v))
    q, k, v = (ops.autocast(t) for t in (q, k, v))
    if choice == "math":
        return ops.copy(_math(q, k, v, heads, by_head=by_head))
    if choice == "flash" and masked:
        return _without_padding(q, k, v, heads, seen, by_head=by_head)
    if masked and choice == "efficient":
        rows = mask.rows if seen[1] and mask is not None else None  # of patches
        mask = _padded(ops.autocast(additive(mask, q.tape, q.dtype, rows)), q.tape, seen[1])
    if env.ring > 1 and choice == "flash" and heads.causal:
        out = _ring(q, k, v, heads)
    else:
        out = _fused(q, k, v, heads, mask, choice, seen)
    return ops.copy(out) if by_head and choice == "flash" else out


def _ring(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """Flash attention over keys and values that go round the ranks of a sequence."""
    tape, rows, dtype, ranks = q.tape, q.rows, q.dtype, q.tape.env.ring
    every = SCORES * ranks
    hidden = every + TOKENS * -1  # of the whole sequence, shared evenly

    def back(tape: Tape, parts: int) -> None:
        if parts == 1:
            count_products(tape, every, hidden, heads, "ring", backward=True)
        _workspace(tape, rows, dtype, heads, "flash", parts)

    count_products(tape, every, hidden, heads, "ring", backward=False)
    return ring_attention(
        q, k, v, heads=heads.count, width=heads.count * heads.value_size, ranks=ranks, back=back
    )


def _without_padding(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, seen: tuple[int | None, int], *, by_head: bool
) -> Tensor:
    """FlashAttention 2 of the tokens that no mask hides: gathered, attended to and put back.

    All tokens are taken for such. Source: transformers, ``modeling_flash_attention_utils.py``.
    """
    index = q.tape.tensor(q.rows, 1, "int64", "token index")
    if by_head:
        q, k = ops.copy(q), ops.copy(k)
    q, k, v = (ops.gather(t, index=index) for t in (q, k, v))
    out = _fused(q, k, v, heads, None, "flash", seen)
    back = q.tape.tensor(out.rows, out.width, out.dtype, "padded")
    make = ops.like(out.rows, out.width, out.dtype, out.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = index
        return (make(grad),)

    ops.record([back], "index_put", [out], apply)
    return back


class KeptStates:
    """A model's cache, which it fills though nobody asks for it (``DynamicCache.update``): keys
    and values are joined to nothing, and live until its outputs go."""

    tokens = 0
    mask = None

    def join(self, x: Tensor) -> Tensor:
        """Keys or values as the cache hands them back."""
        out = ops.cat((x,), "cached states")
        out.tape.cached.append(out.alias())
        return out


def with_prefix(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values behind the learned ones of prefix tuning, and the mask that fits them."""
    prefix = k.tape.prefix
    if prefix is None:
        return k, v, mask
    return prefix.join(k), prefix.join(v), prefix.mask if mask is None else mask


def pairs(tape: Tape) -> Size:
    """Pairs of a query and a key, of one head of all sequences."""
    return SCORES if tape.prefix is None else SCORES + TOKENS * tape.prefix.tokens


def additive(mask: Tensor | None, tape: Tape, dtype: str, rows: Size | None = None) -> Tensor:
    """SDPA turns a boolean mask into an additive one of (b, 1, s, s), in every layer anew.

    Source: aten/src/ATen/native/transformers/attention.cpp, ``convert_boolean_attn_mask``.
    """
    if mask is not None and mask.dtype != "bool":
        return mask
    rows = pairs(tape) if rows is None else rows
    inverse = tape.tensor(rows, 1, "bool", "inverted mask")
    bias = tape.tensor(rows, 1, dtype, "additive mask")
    del inverse
    return bias


def count_products(
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
        return NOTHING
    if window is None or length is None or length < window or tape.env.attention != "flash":
        return SCORES + TOKENS * -1
    return SCORES * 2 + TOKENS * (-2 * window) + BATCH * (window * (window - 1))


def _padded(mask: Tensor, tape: Tape, reach: int) -> Tensor:
    """Rows of a mask are padded to 16 numbers for the kernel (``pad_bias``).

    Where all images are one sequence (``reach``), those of one sample decide: several samples may
    make a multiple of 16 by themselves.
    """
    keys = reach or (tape.env.seq_len or 0) + (tape.prefix.tokens if tape.prefix else 0)
    if keys % 16 == 0:
        return mask
    lines = Size(count // reach for count in mask.rows) if reach else _lines(mask)
    return ops.pad(mask, mask.rows + lines * (-keys % 16))


def _lines(mask: Tensor) -> Size:
    """Queries of a mask: of every sequence, or of all alike."""
    return TOKENS if mask.rows[SCORES.index(1)] else SEQ


def sequence_rows(tape: Tape, multiple: int, rows: Size = TOKENS) -> Size:
    """Rows of tokens, where each sequence is rounded up to a multiple; others as they are."""
    return rows + BATCH * (-(tape.env.seq_len or 0) % multiple) if rows == TOKENS else rows


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
    every = mask.rows if reach and mask is not None else every
    skipped = _hidden(tape, every, heads, window, masked=mask is not None)
    count_products(tape, every, skipped, heads, choice, backward=False)
    out = tape.kept(q.rows, heads.count * heads.value_size, q.dtype, choice)
    rows = sequence_rows(tape, 32, q.rows) if choice == "efficient" else q.rows
    log_sum_exp = tape.kept(rows, heads.count, "fp32", f"{choice} log-sum-exp")
    random_state = [tape.allocate(ONE * 16, choice), tape.allocate(ONE * 8, choice)]
    if choice == "efficient" and heads.value_size > 128 and q.dtype != "fp32":
        accumulator = tape.tensor(q.rows, heads.count * heads.value_size, "fp32", "accumulator")
        del accumulator
    saved = (q, k, v, mask, out.alias(), log_sum_exp, random_state)
    inputs = [q, k, v]
    makers = [ops.like(t.rows, t.width, t.dtype, True) for t in inputs]
    wants = [t.requires_grad for t in inputs]
    if mask is not None and mask.requires_grad:
        inputs.append(mask)
        makers.append(ops.like(SCORES * heads.count, 1, mask.dtype, True))
        wants.append(True)
    queries, dtype = q.rows, q.dtype
    shape = None if mask is None else (mask.rows, mask.width, mask.dtype)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        tape = grad.tape
        count_products(tape, every, skipped, heads, choice, backward=True)
        grads: list[Tensor | None] = [make(grad) for make in makers]
        _workspace(tape, queries, dtype, heads, choice)
        if len(grads) > 3 and shape is not None:  # one gradient for all sequences
            grads[3] = ops.fit(grads[3], *shape)
        return tuple(g if wanted else None for g, wanted in zip(grads, wants, strict=True))

    ops.record([out], choice, inputs, apply)
    return out


def _workspace(
    tape: Tape, queries: Size, dtype: str, heads: Heads, choice: str, parts: int = 1
) -> None:
    """What the kernel's backward needs for a moment: row sums and an fp32 query gradient.

    ``parts``: it sees one of so many parts of the keys.
    """
    count, flash = heads.count, choice == "flash"
    rows = sequence_rows(tape, 128 if flash else 32, queries)
    held = [tape.tensor(rows, count, "fp32", f"{choice} row sums")]
    rows = rows if flash else sequence_rows(tape, 64, queries)
    if choice == "flash" or dtype != "fp32":
        size = -(-heads.size // 32) * 32
        size = 256 if choice == "flash" and size > 192 else size
        held.append(tape.tensor(rows, count * size, "fp32", f"{choice} accumulator"))
    if choice == "flash" and heads.groups > 1:
        for name in ("key", "value"):
            width = count * heads.size // parts
            held.append(tape.tensor(queries, width, dtype, f"flash {name} gradient"))


def attend_broadcast(q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor) -> Tensor:
    """SDPA over one key-value head that nobody expanded: no fused kernel takes it."""
    q, k, v = (ops.autocast(t) for t in (q, k, v))
    bias = additive(mask, q.tape, q.dtype)
    out = ops.copy(_math(q, k, v, heads, broadcast=True))
    del bias
    return out


def operand(x: Tensor, *, by_head: bool = False) -> Tensor:
    """An operand of a product of batches, which are the heads of all sequences.

    It is copied where heads lie token by token in memory, but for those of a single sequence
    (``at::matmul`` folds the batch dimensions by ``reshape``).
    """
    return x if by_head or x.tape.alone else ops.copy(x)


def _math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    *,
    by_head: bool = False,
    broadcast: bool = False,
) -> Tensor:
    """The quadratic fallback inside SDPA: scaled operands, scores, softmax, product, in fp32.

    ``broadcast``: the products spread one key-value head over all queries', else it is repeated
    before anything else. What is cast and scaled is held until the function returns. Source:
    aten/src/ATen/native/transformers/attention.cpp, ``_scaled_dot_product_attention_math``.
    """
    rows, width = SCORES * heads.count, heads.count * heads.value_size
    tape, dtype = q.tape, q.dtype
    accurate = [ops.to(t, "fp32") for t in (q, k, v)]
    scaled = ops.scale(accurate[0])
    keys, values = accurate[1:]
    if not broadcast:
        keys, values = (ops.expand_heads(t, heads.groups) for t in (keys, values))
    alone = by_head or heads.groups > 1
    left = operand(scaled, by_head=by_head)
    right = ops.scale(keys)
    right = spread(right, heads) if broadcast else operand(right, by_head=alone)
    scores = ops.matmul(left, right, rows, 1, "scores", exact=True)
    del left, right
    weights = _safe_softmax(scores)
    del scores
    weights = ops.dropout(weights, heads.dropout)
    values = spread(values, heads) if broadcast else operand(values, by_head=heads.groups > 1)
    out = ops.matmul(weights, values, q.rows, width, "attention", exact=True)
    if dtype != "fp32":  # the weights are cast too, for nobody
        unused = tape.tensor(rows, 1, dtype, "weights")
        out = ops.to(out, dtype)
        del unused
    return out


def spread(x: Tensor, heads: Heads) -> Tensor:
    """One head as an operand beside many: a copy, or a view where there is but one sequence."""
    return ops.expand_heads(x, heads.groups, copied=not x.tape.alone)


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
    *,
    by_head: bool,
) -> Tensor:
    """transformers' ``eager_attention_forward``."""
    rows = pairs(q.tape) * heads.count
    dtype = q.dtype
    alone = heads.groups > 1 and heads.kv_count > 1  # one head is repeated by a view
    keys, values = (ops.expand_heads(t, heads.groups, copied=alone) for t in (k, v))
    left = operand(ops.autocast(q), by_head=by_head)
    right = operand(ops.autocast(keys), by_head=alone or (by_head and heads.groups == 1))
    weights = ops.scale(ops.matmul(left, right, rows, 1, "scores"))
    del left, right
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
    values = operand(ops.autocast(values), by_head=alone)
    return ops.copy(ops.matmul(weights, values, q.rows, width, "attention"))
