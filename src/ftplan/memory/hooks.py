"""Hooks on every module, as DeepSpeed's ZeRO-3 has them: they leave marks on the tape.

A module starts forward before its code runs, and backward with the gradient of an output; it has
ended forward after its code, and backward with the gradient of its last input
(deepspeed/runtime/zero/parameter_offload.py, 0.19.8: ``_register_deepspeed_module``,
``PreBackwardFunctionForModule``, ``PostBackwardFunctionModule``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.experts import Routing
from ftplan.memory.nn import Module
from ftplan.memory.tape import NOTHING, Parameter, Storage, Tape, Tensor
from ftplan.memory.units import Unit

__all__ = ["BESIDE", "SECOND", "Hooks", "Mark", "View", "Visit"]


BESIDE, SECOND = 1, 2


@dataclass(slots=True, eq=False)
class Visit:
    """A module that runs."""

    unit: Unit
    path: str
    """In the unit."""
    parameters: list[Parameter]
    around: Visit | None = None
    """A module that has no forward code here, and runs while those in it do."""
    looks_at: Sequence[Parameter] = ()
    """Weights of modules inside that DeepSpeed finds away, and from then on fetches with this one
    (``register_external_parameter``)."""
    model: int = 0
    """Which model it belongs to: the first one that is trained, a frozen one beside it, or a second
    one that is trained with the first (``BESIDE``, ``SECOND``)."""
    adapted: bool = True
    """False: the model runs with its adapters off."""
    called: bool = False
    remaining: int = 0
    """Gradients of inputs that are still to come before it has ended backward."""
    first: dict[bool, Visit] = field(default_factory=dict)
    """Of a module without forward code: which of those in it runs first, each way."""

    @property
    def engine(self) -> int:
        """Which of DeepSpeed's engines gathers its weights; the first: that of what is trained."""
        return int(self.model == BESIDE)


class Mark(NamedTuple):
    """A moment at which a module starts (its weights are fetched) or has ended."""

    visit: Visit
    fetches: bool
    forward: bool
    again: bool
    """In a forward with the adapters off."""
    begins: bool = False
    """A forward of the whole model starts, before any module of it."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The graph keeps a view of a weight, from the birth of a storage to its death."""

    unit: Unit
    parameter: Parameter
    model: int


