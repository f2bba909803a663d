"""The textbook's sums: what a parameter count alone can tell.

Inference takes N x M x 1.2 (N parameters of M bytes); training takes weights + activations +
gradients + optimizer states, the last two counted per trainable parameter (Huyen, AI Engineering,
chapter 7, "Memory Math"). Activations need a shape, so they are a finding here and no guess. Over
several GPUs each part is divided as ZeRO divides it (Rajbhandari et al., arXiv 1910.02054, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ftplan.dataclass import dataclass
from ftplan.dtypes import Format
from ftplan.report import Term

__all__ = ["Split", "TextbookSum", "inference", "training"]

BOOK = "Huyen, AI Engineering (2025), chapter 7, 'Memory Math'"
OVERHEAD = Fraction(1, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Over how many GPUs each part is divided; 0: it waits on the host."""

    weights: int = 1
    gradients: int = 1
    states: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextbookSum:
    """A sum of the textbook in bytes, term by term."""

    terms: tuple[Term, ...]
    trainable_params: int

    @property
    def total(self) -> int:
        """All terms, in bytes."""
        return sum(term.bytes for term in self.terms)


def _term(name: str, count: int, bits: Fraction | int, gpus: int, what: str) -> Term:
    share = f" / {gpus} GPUs" if gpus > 1 else "; waits on the host" if not gpus else ""
    return Term(
        name=name,
        bytes=round(Fraction(count) * bits / 8 / gpus) if gpus else 0,
        at_peak=True,
        formula=f"{count:,} {what} x {bits} bits / 8{share}",
        source=BOOK,
    )


def inference(params: int, storage: Format, split: Split | None = None) -> TextbookSum:
    """N x M x 1.2, with the 20 % as a term of its own."""
    gpus = split.weights if split else 1
    weights = _term("weights/all", params, storage.bits, gpus, "parameters")
    overhead = Term(
        name="overhead/textbook",
        bytes=round(weights.bytes * OVERHEAD),
        at_peak=True,
        formula=f"{weights.bytes:,} x 0.2",
        source=f"{BOOK}: activations and key-value vectors taken as 20 % of the weights",
    )
    return TextbookSum(terms=(weights, overhead), trainable_params=0)


def training(
    params: int,
    trainable: int,
    storage: Format,
    trained: Format,
    state_bits: Sequence[int],
    split: Split | None = None,
) -> TextbookSum:
    """Weights, gradients and optimizer states; activations are left out and said so.

    ``storage`` is the base weights' format and ``trained`` the trainable values'; an optimizer
    keeps values of ``state_bits`` for each trainable parameter (Adam: two of the trained format,
    so that gradients and states are three values).
    """
    split = split or Split()
    terms = (
        _term("weights/all", params, storage.bits, split.weights, "parameters"),
        _term("gradients/parameters", trainable, trained.bits, split.gradients, "trainable"),
        _term("optimizer/states", trainable, sum(state_bits), split.states, "trainable"),
    )
    return TextbookSum(terms=terms, trainable_params=trainable)
