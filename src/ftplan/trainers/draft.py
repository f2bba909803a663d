"""A plan in the making: what a file said, what the trainer's own defaults add, what is missing.

Each reader fills a :class:`Draft`; :meth:`Draft.finish` completes it from the stack's profile,
names what the file does not say and what we do not model, and returns :class:`Imported`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ftplan.catalog.shelf import read_data
from ftplan.catalog.stacks import Stack, find_stack
from ftplan.dataclass import dataclass
from ftplan.errors import Location
from ftplan.report import Assumption, Finding, Severity
from ftplan.spec import (
    Batch,
    Budget,
    Checkpointing,
    Hardware,
    Loss,
    Method,
    Model,
    OptimizerChoice,
    Plan,
    Precision,
    Rollout,
    Sharding,
)
from ftplan.trainers.keys import Keys, Path
from ftplan.trainers.severity import SEVERITY

__all__ = ["NEUTRAL", "Draft", "Imported", "key_data", "key_lists"]

_SECTIONS: dict[str, type] = {
    "model": Model,
    "method": Method,
    "precision": Precision,
    "batch": Batch,
    "optimizer": OptimizerChoice,
    "gradient_checkpointing": Checkpointing,
    "loss": Loss,
    "hardware": Hardware,
    "sharding": Sharding,
    "rollout": Rollout,
    "budget": Budget,
}
_ALWAYS = {"model", "precision", "batch", "hardware", "sharding", "budget"}
_ADAPTERS = {"lora", "qlora", "dora"}
NEUTRAL = "neutral"
_OFF = (None, False, 0, 0.0, "", "none", "None", "no", "false", "False", "null", -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A trainer's configuration, understood."""

    plan: Plan
    """The job. What the file does not say is None, and a finding names the flag for it."""
    trainer: str
    """The reader that understood the file (`axolotl`)."""
    findings: tuple[Finding, ...]
    """What is missing, not modelled, wasteful or contradictory, at its place in the file."""
    assumptions: tuple[Assumption, ...]
    """The trainer's own defaults that were filled in, and where each was read."""
    places: Mapping[str, Location]
    """Plan key (`batch.micro`) to where the file says it."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Plan keys that the file leaves open."""
        return tuple(_flag_key(f.help) for f in self.findings if f.code == "IMP001")


def _flag_key(text: str) -> str:
    return next((key for key, (_, flag) in _FACTS.items() if flag in text), "")


_FACTS = {
    "model.name": ("which model is trained", "--model NAME"),
    "batch.micro": ("the micro batch", "--micro-batch N"),
    "batch.seq_len": ("the sequence length", "--seq-len N"),
    "method.kind": ("how the model is trained", "--method KIND"),
    "hardware.gpu": ("the GPU", "--gpu NAME"),
    "hardware.count": ("the number of GPUs", "--gpus N"),
}


