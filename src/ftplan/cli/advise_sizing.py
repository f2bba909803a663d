"""The job that an advice leads to, sized: method by data and memory, what fits, a plan file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from ftplan.advice import Advice
from ftplan.dataclass import dataclass
from ftplan.failures import State
from ftplan.spec import Checkpointing, Hardware, Method, Model, Plan, Task

if TYPE_CHECKING:
    from ftplan.fitting import FitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """The job sized."""

    fit: FitReport
    plan_text: str
    """The plan file to start from."""


def size(answer: Advice, state: State, *, model: str, gpu: str) -> tuple[Advice, Sized]:
    """The answer with its method chosen by memory too, and what fits.

    Raises :class:`ftplan.errors.FtplanError` for a model or GPU that is not known.
    """
    import ftplan
    from ftplan.advise import choose_method
    from ftplan.files.plan import dump_plan

    method = answer.method
    assert method is not None
    task: Task = method.objective if method.objective in get_args(Task) else "sft"

    def plan(kind: str) -> Plan:
        return Plan(
            model=Model(name=model),
            task=task,
            method=Method(kind=kind),  # type: ignore[arg-type]
            gradient_checkpointing=Checkpointing(kind="full"),
            hardware=Hardware(gpu=gpu, count=1),
        )

    fits: dict[str, bool] = {
        kind: ftplan.estimate(plan(kind)).verdict in ("fits", "tight")
        for kind in dict.fromkeys((method.kind, "lora", "qlora"))
    }
    chosen = choose_method(answer.destination.step, state, fits=fits)
    assert chosen is not None
    wanted = plan(chosen.kind)
    notes = [f"From ftplan advise: {answer.destination.step}. {chosen.why}"]
    return replace(answer, method=chosen), Sized(
        fit=ftplan.fit(wanted), plan_text=dump_plan(wanted, notes=notes)
    )
