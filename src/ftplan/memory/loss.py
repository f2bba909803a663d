"""The loss: how the logits are met, all at once, some tokens at a time, or never whole."""

from __future__ import annotations

from ftplan.memory import fused, ops
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.nn import Linear, Network
from ftplan.memory.tape import BATCH, CHUNK, ONE, TOKENS, Grads, Parameter, Size, Tensor

__all__ = [
    "chunk_tokens",
    "classify_loss",
    "compute_loss",
    "head_weight",
    "model_outputs",
    "outside_loss",
    "tiled_divergence",
]

UNSLOTH_BUDGET = 2 * 1024**3
"""Bytes that a chunk's fp32 logits may take in Unsloth's fused loss, or half of what is free."""
UNSLOTH_ROWS = 4096
"""Its largest chunk in tokens; the smallest is 512, or more where the vocabulary is small."""
UNSLOTH_LOGITS = 512 * 151_936
"""Logits that its chunks have at least, in powers of two of tokens."""


def chunk_tokens(by: str, tokens: int, vocabulary: int, hidden: int, free: int) -> int:
    """Tokens whose logits exist at once in a fused loss.

    Liger takes the next power of two at which a chunk's logits are no larger than all hidden
    states (liger_kernel/ops/fused_linear_cross_entropy.py 0.8.5); Unsloth the power of two below
    that, within bounds, and as many as fit its budget, of which ``free`` bytes on the card (0: not
    known) are one (unsloth_zoo/fused_losses/fused_linear.py 2026.10.9, ``fused_linear_rows``; of
    more than 4096 tokens and a frozen head it makes tiles of 256 MiB instead, which is as much).
    """
    if by in ("cut", "automodel"):
        return 0
    if by == "unsloth":
        budget = min(UNSLOTH_BUDGET, free // 2) if free > 0 else UNSLOTH_BUDGET
        least = min(max(_power_below(UNSLOTH_LOGITS // vocabulary), 512), UNSLOTH_ROWS)
        rows = max(_power_below(tokens * hidden // vocabulary), least)
        return min(rows, UNSLOTH_ROWS, max(budget // (4 * vocabulary), 2), tokens)
    parts = -(-vocabulary // hidden)
    return min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)


_CUT = ("cut", "automodel")
"""Cut cross entropy, which makes gradients on the way back."""


def _power_below(count: int) -> int:
    """The largest power of two that is no larger; 0 for none."""
    return 1 << count.bit_length() - 1 if count else 0


def compute_loss(network: Network, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Loss, and the logits where the model returns them, from the last hidden states."""
    env = x.tape.env
    kind = env.loss
    if kind == "chunked" and env.loss_columns:
        return scalar(tiled_log_probs(network, x)), None
    if kind == "chunked" and env.loss_keeps_chunks:
        return _kept_chunks(network, x)
    if kind == "chunked":
        return _chunked(network, x), None
    if kind == "fused":
        return _fused(network, x), None
    logits = network.head(x)
    if env.logits_cast == "model" and env.loss_upcasts and network.loss_in_fp32:
        logits = ops.to(logits, "fp32")
    return _full(network, logits), logits


def outside_loss(network: Network, outputs: Tensor) -> Tensor:
    """A loop's own loss of what the model has returned: logits, or states that meet the head."""
    kind = outputs.tape.env.loss
    if kind == "full":
        return _full(network, outputs)
    return _remade_chunks(network, outputs) if kind == "chunked" else _fused(network, outputs)


def model_outputs(
    network: Network, x: Tensor, completion: int = 0, *, states: bool = False
) -> Tensor:
    """What the model returns where the loss is the trainer's: logits, all or a completion's.

    ``completion`` tokens at the end of each sequence reach the head, and the one before them,
    whose next token is the first of the completion (``logits_to_keep``). ``states``: the loss
    takes the hidden states and meets the head itself.
    """
    if states:
        return x
    if completion:
        x = ops.rows_slice(x, BATCH * (completion + 1))
    if x.tape.env.loss == "chunked" and network.head_name != "score":
        return tiled_log_probs(network, x)
    logits = network.head(x)
    return pooled(logits) if logits.width <= 1 and network.head_name == "score" else logits


def classify_loss(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """``GenericForSequenceClassification``: a score for every token, of which the last counts."""
    logits = pooled(network.head(x))
    labels = logits.tape.tensor(BATCH, 1, "int64", "labels")
    return ops.cross_entropy(logits, labels), logits


def pooled(logits: Tensor) -> Tensor:
    """The scores of each sequence's last token, picked by index; backward fills a whole tensor."""
    if logits.rows == BATCH:
        return logits
    return ops.gather(logits, BATCH)


def _full(network: Network, logits: Tensor) -> Tensor:
    """``ForCausalLMLoss``: all logits in fp32, labels shifted by one."""
    env = logits.tape.env
    if network.loss_in_fp32 and env.loss_upcasts:
        logits = ops.to(logits, "fp32")
    labels = logits.tape.tensor(TOKENS, 1, "int64", "shifted labels")
    by = fused.cross_entropy if env.kernels.loss else ops.cross_entropy
    shifts = network.loss_shifts or env.loss_shifts
    if shifts == "picked" and env.padding_mask:  # by the padding mask (Qwen2-Audio)
        return by(ops.gather(logits), labels)
    if shifts != "labels" and not logits.tape.alone:
        # transformers until 4.48: logits[..., :-1, :].contiguous(), beside the logits themselves;
        # of a single sequence that is a view
        return by(ops.copy(logits, "shifted logits"), labels)
    return by(logits, labels)


def _chunked(network: Network, x: Tensor) -> Tensor:
    """TRL's ``chunked_nll``: each chunk is checkpointed, so its logits live for a moment.

    Two chunks are played: all later ones are like the second (trl/trainer/sft_trainer.py,
    ``_chunked_cross_entropy_loss``, 1.10).
    """
    hidden = ops.gather(ops.copy(x, "shifted hidden states"))
    loss: Tensor | None = None
    trains = any(parameter.trainable for parameter in network.head_parameters())
    x.tape.chunks_played = 2
    for rows in (CHUNK, TOKENS + (BATCH + CHUNK) * -1):
        piece = ops.rows_slice(hidden, CHUNK)

        def chunk(h: Tensor, rows: Size = rows) -> Tensor:
            with h.tape.counting({CHUNK: rows}):
                return _chunk_loss(network, h)

        part = checkpoint(chunk, piece, trains=trains)
        loss = part if loss is None else ops.add(loss, part)
    assert loss is not None
    return loss


def _remade_chunks(network: Network, x: Tensor) -> Tensor:
    """AutoModel's: a chunk's logits at a time, made again backward; the head's gradient in fp32.

    nemo_automodel/components/loss/chunked_ce.py 0.7.0, ``_ChunkedLinearCE``. Compiled, as it comes:
    neither fp32 logits nor probabilities exist, and their gradient is written over the logits.
    """
    tape = x.tape
    parameter, trained = head_weight(network)
    weight = tape.leaf(parameter)
    vocabulary, width = parameter.shape
    rows, dtype, wants = x.rows, x.dtype, x.requires_grad

    def piece(like: Tensor) -> Tensor:
        return like.tape.tensor(CHUNK, vocabulary, weight_dtype, "chunk of logits")

    tape.chunks_played = 0
    weight_dtype = weight.dtype
    losses = tape.tensor(rows, 1, "fp32", "loss per token")
    tape.multiply(rows, width, vocabulary)
    made = piece(x)
    del made
    kept = [x.alias()]

    def apply(grad: Tensor) -> Grads:
        tape, _kept = grad.tape, kept
        tape.multiply(rows, width, vocabulary, again=True)
        tape.multiply(rows, width, vocabulary, times=wants + trained)
        states = tape.tensor(rows, width, dtype, "gradient") if wants else None
        if not trained:
            logits = piece(grad)
            part = tape.tensor(CHUNK, width, dtype, "gradient of a chunk")
            del logits, part
            return states, None
        total = tape.tensor(ONE * vocabulary, width, "fp32", "weight gradient")
        logits = piece(grad)
        part = tape.tensor(CHUNK, width, dtype, "gradient of a chunk")
        own = tape.tensor(ONE * vocabulary, width, weight_dtype, "weight gradient of a chunk")
        del logits, part, own
        return states, ops.to(total, weight_dtype)

    ops.record([losses], "loss in chunks", [x, weight], apply)
    return scalar(losses)


def scalar(values: Tensor) -> Tensor:
    """The sum of a few numbers a token."""
    loss = values.tape.tensor(ONE, 1, "fp32", "loss")
    make = ops.like(values.rows, values.width, values.dtype, values.requires_grad)
    ops.record([loss], "loss", [values], lambda grad: (make(grad),))
    return loss


def head_weight(network: Network) -> tuple[Parameter, bool]:
    """The head's matrix (the copy that is trained, where there is one), and whether it is."""
    matrices = [p for p in network.head_parameters() if len(p.shape) > 1]
    trained = [p for p in matrices if p.trainable and not p.added]
    return (trained or matrices)[0], bool(trained)


def _named_tiles(vocabulary: int, columns: int) -> list[int]:
    """Widths of two tiles in a row, the first of which a loop's variable still names."""
    return [width for width in (columns, min(columns, vocabulary - columns)) if width]


def _last_tile(vocabulary: int, columns: int) -> int:
    """Width of the last tile of the vocabulary."""
    return vocabulary % columns or columns


def tiled_log_probs(network: Network, x: Tensor) -> Tensor:
    """TRL's fused head: a tile of logits is folded into running statistics, then overwritten.

    The shifted hidden states are kept, and fp32 numbers a token. The way back makes each tile
    again and sums the gradients of states and head in fp32 (trl/kernels/chunked_logprob.py,
    ``ChunkedLogProbFunction``, and trl/trainer/utils.py, ``add_fused_lm_head``, 1.16).
    """
    tape = x.tape
    parameter, trained = head_weight(network)
    weight = tape.leaf(parameter)
    vocabulary, width = parameter.shape
    columns = min(tape.env.loss_columns or vocabulary, vocabulary)
    dtype = tape.env.autocast or x.dtype
    rows = TOKENS + BATCH * -1 if x.rows == TOKENS else x.rows + BATCH * -1
    hidden = ops.gather(ops.rows_slice(x, rows))

    def tile(held: list[Tensor], *, backward: bool) -> None:
        """One tile's buffer, and the operands that have another dtype."""
        held.append(tape.tensor(CHUNK, columns, dtype, "tile of logits"))
        if hidden_dtype != dtype:
            held.append(tape.tensor(CHUNK, width, dtype, "cast"))
        if parameter_dtype != dtype:
            # the way back has a name for one tile's cast while it makes the next
            sizes = _named_tiles(vocabulary, columns) if backward else [columns]
            casts = [tape.tensor(ONE * size, width, dtype, "cast") for size in sizes]
            casts.clear()
            held.append(tape.tensor(ONE * _last_tile(vocabulary, columns), width, dtype, "cast"))

    hidden_dtype, parameter_dtype = hidden.dtype, weight.dtype
    statistics = [tape.tensor(rows, 1, "fp32", "statistics") for _ in range(7)]
    buffers: list[Tensor] = []
    tape.multiply(rows, width, vocabulary)
    tile(buffers, backward=False)
    buffers.clear()
    out = tape.tensor(rows, 1, "fp32", "log-probabilities")
    saved = (hidden, statistics[:2])
    del statistics
    wants = (hidden.requires_grad, trained)

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        tape.multiply(rows, width, vocabulary, again=True)
        tape.multiply(rows, width, vocabulary, times=wants[0] + wants[1])
        held: list[Tensor] = []
        sums = [
            tape.tensor(rows, width, "fp32", "gradient") if wants[0] else None,
            tape.tensor(ONE * vocabulary, width, "fp32", "weight gradient") if wants[1] else None,
        ]
        tile(held, backward=True)
        return tuple(
            None if total is None else ops.fit(total, total.rows, total.width, wanted)
            for total, wanted in zip(sums, (hidden_dtype, parameter_dtype), strict=True)
        )

    ops.record([out], "tiled log-probabilities", [hidden, weight], apply)
    return out


def tiled_divergence(
    network: Network, other: Network, mine: Tensor, theirs: Tensor, completion: int = 0
) -> Tensor:
    """TRL's divergence from a teacher: a tile of both models' logits at a time, in fp32.

    ``completion`` tokens of each sequence are compared; 0: all.

    Both models' hidden states are kept; the way back makes each tile again
    (trl/kernels/chunked_divergence.py, ``ChunkedDivergenceFunction``, 1.16).
    """
    tape = mine.tape
    parameter, trained = head_weight(network)
    teacher, _ = head_weight(other)
    vocabulary, width = parameter.shape
    columns = min(tape.env.loss_columns or vocabulary, vocabulary)
    rows = BATCH * completion if completion else TOKENS + BATCH * -1
    states = [ops.gather(ops.rows_slice(x, rows)) for x in (mine, theirs)]
    computed = [tape.env.autocast or x.dtype for x in states]
    heads = [(parameter.dtype, width), (teacher.dtype, teacher.shape[1])]

    def tiles(held: list[Tensor], backward: bool) -> None:
        """A tile of each in fp32, its product in the dtype of matmuls, and cast operands."""
        held += [tape.tensor(CHUNK, columns, "fp32", "tile of logits") for _ in range(2)]
        for dtype, (stored, across) in zip(computed, heads, strict=True):
            if stored != dtype:
                held.append(tape.tensor(ONE * columns, across, dtype, "cast"))
        if backward and computed[0] != "fp32":
            sizes = _named_tiles(vocabulary, columns)
            made = [tape.tensor(CHUNK, size, computed[0], "tile of gradients") for size in sizes]
            made.clear()
            last = _last_tile(vocabulary, columns)
            held.append(tape.tensor(CHUNK, last, computed[0], "tile of gradients"))

    hidden_dtype, parameter_dtype = states[0].dtype, parameter.dtype
    statistics = [tape.tensor(rows, 1, "fp32", "statistics") for _ in range(6)]
    buffers: list[Tensor] = []
    for _, across in heads:
        tape.multiply(rows, across, vocabulary)
    tiles(buffers, False)
    buffers.clear()
    out = tape.tensor(rows, 1, "fp32", "divergence")
    saved = (tuple(states), statistics)
    wants = (states[0].requires_grad, trained)

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        for _, across in heads:
            tape.multiply(rows, across, vocabulary, again=True)
        tape.multiply(rows, width, vocabulary, times=wants[0] + wants[1])
        held: list[Tensor] = []
        sums = [
            tape.tensor(rows, width, "fp32", "gradient") if wants[0] else None,
            tape.tensor(ONE * vocabulary, width, "fp32", "weight gradient") if wants[1] else None,
        ]
        tiles(held, True)
        return tuple(
            None if total is None else ops.fit(total, total.rows, total.width, wanted)
            for total, wanted in zip(sums, (hidden_dtype, parameter_dtype), strict=True)
        )

    ops.record([out], "tiled divergence", [states[0], tape.leaf(parameter)], apply)
    return scalar(out)


def _kept_chunks(network: Network, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A loss in chunks that are not recomputed: only the single large allocation is avoided.

    The last chunk is played; the others leave what they keep, and let go of it on the way back
    (torchtune/modules/loss/cross_entropy_loss.py, ``LinearCrossEntropyLoss``, 0.7; litgpt/utils.py,
    ``chunked_cross_entropy``, 0.5).
    """
    tape, env = x.tape, x.tape.env
    tape.chunks_played = 0
    rest = TOKENS + CHUNK * -1
    upcasts = network.loss_in_fp32 and env.loss_upcasts
    weights = [tape.leaf(p) for p in network.head_parameters() if p.trainable]
    vocabulary = head_weight(network)[0].shape[0]
    computed = env.autocast or x.dtype
    dtype = "fp32" if upcasts or env.autocast else computed
    pieces = ops.rows_slice(x, rest), ops.rows_slice(x, CHUNK)
    width, wants = x.width, x.requires_grad + bool(weights)
    tape.multiply(rest, width, vocabulary)
    logits = tape.tensor(rest, vocabulary, computed, "logits") if env.keep_outputs else None
    kept = [tape.tensor(rest, vocabulary, dtype, "log-probabilities")]
    others = tape.tensor(ONE, 1, "fp32", "loss")
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (pieces[0], *weights)]

    def apply(grad: Tensor) -> Grads:
        tape.multiply(rest, width, vocabulary, times=wants)
        kept.clear()
        return tuple(make(grad) for make in makers)

    ops.record([others], "earlier chunks", [pieces[0], *weights], apply)
    last = network.head(pieces[1])
    if upcasts:
        last = ops.to(last, "fp32")
    loss = ops.add(others, ops.cross_entropy(last, tape.tensor(CHUNK, 1, "int64", "labels")))
    return loss, logits


def _chunk_loss(network: Network, hidden: Tensor) -> Tensor:
    """Loss, accuracy and entropy of one chunk, head and logits in fp32."""
    tape = hidden.tape
    head = network.child(network.head_name)
    hidden = ops.to(hidden, "fp32")
    if type(head) is Linear:
        weight = ops.to(tape.leaf(head.weight), "fp32")
        logits = ops.linear(hidden, weight)
    else:
        logits = network.head(hidden)
    labels = tape.tensor(CHUNK, 1, "int64", "chunk labels")
    log_probs = ops.softmax(ops.autocast_fp32(logits), name="log_softmax")
    del logits
    entropy = ops.mul(ops.unary(log_probs, "exp", "output"), log_probs)
    return ops.nll_loss(log_probs, labels, entropy)


def _fused(network: Network, x: Tensor) -> Tensor:
    """A fused linear cross entropy: gradients are made in forward, chunk by chunk.

    Liger and Unsloth; cut cross entropy makes a log-sum-exp a token forward and the gradients
    backward (cut_cross_entropy 25.1, ``LinearCrossEntropyFunction``).
    """
    tape, by = x.tape, x.tape.env.loss_by
    weights = [tape.leaf(p) for p in network.head_parameters() if p.trainable]
    shapes = [(t.rows, t.width, t.dtype) for t in (x, *weights)]
    wants = x.requires_grad or bool(weights)
    if by == "foak":  # shifts the states, in a copy
        x = ops.gather(x)
    saved: list[Tensor] = []

    def gradients() -> list[Tensor]:
        return [tape.tensor(*shape, "gradient of the fused loss") for shape in shapes]

    rows, (vocabulary, width) = x.rows, head_weight(network)[0].shape
    tape.multiply(rows, width, vocabulary)
    if by not in _CUT and wants:
        tape.multiply(rows, width, vocabulary, times=len(shapes))
        saved += gradients()
    losses = tape.tensor(x.rows, 1, "fp32", "loss per token")
    if by in _CUT:
        saved += [x.alias(), tape.tensor(x.rows, 1, "fp32", "log-sum-exp")]
    else:
        _chunk_of_logits(network, x, backward=wants)
    loss = tape.tensor(ONE, 1, "fp32", "loss")
    del losses

    def apply(_grad: Tensor) -> Grads:
        if by in _CUT:
            tape.multiply(rows, width, vocabulary, again=True)
            tape.multiply(rows, width, vocabulary, times=len(shapes))
        if by == "automodel":  # accum_e_fp32
            summed = tape.tensor(*shapes[0][:2], "fp32", "gradient of the fused loss")
            made = [tape.tensor(*shape, "gradient of the fused loss") for shape in shapes[1:]]
            saved.clear()
            return (ops.to(summed, shapes[0][2]), *made)
        made = list(saved) if by in ("liger", "foak") else gradients()  # Unsloth scales a copy
        saved.clear()
        return tuple(made)

    if wants:
        ops.record([loss], "fused loss", [x, *weights], apply)
    return loss


def _chunk_of_logits(network: Network, x: Tensor, *, backward: bool) -> None:
    """What a chunk of a fused loss takes for a moment: its logits, and copies of them.

    Liger writes the gradient over the logits; its earlier version copied them up and down
    (fms_acceleration_foak, liger_ce); Unsloth multiplies into one fp32 buffer, writes the gradient
    over it and makes that of the states in fp32.
    """
    tape, by = x.tape, x.tape.env.loss_by
    parameter, _ = head_weight(network)
    vocabulary, width = parameter.shape
    dtype = tape.env.autocast or x.dtype
    with tape.no_grad():
        weight = ops.autocast(tape.leaf(parameter))
        held = "fp32" if by == "unsloth" else dtype
        logits = tape.tensor(CHUNK, vocabulary, held, "chunk of logits")
        if by == "foak":
            copy = tape.tensor(CHUNK, vocabulary, "fp32", "chunk of logits")
            del copy
        if by == "unsloth" and backward:
            product = tape.tensor(CHUNK, width, "fp32", "product")
            del product
        if by != "unsloth" and backward and dtype != x.dtype:
            product = tape.tensor(CHUNK, width, dtype, "product")
            del product
    del weight, logits
