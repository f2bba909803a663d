"""The textbook's sums: what a parameter count alone can tell.

Inference takes N x M x 1.2 (N parameters of M bytes); training takes weights + activations +
gradients + optimizer states, the last two counted per trainable parameter (Huyen, AI Engineering,
chapter 7, "Memory Math"). Activations need a shape, so they are a finding here and no guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ftplan.dtypes import Format
from ftplan.report import Term

__all__ = ["TextbookSum", "inference", "training"]

BOOK = "Huyen, AI Engineering (2025), chapter 7, 'Memory Math'"
OVERHEAD = Fraction(1, 5)
ADAM_VALUES = 3
"""A gradient and two moments for each trainable parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextbookSum:
    """A sum of the textbook in bytes, term by term."""

    terms: tuple[Term, ...]
    trainable_params: int

    @property
    def total(self) -> int:
        """All terms, in bytes."""
        return sum(term.bytes for term in self.terms)


def _weights(params: int, storage: Format, name: str) -> Term:
    return Term(
        name=f"weights/{name}",
        bytes=storage.nominal_bytes(params),
        at_peak=True,
        formula=f"{params:,} parameters x {storage.bits} bits / 8",
        source=BOOK,
    )


def inference(params: int, storage: Format) -> TextbookSum:
    """N x M x 1.2, with the 20 % as a term of its own."""
    weights = _weights(params, storage, "all")
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
    state_values: int = ADAM_VALUES - 1,
) -> TextbookSum:
    """Weights, gradients and optimizer states; activations are left out and said so.

    ``storage`` is the base weights' format and ``trained`` the trainable values'; an optimizer
    keeps ``state_values`` of them for each trainable parameter (Adam: 2).
    """
    one = trained.nominal_bytes(trainable)
    terms = [
        _weights(params, storage, "all"),
        Term(
            name="gradients/parameters",
            bytes=one,
            at_peak=True,
            formula=f"{trainable:,} trainable x {trained.bits} bits / 8",
            source=BOOK,
        ),
        Term(
            name="optimizer/states",
            bytes=one * state_values,
            at_peak=True,
            formula=f"{trainable:,} trainable x {state_values} x {trained.bits} bits / 8",
            source=BOOK,
        ),
    ]
    return TextbookSum(terms=tuple(terms), trainable_params=trainable)
