"""What PEFT's kinds of adapters take beside targets: a rank, and settings by PEFT's own names."""

from __future__ import annotations

from ftplan.errors import InputError
from ftplan.spec import Method

__all__ = ["OPTIONS", "RANKS", "check_options"]

RANKS = {
    **dict.fromkeys(("lora", "qlora", "dora", "vera", "loha", "lokr"), 16), "adalora": 12,
    "miss": 64, "hra": 8, "randlora": 32, "shira": 32, "vblora": 4, "delora": 8, "pvera": 256,
    "hira": 32, "gralora": 32, "glora": 8, "peanut": 32, "psoft": 32,
}  # fmt: skip
"""Kinds that have a rank, and what it is when nothing is said: 16, or PEFT's own."""

Allowed = type | tuple[str | bool, ...]

OPTIONS: dict[str, dict[str, Allowed]] = {
    "ia3": {"feedforward_modules": tuple}, "lokr": {"decompose_factor": int},
    "c3a": {"block_size": int}, "fourierft": {"n_frequency": int},
    "miss": {"init_weights": (True, False, "bat", "mini"), "mini_r": int},
    "road": {"variant": ("road_1", "road_2", "road_4")}, "gralora": {"gralora_k": int},
    "glora": {"config_A_B": ("lora", "vector", "constant")},
    "peanut": {"depth": int, "act_fn": str},
    "vblora": {"num_vectors": int, "vector_length": int, "topk": int},
    "trainable_tokens": {"token_indices": tuple},
}  # fmt: skip
"""Settings that move memory by kind, and what each may be: a type, or one of some values."""


def check_options(method: Method) -> None:
    """Raise InputError for a setting whose value its kind cannot have."""
    known = OPTIONS.get(method.kind, {})
    for name, value in (method.options or {}).items():
        allowed = known.get(name)
        if isinstance(allowed, tuple):
            fits = any(value == one and type(value) is type(one) for one in allowed)
            wanted = "one of " + ", ".join(str(one).lower() for one in allowed)
        elif allowed is not None:
            fits = type(value) is allowed and bool(value)
            wanted = {int: "a number from 1", str: "a text", tuple: "a list"}[allowed]
        if allowed is not None and not fits:
            raise InputError(
                f"method.options.{name} of {method.kind} cannot be {value!r}",
                remedy=f"write {wanted}",
            )
