"""What the trainers with modules of their own have in common."""

from __future__ import annotations

import re

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.nn import Module, Network
from ftplan.memory.tape import ITEM_BYTES, ONE, Grads, Parameter, Tensor

__all__ = [
    "PARTS", "Native", "capped_streamed", "cast_streamed", "learned", "parts_of", "repeated",
    "settle", "shifted", "streamed_loss", "targets", "without_bytes",
]  # fmt: skip

PARTS: dict[str, tuple[str, ...]] = {
    "query": ("query", "q_proj", "query_key_value", "qkv_proj"),
    "key": ("key", "k_proj", "query_key_value", "qkv_proj"),
    "value": ("value", "v_proj", "query_key_value", "qkv_proj"),
    "projection": ("projection", "o_proj", "output_proj", "out_proj", "dense"),
    "head": ("head", "lm_head", "embed_out", "output"),
}  # fmt: skip
"""The parts of a decoder that these trainers adapt, by the names that architectures and trainers
give their matrices; the MLP beside them is adapted all or not at all."""
MLP = (
    ("mlp",), ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"),
    ("w1", "w2", "w3"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip
"""Names of all the matrices of an MLP."""


class Native(Network):
    """A network of a trainer's own modules; it meets the loss in the trainer's own loop."""

    outputs_outlive_step = False
    """The loop's names for the outputs, and the graph with them, last until the next batch's
    outputs take their place."""
    meets_previous = False
    """The batch before was as long as this one: what the loop still names of it is there too."""
    chunked_by_sequence = False
    """A chunk of the loss is so many tokens of each sequence, not of the batch."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What the model returns, from the last hidden states."""
        raise NotImplementedError

    def returned(self, outputs: list[Tensor]) -> list[Tensor]:
        """What becomes of the outputs on their way to the loop."""
        return outputs

    def loss(self, held: list[Tensor]) -> Tensor:
        """The loop's loss. ``held`` is what the loop has a name for: it may put others there."""
        raise NotImplementedError


def parts_of(spec: AdapterSpec) -> frozenset[str]:
    """Which of :data:`PARTS` (and ``mlp``) a plan's targets name.

    Raises UnsupportedError for names that are none, and for a part of the MLP alone.
    """
    named = spec.targets
    if named == "all-linear":
        return frozenset({*PARTS, "mlp"} - {"head"})
    if named == "attention":
        return frozenset({"query", "key", "value", "projection"})
    known = {name for names in (*PARTS.values(), *MLP) for name in names}
    if isinstance(named, str):
        found = {name for name in known if re.fullmatch(named, f"model.layers.0.x.{name}")}
    else:
        found = {target.rpartition(".")[2] for target in named or ()}
    parts = {part for part, names in PARTS.items() if found & set(names)}
    whole = {name for names in MLP if found >= set(names) for name in names}
    if whole:
        parts.add("mlp")
    odd = found - whole - {name for names in PARTS.values() for name in names}
    if odd or not parts:
        raise UnsupportedError(
            f"an adapter on {', '.join(sorted(odd)) or 'nothing'} in a trainer of its own modules",
            remedy="name q_proj, k_proj, v_proj, o_proj, all matrices of the MLP, or lm_head",
        )
    return frozenset(parts)


def repeated(x: Tensor, repeats: int, head_size: int) -> Tensor:
    """Keys or values expanded to every query head: a copy, unless there is one head to expand."""
    if repeats == 1 or x.width > head_size:
        return ops.expand_heads(x, repeats)
    out = x.alias(width=x.width * repeats)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "expand", [x], lambda grad: (make(grad),))
    return out


def learned(name: str, shape: tuple[int, ...], dtype: str, *, trainable: bool = True) -> Parameter:
    """A weight that an adapter adds to the model."""
    parameter = Parameter(name, shape, dtype, trainable)
    parameter.added = True
    return parameter


def settle(network: Network, job: Job, added: str) -> None:
    """Give every weight its dtype, and let what the method trains ask for gradients.

    ``added``: dtype of an adapter's weights.
    """
    roots: list[Module] = [network]
    roots += [block for stage in network.stages for block in stage.stack.kinds]
    plain = job.weights.name if job.weights.name in ITEM_BYTES else job.base_dtype
    for root in roots:
        for _, parameter in root.named_parameters():
            if parameter.dtype not in ITEM_BYTES:
                continue
            parameter.dtype = added if parameter.added else plain
            if not parameter.added:
                parameter.trainable = job.method == "full" and not parameter.fixed


def cast_streamed(x: Tensor, dtype: str, *, alone: bool = False) -> Tensor:
    """Chunks cast one after the other: the copy takes the place of ``x`` in the graph, whose
    gradient :func:`streamed_loss` casts back as it makes it.

    ``alone``: each copy goes before the next is made, and none has bytes here.
    """
    if x.dtype == dtype:
        return x
    if alone:
        return without_bytes(x, dtype)
    out = x.tape.tensor(x.rows, x.width, dtype, "cast")
    out.requires_grad, out.node, out.output_nr = x.requires_grad, x.node, x.output_nr
    return out


def without_bytes(x: Tensor, dtype: str) -> Tensor:
    """``x`` in the graph, of chunks that are made and let go of one after the other."""
    out = Tensor(x.tape, None, x.rows, x.width, dtype)
    out.requires_grad, out.node, out.output_nr = x.requires_grad, x.node, x.output_nr
    return out


def capped_streamed(logits: Tensor) -> Tensor:
    """``tanh`` of many scaled chunks, scaled again, one after the other, as one node.

    The chunks themselves have no bytes; each one's way back takes the place of its gradient.
    """
    tape = logits.tape
    kept = [tape.tensor(logits.rows, logits.width, logits.dtype, "tanh")]
    out = tape.tensor(logits.rows, logits.width, logits.dtype, "scale")

    def apply(grad: Tensor) -> Grads:
        kept.clear()
        return (grad,)

    ops.record([out], "caps", [logits], apply)
    return out


def shifted(logits: Tensor) -> Tensor:
    """All logits but each sequence's last, as one block: a copy, but for a single sequence."""
    rest = ops.part(logits, logits.width)
    return rest if logits.tape.alone else ops.copy(rest, "shifted logits")


def streamed_loss(logits: Tensor, source_dtype: str) -> Tensor:
    """Cross entropy of many chunks, one after the other, as one node.

    Each chunk's log-probabilities are let go of as its gradient, in ``source_dtype``, is made: all
    chunks but the first need nothing more on the way back.
    """
    tape = logits.tape
    kept = [tape.tensor(logits.rows, logits.width, logits.dtype, "log-probabilities")]
    out = tape.tensor(ONE, 1, logits.dtype, "loss")
    make = ops.like(logits.rows, logits.width, source_dtype, logits.requires_grad)

    def apply(grad: Tensor) -> Grads:
        kept.clear()
        return (make(grad),)

    ops.record([out], "earlier chunks", [without_bytes(logits, source_dtype)], apply)
    return out


def targets(logits: Tensor) -> Tensor:
    """The labels that a loss takes beside its logits."""
    return logits.tape.tensor(logits.rows, 1, "int64", "targets")