class Draft:
    """Collects a plan key by key (``put("batch.micro", 2, at)``), with findings beside it."""

    def __init__(self, *, trainer: str, stack: str) -> None:
        self.trainer = trainer
        self.stack: Stack = find_stack(stack)
        self.values: dict[str, Any] = {}
        self.places: dict[str, Location] = {}
        self.findings: list[Finding] = []
        self.assumptions: list[Assumption] = []
        self._seen: list[Keys] = []
        self._asked: dict[str, str] = {}
        self.incomplete = False
        """The file that says most of the job could not be read: no default is filled in."""

    # --- what the file says ------------------------------------------------------------------

    def keys(self, keys: Keys) -> Keys:
        """Register a configuration so that its unread keys are accounted for."""
        self._seen.append(keys)
        return keys

    def put(self, key: str, value: Any, at: Location | None = None) -> None:
        """Set a plan key from the file; None changes nothing."""
        if value is None:
            return
        self.values[key] = value
        if at is not None:
            self.places[key] = at

    def drop(self, key: str) -> None:
        """Forget a plan key."""
        self.values.pop(key, None)
        self.places.pop(key, None)

    def retract(self, key: str) -> None:
        """Forget a plan key and the assumption that set it."""
        self.drop(key)
        self.assumptions = [one for one in self.assumptions if one.key != key]

    def get(self, key: str) -> Any:
        """The value put so far, or None."""
        return self.values.get(key)

    def assume(self, key: str, value: Any, source: str) -> None:
        """Set a plan key from the trainer's default, unless the file said it."""
        if key in self.values or value is None:
            return
        self.values[key] = value
        self.assumptions.append(Assumption(key=key, value=value, source=source))

    def find(
        self,
        code: str,
        message: str,
        at: Location | None = None,
        *,
        help: str = "",
        severity: Severity | None = None,
    ) -> None:
        """Add a finding; its severity is the code's own unless given."""
        level = severity or SEVERITY.get(code, "warning")
        self.findings.append(
            Finding(code=code, severity=level, message=message, location=at, help=help)
        )

    def not_modelled(self, keys: Keys, path: Path, why: str) -> None:
        """IMP002: a key that moves memory in a way we do not compute."""
        name = ".".join(str(step) for step in path)
        self.find("IMP002", f"{name} is not modelled: {why}", keys.at(*path))

    def ask(self, key: str, because: str) -> None:
        """Say why a fact is missing, for the IMP001 finding that names its flag."""
        self._asked[key] = because

    # --- the end ------------------------------------------------------------------------------

    def finish(self, keys: Keys, *, lint: Callable[[Plan, Draft], None]) -> Imported:
        """The plan, completed by the stack's profile and checked."""
        if self.incomplete:
            self._only_given(keys)
        else:
            self._profile()
        self._missing(keys)
        plan = self.plan()
        for one in self._seen:
            self._unread(one)
        lint(plan, self)
        order = {"error": 0, "warning": 1, "info": 2}
        found = sorted(self.findings, key=lambda f: (order[f.severity], f.code))
        return Imported(
            plan=plan,
            trainer=self.trainer,
            findings=tuple(dict.fromkeys(found)),
            assumptions=tuple(self.assumptions),
            places=dict(self.places),
        )

    def plan(self) -> Plan:
        """What has been put so far as a plan."""
        parts: dict[str, Any] = {}
        sections: dict[str, dict[str, Any]] = {name: {} for name in _ALWAYS}
        for key, value in self.values.items():
            head, _, tail = key.partition(".")
            if tail:
                sections.setdefault(head, {})[tail] = value
            else:
                parts[head] = value
        for name, given in sections.items():
            parts[name] = _SECTIONS[name](**given)
        return Plan(stack=self.stack.name, **parts)

    def _only_given(self, keys: Keys) -> None:
        """Keep what stands in the file itself: a default may be overruled in the missing one."""
        root = keys.at()
        given = {key for key, place in self.places.items() if place != root}
        self.values = {key: value for key, value in self.values.items() if key in given}
        self.assumptions = []
        for section, needed in (("method.", "method.kind"), ("optimizer.", "optimizer.name")):
            if needed not in self.values:
                for key in [key for key in self.values if key.startswith(section)]:
                    del self.values[key]
        self.findings = [one for one in self.findings if one.code[:3] == "IMP"]

    def _profile(self) -> None:
        """Fill from the stack's profile what the file leaves to the trainer."""
        stack = self.stack
        source = stack.sources
        method = self.get("method.kind")
        task = self.get("task") or "sft"
        if method in _ADAPTERS:
            quantised = method == "qlora"
            self.assume("method.rank", stack.rank, source["rank"])
            self.assume("method.targets", stack.targets, source["targets"])
            self.assume("method.dropout", stack.dropout, source["dropout"])
            key = "adapter_dtype_quantized" if quantised else "adapter_dtype"
            self.assume("method.adapter_dtype", getattr(stack, key), source[key])
            if quantised:
                self.assume("method.prepare_kbit", stack.prepare_kbit, source["prepare_kbit"])
                if self.get("precision.weights") in ("nf4", "fp4"):
                    self.assume("method.double_quant", stack.double_quant, source["double_quant"])
        self.assume("precision.mixed", stack.mixed, source["mixed"])
        if stack.weights_dtype != "checkpoint" and "precision.auto" not in self.values:
            self.assume("precision.weights", stack.weights_dtype, source["weights_dtype"])
        self.values.pop("precision.auto", None)
        self.assume("optimizer.name", stack.optimizer, source["optimizer"])
        if self.get("sharding.kind") == "fsdp" and self.get("sharding.version") != 1:
            for name in ("apart", "reshard_root"):
                self.assume(f"sharding.{name}", getattr(stack, name) or None, source.get(name, ""))
        sharded = (self.get("hardware.count") or 1) * (self.get("hardware.nodes") or 1) > 1
        key = (
            "checkpointing_sharded" if sharded and stack.checkpointing_sharded else "checkpointing"
        )
        self.assume("gradient_checkpointing.kind", getattr(stack, key), source[key])
        if self.get("gradient_checkpointing.kind") != "none":
            key = "gradient_checkpointing.reentrant"
            self.assume(key, stack.reenters(task), source["reentrant"])
        kind = stack.loss_kind(method=method, task=task)
        if task not in ("rm", "classify", "embed"):
            if "loss.kind" not in self.values and kind == "chunked":
                self.assume("loss.chunk", stack.loss_chunk, source["loss_chunk"])
            self.assume("loss.kind", kind, source["loss"])
        self.assume("attention", stack.attention, source["attention"])
        self.assume("kernels", stack.kernels, source["kernels"])
        self.assume("batch.packing", stack.packing, source["packing"])
        self.assume("batch.accumulation", 1, "no accumulation is asked for")

    def _missing(self, keys: Keys) -> None:
        for path, text in dict.fromkeys((p, t) for one in self._seen for p, t in one.unresolved):
            name = ".".join(str(step) for step in path)
            owner = next((one for one in self._seen if one.has(*path)), keys)
            self.find(
                "IMP006",
                f"{name} is {text!r}: only running the script would tell its value",
                owner.at(*path),
            )
        if not (self.get("model.name") or self.get("model.config") or self.get("model.params")):
            self._ask("model.name", keys, "warning")
        for key in ("batch.micro", "batch.seq_len"):
            if self.get(key) is None:
                self._ask(key, keys, "warning")
        if self.get("method.kind") is None:
            self._ask("method.kind", keys, "warning")
        if self.get("hardware.gpu") is None:
            self._ask("hardware.gpu", keys, "info")
        if self.get("hardware.count") is None:
            self._ask("hardware.count", keys, "info")

    def _ask(self, key: str, keys: Keys, severity: Severity) -> None:
        what, flag = _FACTS[key]
        because = self._asked.get(key, f"the file does not say {what}")
        where = self.places.pop(key + "?", None) or keys.at()
        self.find("IMP001", because, where, help=f"pass {flag}", severity=severity)

    def _unread(self, keys: Keys) -> None:
        """Keys that no reader asked for: neutral ones are silent, the rest is named."""
        neutral, relevant = key_lists(self.trainer)
        unknown: list[Path] = []
        moving: list[tuple[Path, str]] = []
        for path, value in keys.unread():
            name = ".".join(str(step) for step in path)
            moves, why = _verdict(name, neutral, relevant)
            if moves is None and value is not None:
                unknown.append(path)
            elif moves and value not in _OFF and value != []:
                moving.append((path, why))
        for reason in dict.fromkeys(reason for _, reason in moving):
            same = [path for path, other in moving if other == reason]
            names = ", ".join(".".join(str(step) for step in path) for path in same)
            self.find(
                "IMP002", f"{names}: not modelled ({reason})", keys.at(*same[0]), severity="info"
            )
        if unknown:
            names = ", ".join(dict.fromkeys(".".join(map(str, path)) for path in unknown[:8]))
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            self.find(
                "IMP003",
                f"keys that ftplan does not know: {names}{more}; nothing was taken from them",
                keys.at(*unknown[0]),
            )