class Hooks:
    """Hooks on the modules of every unit, which leave marks on the tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        tape.viewed, tape.module_hook = self._viewed, self._runs
        self._nameless: dict[tuple[int, bool], Visit] = {}
        """Modules that nobody keeps, of each model."""
        self._running = (0, True)
        """The model whose modules run, and whether its adapters are on."""
        self.marks: dict[int, Mark | View] = {}
        """By the storage without bytes that stands for the mark."""
        self._unit_of: dict[int, tuple[Unit, int]] = {}
        self.visits: list[Visit] = []
        self._at: dict[tuple[str, str], list[Visit]] = {}
        """Modules of what is trained, by the kind of unit and where they are in it."""
        self._before: list[tuple[Module, Callable[..., Any] | None]] = []

    def watch(self, unit: Unit, model: int = 0, *, adapted: bool = True) -> Visit:
        """Hook every module of the unit but the unit itself, which is returned."""
        assert unit.module is not None
        self._unit_of.update((id(parameter), (unit, model)) for parameter in unit.parameters)
        own = list(unit.module.parameters.values())
        whole = Visit(unit, "", own, model=model, adapted=adapted)
        around: dict[str, Visit | None] = {"": None}
        for path, module in unit.module.named_modules():
            if not path:
                continue
            outer = around[path.rpartition(".")[0]]
            own = list(module.parameters.values())
            visit = Visit(unit, path, own, outer, model=model, adapted=adapted)
            visit.looks_at = module.looks_at()
            if hasattr(module, "forward"):
                around[path] = None
                self._hook(module, visit)
            else:
                around[path] = outer if _is_list(module) else visit
                if around[path] is outer:
                    continue
            self._add(visit)
        self._add(whole)
        return whole

    def _add(self, visit: Visit) -> None:
        self.visits.append(visit)
        if visit.adapted and not visit.model:
            self._at.setdefault((visit.unit.name, visit.path), []).append(visit)

    def running_as(self, visit: Visit) -> list[list[Visit]]:
        """Which modules run where one of the model with its adapters off does, of all blocks that
        are recorded: a layer that has an adapter runs its base layer alone."""
        if visit.adapted:
            return [[visit]]
        places = ((visit.unit.name, visit.path + end) for end in ("", ".base_layer"))
        return [self._at[place] for place in places if place in self._at] or [[visit]]

    def enter(self, visit: Visit, inputs: int = 0, *, asked: bool = False) -> None:
        """The module runs: what an earlier forward of it, with a graph, had still to come is
        forgotten, and it never ends backward (``ds_grads_remaining = 0``, which then goes below).

        ``asked``: its input asks for a gradient with the graph off too.
        """
        for alike in self.running_as(visit):
            for known in alike:
                if known.unit.place == visit.unit.place:
                    known.remaining = int(asked)
        visit.remaining = inputs

    def ends(self, visit: Visit) -> bool:
        """A gradient of an input has come: whether it was the last one."""
        visit.remaining -= 1
        return visit.remaining == 0

    def unhook(self) -> None:
        """The step has been recorded: modules run by themselves again."""
        for module, own in reversed(self._before):
            _restore(module, own)
        self.tape.viewed = self.tape.module_hook = None

    def _hook(self, module: Module, visit: Visit) -> None:
        own: Any = vars(module).get("forward")
        if hasattr(own, "hooked"):  # a copy of a block that has hooks
            own = own.hooked
            _restore(module, own)
        self._before.append((module, own))
        forward = module.forward

        def hooked(*args: Any, **kwargs: Any) -> Any:
            return self._run(visit, forward, args, kwargs)

        hooked.hooked = own  # type: ignore[attr-defined]
        module.forward = hooked

    def _run(
        self, visit: Visit, forward: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        self.enter(visit)
        self.mark(visit, fetches=True, forward=True)
        out = forward(*(self._enter(value, visit) for value in args), **kwargs)
        self.mark(visit, fetches=False, forward=True)
        return self._leave(out, visit)

    def _runs(self, x: Tensor | None, forward: Callable[[Any], Any]) -> Any:
        return self._run(self.nameless(), forward, (x,), {})

    def nameless(self) -> Visit:
        """A module without weights that nobody keeps."""
        visit = self._nameless.get(self._running)
        if visit is None:
            model, adapted = self._running
            visit = Visit(Unit("nameless", []), "", [], model=model, adapted=adapted)
            self._nameless[self._running] = visit
        return visit

    def run(self, model: int = 0, *, adapted: bool = True) -> None:
        """Modules of this model run from now on."""
        self._running = (model, adapted)

    def begin(self, visit: Visit) -> None:
        """A forward of the whole model starts (``_start_of_forward_hook``)."""
        storage = self.tape.allocate(NOTHING, "mark")
        self.marks[storage.index] = Mark(visit, True, True, not self._running[1], begins=True)

    def mark(self, visit: Visit, *, fetches: bool, forward: bool) -> None:
        """A storage without bytes that comes and goes: what moves events moves it too."""
        visit.called = True
        outer = visit.around
        if outer is not None and fetches and outer.first.setdefault(forward, visit) is visit:
            self.mark(outer, fetches=True, forward=forward)
        storage = self.tape.allocate(NOTHING, "mark")
        again = forward and not self._running[1]
        self.marks[storage.index] = Mark(visit, fetches, forward, again)

    def _viewed(self, parameter: Parameter) -> Storage:
        storage = self.tape.allocate(NOTHING, "view")
        if id(parameter) in self._unit_of:
            unit, model = self._unit_of[id(parameter)]
            self.marks[storage.index] = View(unit, parameter, model)
        return storage

    def _enter(self, x: Any, visit: Visit) -> Any:
        """``PostBackwardFunctionModule``: the module has ended with its last input's gradient."""
        if isinstance(x, Routing):
            return Routing(x.logits, self._enter(x.weights, visit), x.index)
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        visit.remaining += 1

        def ended() -> None:
            if self.ends(visit):
                self.mark(visit, fetches=False, forward=False)

        return _seen(x, "post_backward", ended)

    def _leave(self, out: Any, visit: Visit) -> Any:
        """``PreBackwardFunctionForModule``: it starts with the gradient of an output."""
        if isinstance(out, (list, tuple)):
            return type(out)(self._leave(item, visit) for item in out)
        if isinstance(out, Routing):
            parts = (self._leave(part, visit) for part in (out.logits, out.weights, out.index))
            return Routing(*parts)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return out
        return _seen(out, "pre_backward", lambda: self.mark(visit, fetches=True, forward=False))


def _is_list(module: Module) -> bool:
    """``ModuleList`` or ``ModuleDict``, which nobody calls."""
    return all(name.isdigit() or name == "default" for name in module.children)


def _restore(module: Module, own: Callable[..., Any] | None) -> None:
    vars(module).pop("forward", None)
    if own is not None:
        module.forward = own


def _seen(x: Tensor, name: str, note: Callable[[], None]) -> Tensor:
    """The same tensor, whose gradient is noted when it comes by."""
    seen = x.alias()
    seen.part = x.part

    def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
        note()
        return (grad,)

    ops.record([seen], name, [x], apply)
    return seen
