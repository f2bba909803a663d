"""The usual ways of finetuning one model, side by side, from its parameter count alone.

The same sums as :mod:`ftplan.memory.textbook`: weights, gradients and optimizer states; activations
need a shape and are left out. Shares of trained parameters are examples and say so in their names.
"""

from __future__ import annotations

from fractions import Fraction

from ftplan.dtypes import Format, find_format
from ftplan.memory.textbook import training

__all__ = ["ways"]

_WAYS: tuple[tuple[str, Fraction, int, str | None], ...] = (
    ("full, Adam", Fraction(1), 2, None),
    ("full, SGD with momentum", Fraction(1), 1, None),
    ("full, SGD", Fraction(1), 0, None),
    ("partial, 10% trained, Adam", Fraction(1, 10), 2, None),
    ("LoRA, 1% trained, Adam", Fraction(1, 100), 2, None),
    ("LoRA on int8, 1% trained, Adam", Fraction(1, 100), 2, "int8"),
    ("QLoRA (nf4), 1% trained, Adam", Fraction(1, 100), 2, "nf4"),
)
"""Name, share of parameters trained, values an optimizer keeps for each, storage of the base."""


def ways(params: int, storage: Format) -> tuple[dict[str, int | str], ...]:
    """A row for each way: bytes of each part and in all, in the contract's units (bytes)."""
    trained = storage if storage.trainable else find_format("bf16")
    rows: list[dict[str, int | str]] = []
    for name, share, values, base in _WAYS:
        base_format = find_format(base) if base is not None else storage
        if base is not None and base_format.bits >= storage.bits:
            continue  # the base is stored that small already
        count = max(1, round(params * share))
        result = training(params, count, base_format, trained, [int(trained.bits)] * values)
        parts = {term.name.split("/")[0]: term.bytes for term in result.terms}
        rows.append(
            {
                "name": name,
                "trainable_params": count,
                "weights_bytes": parts["weights"],
                "gradients_bytes": parts["gradients"],
                "optimizer_bytes": parts["optimizer"],
                "total_bytes": result.total,
            }
        )
    return tuple(rows)
