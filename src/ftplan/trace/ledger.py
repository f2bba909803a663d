"""The ledger of a run on fake tensors: when each storage is born, by which op, and when it dies.

A storage is what the CUDA caching allocator would hand out: its size is rounded up to 512 bytes,
views share it, and it dies when its last holder (a variable, a saved tensor, a gradient) lets go.
The clock ticks once per birth and per death, so that any moment of the run can be asked for later.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ftplan.dataclass import dataclass

__all__ = ["ALLOCATION_GRANULE_BYTES", "Entry", "Ledger"]

ALLOCATION_GRANULE_BYTES = 512
"""The caching allocator's smallest unit (kMinBlockSize of CUDACachingAllocator.cpp)."""

_HOST = "host"


@dataclass(slots=True)
class Entry:
    """One storage. ``death`` is None while it lives; ``kind`` is refined as the run goes on."""

    number: int
    bytes: int
    """Rounded up to the allocator's granule."""
    shape: tuple[int, ...]
    dtype: str
    op: str
    """The op whose output it first was (``mm``, ``_to_copy``), with ``[backward]`` in backward."""
    module: str
    """Dotted path of the module that was running, empty outside the model."""
    phase: str
    step: int
    birth: int
    kind: str = ""
    death: int | None = None
    recompute: bool = False
    """Made by the recomputation of a checkpointed block."""


def _round_up(size: int) -> int:
    return -(-size // ALLOCATION_GRANULE_BYTES) * ALLOCATION_GRANULE_BYTES


def _sums_in_place(old: Any, new: Any) -> bool:
    """Whether this is autograd adding up the gradients of one tensor, which a GPU does in place.

    Autograd reuses the first gradient when nobody else holds it, but never a tensor subclass, as
    fake tensors are (torch/csrc/autograd/input_buffer.cpp, ``can_accumulate_inplace``).
    """
    if torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
        return False
    if not isinstance(new, torch.Tensor) or old.shape != new.shape or old.dtype != new.dtype:
        return False
    storage = old.untyped_storage()
    # one for the gradient, one for ``storage``; the base of a view holds a third
    return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)


_WRITES_IN_PLACE = ("index_put", "scatter_add", "scatter", "index_add")


def _writes_in_place(func: Any) -> bool:
    """Whether this is a gradient written into zeros that were made for it.

    Autograd's formulas write in place, but make another tensor where a tensor subclass, as fake
    tensors are, is among the operands (torch/csrc/autograd/FunctionsManual.cpp,
    ``index_backward``, ``gather_backward``, ``value_selecting_reduction_backward`` ...).
    """
    node = torch._C._current_autograd_node()
    if node is None or torch.is_grad_enabled() or func._opname not in _WRITES_IN_PLACE:
        return False
    return not isinstance(node, torch.autograd.function.BackwardCFunction)


