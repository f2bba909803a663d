"""Host and device apart, where all tensors are the CPU's: DeepSpeed's offload.

DeepSpeed names the device by its accelerator's answer, and the host by a word of its own. Here the
accelerator answers with a word that can be told from that one. What is made of host tensors alone
is on the host too.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ftplan.trace.cuda import patched
from ftplan.trace.ledger import Ledger

__all__ = ["two_memories"]


class Card(str):
    """The device, by the word for the host."""

    __slots__ = ()


class _Apart(TorchFunctionMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        where = kwargs.get("device")
        if name == "to" and where is None:
            where = next((arg for arg in args[1:] if isinstance(arg, str)), None)
        if name == "cpu" or name == "full":  # of the fp32 weights' device (stage_1_and_2.py)
            where = "cpu"
        if not isinstance(where, str):
            return func(*args, **kwargs)
        host = not isinstance(where, Card)
        if name not in ("to", "cpu"):
            with self.ledger.on_host() if host else contextlib.nullcontext():
                return func(*args, **kwargs)
        moved = args[0]
        if host == self.ledger.is_on_host(moved):
            return func(*args, **kwargs)
        dtype = next(
            (a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)), None
        )
        with self.ledger.on_host() if host else self.ledger.on_device():
            return torch.empty_like(moved.detach(), dtype=dtype)


@contextlib.contextmanager
def two_memories(ledger: Ledger) -> Iterator[None]:
    """Tell apart what DeepSpeed puts on the host while the block runs."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage3

    accelerator, apart = type(get_accelerator()), _Apart(ledger)
    ledger.host_begets_host = True
    moved = stage3.defragment

    def pinned(_accelerator: Any, tensor: Any, align_bytes: int = 1) -> Any:
        """What is page-locked was made on the host, if nobody said so."""
        ledger.forget(tensor)
        return tensor

    def defragment(tensors: Any) -> Any:
        """Shards of the device, by way of the host and back to ``tensor.device``."""
        apart.off = True
        with ledger.on_device():
            flat = moved(tensors)
        apart.off = False
        return flat

    with (
        patched(accelerator, "current_device_name", lambda _self: Card("cpu")),
        patched(accelerator, "device_name", lambda _self, _index=None: Card("cpu")),
        patched(accelerator, "pin_memory", pinned),
        patched(stage3, "defragment", defragment),
        apart,
    ):
        yield
