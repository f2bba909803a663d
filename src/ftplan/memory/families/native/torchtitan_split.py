"""torchtitan's tensor parallelism with a sequence that is split between the layers that are.

Shapes are a rank's: :func:`ftplan.memory.parallel.local_config` has cut heads and inner widths.
Tensors of the sequence's dimension travel by way of the first one, which copies them.

Source: pytorch/torchtitan torchtitan/models/common (decoder_sharding.py, embedding.py) and
torchtitan/components/loss.py (``_LossParallelCrossEntropy``), 0.3.0;
torch/distributed/_functional_collectives.py, torch 2.13.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.nn import Embedding
from ftplan.memory.tape import ONE, PART, TOKENS, Grads, Size, Tape, Tensor

__all__ = ["VocabParallelEmbedding", "gathered", "loss_parallel", "scattered"]


def gathered(x: Tensor) -> Tensor:
    """A rank's tokens with those of the others: as they come, then in order of the sequence."""
    out = _gather(x.tape, x.width, x.dtype)
    ops.record([out], "all_gather", [x], lambda grad: (_scatter(grad, keep=False),))
    return out


def scattered(x: Tensor) -> Tensor:
    """Partial sums of all tokens, summed over the ranks: each has its own tokens."""
    out = _scatter(x, keep=True)
    width, dtype = x.width, x.dtype
    ops.record([out], "reduce_scatter", [x], lambda grad: (_gather(grad.tape, width, dtype),))
    return out


def _gather(tape: Tape, width: int, dtype: str) -> Tensor:
    arrived = tape.tensor(TOKENS, width, dtype, "all_gather")
    out = tape.tensor(TOKENS, width, dtype, "tokens in order")
    del arrived
    return out


def _scatter(x: Tensor, *, keep: bool) -> Tensor:
    """``keep``: selective checkpointing keeps what arrives."""
    tape = x.tape
    sent = tape.tensor(TOKENS, x.width, x.dtype, "tokens by rank")
    out = tape.kept(PART, x.width, x.dtype, "reduce_scatter", keep=keep)
    del sent
    return out


class VocabParallelEmbedding(Embedding):
    """A rank's rows of the table; tokens of other ranks' rows are multiplied by zero."""

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        mask = tape.tensor(rows, 1, "bool", "tokens of this rank")
        index = tape.tensor(rows, 1, "int64", "token ids of this rank")
        found = ops.embedding(tape, tape.leaf(self.weight), rows)
        out = ops.mul(_indexed(found, index), _cast(mask, found.dtype))
        del found, mask
        return scattered(out)


def _indexed(x: Tensor, index: Tensor) -> Tensor:
    """What is looked up holds the indices it was looked up with."""
    out, kept = x.alias(), [index]

    def apply(grad: Tensor) -> Grads:
        kept.clear()
        return (grad,)

    ops.record([out], "lookup", [x], apply)
    return out


def _cast(mask: Tensor, dtype: str) -> Tensor:
    return ops.to(mask, dtype)


def loss_parallel(logits: Tensor) -> Tensor:
    """Cross entropy of a rank's part of the vocabulary, in fp32: keeps log-probabilities."""
    tape, rows, width = logits.tape, logits.rows, logits.width
    x = ops.to(logits, "fp32")
    shifted = tape.tensor(rows, width, "fp32", "shifted logits")
    raised = tape.tensor(rows, width, "fp32", "exp")
    del raised
    kept = [tape.tensor(rows, width, "fp32", "log-probabilities")]
    out = tape.tensor(ONE, 1, "fp32", "loss")

    def apply(grad: Tensor) -> Grads:
        names = ("gradient", "exp", "sum", "gradient")
        marks = [grad.tape.tensor(rows, width, "fp32", name) for name in names[:3]]
        del marks[1]
        result = grad.tape.tensor(rows, width, "fp32", names[3])
        marks.clear()
        kept.clear()
        return (result,)

    ops.record([out], "loss parallel", [x], apply)
    del shifted
    return out