@cache
def key_data() -> dict[str, Any]:
    """The key lists of all trainers, as in ``data/keys.json``."""
    data: dict[str, Any] = read_data("keys.json", "ftplan.trainers")
    return data


@cache
def key_lists(trainer: str) -> tuple[dict[str, str], dict[str, str]]:
    """Patterns of keys that move no memory, and of keys that do but are not modelled (with the
    reason), for one trainer; shared lists included."""
    data = key_data()
    neutral: dict[str, str] = {}
    relevant: dict[str, str] = {}
    for name in [*data["uses"].get(trainer, []), trainer]:
        lists = data["trainers"].get(name, {})
        neutral |= dict.fromkeys(lists.get(NEUTRAL, []), "")
        relevant |= lists.get("not_modelled", {})
    return neutral, relevant


def _verdict(
    name: str, neutral: Mapping[str, str], relevant: Mapping[str, str]
) -> tuple[bool | None, str]:
    """Whether a key moves memory (None: it is in no list), and how. The longest pattern wins."""
    best: tuple[int, bool, str] | None = None
    for moves, patterns in ((True, relevant), (False, neutral)):
        for pattern, why in patterns.items():
            if pattern == name:
                rank = 10_000
            elif "*" in pattern and fnmatch.fnmatchcase(name, pattern):
                rank = len(pattern)
            else:
                continue
            if best is None or rank > best[0]:
                best = (rank, moves, why)
    return (None, "") if best is None else (best[1], best[2])