class Ledger(TorchDispatchMode):
    """Account for every storage that passes through the dispatcher while the mode is on.

    ``phase`` and ``step`` are set by the loop that runs the job. ``module_stack`` is kept by the
    hooks of :meth:`watch_modules`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.phase = "load"
        self.step = 0
        self.clock = 0
        self.live_bytes = 0
        self.marks: list[tuple[int, int, str]] = []
        """(clock, step, phase) at each change of phase."""
        self.module_stack: list[str] = []
        self._by_storage: dict[int, tuple[Entry, Any]] = {}
        self._module_of_node: dict[int, str] = {}
        self._op_override: list[str] = []
        self._on_host = 0
        self.host_begets_host = False
        """What is made of host tensors alone is host memory."""
        self.sums_in_place = True
        """A sum of two gradients is autograd's own, not one that a function of Python makes."""
        self.sharded = False
        """The job runs on DTensors."""
        self._own_mode: Any = None
        self.scalar_answer: Callable[[Any, str], Any] | None = None

    def __enter__(self) -> Any:
        self._own_mode = active_fake_mode()
        return super().__enter__()

    # -- the loop's side ---------------------------------------------------------------------

    def enter(self, phase: str, step: int) -> None:
        """Say which phase of which step runs from now on."""
        self.phase, self.step = phase, step
        self.marks.append((self.clock, step, phase))

    @contextlib.contextmanager
    def named_op(self, name: str) -> Iterator[None]:
        """Births inside belong to one op of that name (an emulated kernel)."""
        self._op_override.append(name)
        try:
            yield
        finally:
            self._op_override.pop()

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Births inside are host memory: not counted."""
        self._on_host += 1
        try:
            yield
        finally:
            self._on_host -= 1

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Births inside are device memory, whatever they are made of."""
        before, self.host_begets_host = self.host_begets_host, False
        try:
            yield
        finally:
            self.host_begets_host = before

    def is_on_host(self, tensor: Any) -> bool:
        """Whether the tensor is known to be host memory."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        return found is not None and found[0].kind == _HOST

    def _of_host(self, operands: Any) -> bool:
        found = list(_tensors(operands))
        return bool(found) and all(map(self.is_on_host, found))

    def mark(self, tensors: Iterable[Any], kind: str) -> None:
        """Give the storages of these tensors a kind (``weights``, ``gradients`` ...)."""
        for tensor in tensors:
            entry = self.entry_of(tensor)
            if entry is not None:
                entry.kind = kind

    def entry_of(self, tensor: Any) -> Entry | None:
        """The living entry behind a tensor, or None if it is not on the device."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        return found[0] if found and found[0].kind != _HOST else None

    def forget(self, tensor: Any) -> None:
        """The tensor lives on the host after all: it is taken off the books."""
        entry = self.entry_of(tensor)
        if entry is not None:
            entry.kind = _HOST
            self.live_bytes -= entry.bytes
            entry.bytes = 0

    def resize(self, storage: Any, size: int) -> None:
        """A storage was resized in place (FSDP2 frees and refills gathered units so)."""
        found = self._by_storage.get(storage._cdata)
        if found is None:
            return
        entry, reference = found
        if _round_up(size) == entry.bytes:
            return
        self._die(entry)
        if size:
            reborn = self._born(size, entry.shape, entry.dtype, entry.op)
            reborn.kind, reborn.module = "gathered", entry.module
        else:
            reborn = Entry(
                number=len(self.entries), bytes=0, shape=entry.shape, dtype=entry.dtype,
                op=entry.op, module=entry.module, phase=self.phase, step=self.step,
                birth=self.clock, kind="gathered",
            )  # fmt: skip
        self._by_storage[storage._cdata] = (reborn, reference)

    def watch_modules(self, model: Any) -> list[Any]:
        """Keep ``module_stack`` by forward hooks; returns the hooks' handles."""
        handles = []
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(self._push(name), with_kwargs=False, prepend=True)
            )
            handles.append(module.register_forward_hook(self._pop(), always_call=True))
        return handles

    def _push(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.module_stack.append(name)

        return hook

    def _pop(self) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.module_stack:
                self.module_stack.pop()

        return hook

    # -- the dispatcher's side ---------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes back with the rank's own tensors
        if self.sharded:
            if func is torch.ops._c10d_functional.wait_tensor.default:
                return args[0]  # its shape function makes a tensor that no GPU makes
            if active_fake_mode() is not self._own_mode:
                return func(*args, **(kwargs or {}))  # DTensor asking for shapes
        if func is torch.ops.aten._local_scalar_dense.default and self.scalar_answer is not None:
            return self.scalar_answer(args[0], self.phase)
        summed = func is torch.ops.aten.add.Tensor and not kwargs and self.sums_in_place
        if summed and _sums_in_place(*args):
            return args[0]
        if _writes_in_place(func):
            return args[0]
        result = func(*args, **(kwargs or {}))
        begotten = self.host_begets_host and self._of_host((args, kwargs))
        with self.on_host() if begotten else contextlib.nullcontext():
            for tensor in _tensors(result):
                self._see(tensor, func)
        if func is torch.ops.inductor.resize_storage_bytes_.default:
            self.resize(args[0].untyped_storage(), args[1])
        return result

    def _see(self, tensor: Any, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._by_storage or tensor.device.type == "meta":
            return
        size = 0 if self._on_host else storage.nbytes()
        entry = self._born(
            size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), self._op(func)
        )
        if self._on_host:
            entry.kind = _HOST
        self._by_storage[key] = (entry, weakref.ref(storage, self._burial(key)))

    def _op(self, func: Any) -> str:
        if self._op_override:
            return self._op_override[-1]
        return str(func._schema.name).rpartition("::")[2]

    def _born(self, size: int, shape: tuple[int, ...], dtype: str, op: str) -> Entry:
        node = torch._C._current_autograd_node()
        module = self.module_stack[-1] if self.module_stack else ""
        recompute = False
        if node is None:
            self._module_of_node[torch._C._autograd._get_sequence_nr() - 1] = module
        elif self.module_stack and module:
            recompute = True
            self._module_of_node[torch._C._autograd._get_sequence_nr() - 1] = module
        else:
            module = self._module_of_node.get(node._sequence_nr(), "")
            op = f"{op}[{node.name().removesuffix('0')}]"
        entry = Entry(
            number=len(self.entries), bytes=_round_up(size), shape=shape, dtype=dtype, op=op,
            module=module, phase=self.phase, step=self.step, birth=self.clock,
            recompute=recompute,
        )  # fmt: skip
        self.clock += 1
        self.entries.append(entry)
        self.live_bytes += entry.bytes
        return entry

    def _die(self, entry: Entry) -> None:
        entry.death = self.clock
        self.clock += 1
        self.live_bytes -= entry.bytes

    def _burial(self, key: int) -> Callable[[Any], None]:
        def bury(_: Any) -> None:
            found = self._by_storage.pop(key, None)
            if found is not None:
                self._die(found[0])

        return bury

    # -- asking afterwards -------------------------------------------------------------------

    def curve(self) -> list[tuple[int, int]]:
        """(clock, live bytes after that tick) for the whole run."""
        change: dict[int, int] = {}
        for entry in self.entries:
            change[entry.birth] = change.get(entry.birth, 0) + entry.bytes
            if entry.death is not None:
                change[entry.death] = change.get(entry.death, 0) - entry.bytes
        live, points = 0, []
        for clock in sorted(change):
            live += change[clock]
            points.append((clock, live))
        return points


def _tensors(result: Any) -> Iterator[Any]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from _tensors(item)
    elif isinstance(result, dict):
        yield from _tensors(list(result.values()))
