"""Triton's kernels without a GPU: what is written around them runs, the launches do nothing.

The libraries that people train with (trl.kernels, liger_kernel) allocate their buffers in Python
and hand them to a kernel, which writes and allocates nothing. Import them inside
:func:`importable` and the buffers live and die as on a GPU, on fake tensors.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

__all__ = ["importable", "stand_in"]

_SUBMODULES = (
    "language", "language.extra", "language.extra.libdevice", "language.extra.cuda",
    "language.extra.cuda.libdevice", "language.math", "runtime", "runtime.autotuner", "testing",
)  # fmt: skip


class _Kernel:
    """``kernel[grid](...)``: launched, and over."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Config:
    """``triton.Config``: how a kernel would be launched."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def all_kwargs(self) -> dict[str, Any]:
        """What it says of a launch."""
        return {}


class _Constant(int):
    """``tl.constexpr``: an annotation, and a wrapper of module-level constants."""

    @property
    def value(self) -> int:
        return int(self)


class _Module(ModuleType):
    """A module that has every name: kernels name device functions that nobody calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def stand_in(name: str) -> ModuleType:
    """A module of that name in which nothing is ever called."""
    return _Module(name)


def _jit(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
    return _Kernel if function is None else _Kernel(function)


def _as_it_is(*_args: Any, **_kwargs: Any) -> Callable[[Any], Any]:
    return lambda function: function


def _stand_in() -> dict[str, ModuleType]:
    triton = _Module("triton")
    triton.__version__ = "3.5.0"  # type: ignore[attr-defined]
    names: dict[str, Any] = {
        "jit": _jit,
        "autotune": _as_it_is,
        "Config": _Config,
        "heuristics": _as_it_is,
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
    }
    modules: dict[str, ModuleType] = {"triton": triton}
    modules |= {f"triton.{name}": _Module(f"triton.{name}") for name in _SUBMODULES}
    modules["triton.language"].constexpr = _Constant  # type: ignore[attr-defined]
    vars(triton).update(names)
    tuner = modules["triton.runtime.autotuner"]
    tuner.Autotuner = tuner.Heuristics = _Kernel  # type: ignore[attr-defined]
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    return modules


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Let packages import Triton; torch and transformers, which must not see it, load first."""
    import transformers
    from torch.utils import _triton  # noqa: F401 - asks for Triton while it loads
    from transformers import Trainer  # noqa: F401 - loads what asks for Triton
    from transformers.utils import import_utils

    modules = _stand_in()
    before = {name: sys.modules.get(name) for name in modules}
    asked = import_utils.is_triton_available, transformers.utils.is_triton_available
    sys.modules.update(modules)
    import_utils.is_triton_available = transformers.utils.is_triton_available = lambda *_: True
    try:
        yield
    finally:
        import_utils.is_triton_available, transformers.utils.is_triton_available = asked
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
