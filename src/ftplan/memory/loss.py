"""The loss: how the logits are met, all at once, some tokens at a time, or never whole."""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.nn import Linear, Network
from ftplan.memory.tape import BATCH, CHUNK, ONE, TOKENS, Grads, Tensor

__all__ = ["chunk_tokens", "classify_loss", "compute_loss", "model_outputs"]

LIGER_CHUNK_FACTOR = 1
"""Liger bounds a chunk's logits to this many times the hidden states."""


def chunk_tokens(kind: str, tokens: int, given: int, vocab: int, hidden: int) -> int:
    """Tokens whose logits exist at once.

    Liger chooses the next power of two at which a chunk's logits are no larger than all hidden
    states (liger_kernel/ops/fused_linear_cross_entropy.py).
    """
    if kind != "fused":
        return min(given, tokens)
    parts = -(-vocab // (LIGER_CHUNK_FACTOR * hidden))
    return min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)


def compute_loss(network: Network, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Loss, and the logits where the model returns them, from the last hidden states."""
    kind = x.tape.env.loss
    if kind == "chunked":
        return _chunked(network, x), None
    if kind == "fused":
        return _fused(network, x), None
    logits = network.head(x)
    return _full(network, logits), logits


def model_outputs(network: Network, x: Tensor, completion: int = 0) -> Tensor:
    """What the model returns where the loss is the trainer's: logits, all or a completion's.

    ``completion`` tokens at the end of each sequence reach the head, and the one before them,
    whose next token is the first of the completion (``logits_to_keep``).
    """
    if completion:
        x = ops.rows_slice(x, BATCH * (completion + 1))
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
    if network.loss_in_fp32:
        logits = ops.to(logits, "fp32")
    labels = logits.tape.tensor(TOKENS, 1, "int64", "shifted labels")
    if logits.tape.env.loss_shifts == "logits":
        # transformers until 4.48: logits[..., :-1, :].contiguous(), beside the logits themselves
        return ops.cross_entropy(ops.copy(logits, "shifted logits"), labels)
    return ops.cross_entropy(logits, labels)


def _chunked(network: Network, x: Tensor) -> Tensor:
    """TRL's ``chunked_nll``: each chunk is checkpointed, so its logits live for a moment.

    Two chunks are played: all later ones are like the second (trl/trainer/sft_trainer.py,
    ``_chunked_cross_entropy_loss``, 1.10).
    """
    hidden = ops.gather(ops.copy(x, "shifted hidden states"))
    loss: Tensor | None = None
    trains = any(parameter.trainable for parameter in network.head_parameters())
    for _ in range(2):
        piece = ops.rows_slice(hidden, CHUNK)
        part = checkpoint(lambda h: _chunk_loss(network, h), piece, trains=trains)
        loss = part if loss is None else ops.add(loss, part)
    assert loss is not None
    return loss


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
    """Liger's fused linear cross entropy: gradients are made in forward, chunk by chunk."""
    tape = x.tape
    weights = [tape.leaf(p) for p in network.head_parameters() if p.trainable]
    made = []
    if x.requires_grad or weights:
        made.append(tape.tensor(x.rows, x.width, x.dtype, "gradient of hidden states"))
        made += [tape.tensor(w.rows, w.width, w.dtype, "gradient of the head") for w in weights]
    losses = tape.tensor(TOKENS, 1, "fp32", "loss per token")
    with tape.no_grad():
        chunk = x.alias(rows=CHUNK)
        logits = network.head(chunk)
        if weights:
            update = tape.tensor(weights[0].rows, weights[0].width, logits.dtype, "head update")
            del update
        del logits, chunk
    loss = tape.tensor(ONE, 1, "fp32", "loss")
    del losses

    def apply(_grad: Tensor) -> Grads:
        return tuple(made)

    if made:
        ops.record([loss], "fused loss", [x, *weights], apply)
    return loss
