"""Run a job for two steps on fake tensors and say what was allocated: ground truth, no GPU.

Use it as a library::

    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from
    result = trace(plan_from({"model": "x", "method": {"kind": "lora", "targets": ["q_proj"]},
                              "batch": {"micro": 2, "seq_len": 2048}}), config, layers=4)
    result.allocated_bytes          # the peak of the second step
    result.peak_phase               # forward | backward | step
    result.phases                   # {phase: peak bytes}
    result.at_peak()                # {group: bytes} alive at that moment
    result.saved("layers.1.")       # storages alive at the end of forward, born in that module
    result.alive()                  # storages alive at the peak, largest first

or from a shell (``--help`` says more)::

    python -m ftplan.trace plan.yaml --config config.json --layers 4 --saved layers.1 --alive

``config`` is the mapping of a Hugging Face ``config.json``; ``layers`` cuts its depth.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import field, replace
from functools import partial
from typing import Any

import torch

from ftplan.dataclass import dataclass
from ftplan.spec import Plan
from ftplan.trace import build, cuda
from ftplan.trace.experts import spread_experts
from ftplan.trace.images import Unmultiplied, image_batch
from ftplan.trace.job import Job, resolve
from ftplan.trace.ledger import Entry, Ledger
from ftplan.trace.losses import loss_of
from ftplan.trace.native import OWN, Loop, loop_of
from ftplan.trace.optimizers import host_scalars, make_optimizer
from ftplan.trace.quantized import emulated
from ftplan.trace.shard import distributed, local, shard, split

__all__ = ["TraceResult", "batch_of", "trace", "trace_job", "versions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """What a traced job allocated, in bytes; the second step is the one that counts."""

    allocated_bytes: int
    peak_phase: str
    phases: dict[str, int]
    """Peak bytes of each phase of the second step."""
    total_params: int
    """Parameters of the base model; adapters are not in it."""
    trainable_params: int
    versions: dict[str, str]
    entries: list[Entry] = field(repr=False)
    peak_clock: int
    forward_end_clock: int
    curve: list[tuple[int, int]] = field(repr=False)
    """(clock, live bytes) of the whole run."""
    marks: list[tuple[int, int, str]] = field(repr=False)
    """(clock, step, phase) at each change of phase."""

    def _at(self, clock: int) -> list[Entry]:
        return [
            entry
            for entry in self.entries
            if entry.birth <= clock and (entry.death is None or entry.death > clock) and entry.bytes
        ]

    def group_of(self, entry: Entry) -> str:
        """The term a storage belongs to, at the peak."""
        if entry.kind:
            return entry.kind
        if entry.phase == "load":
            return "weights/frozen"  # scales of quantised weights are no parameters
        if entry.phase == "forward":
            return "activations" if entry.death is None or self._survives(entry) else "temporary"
        return "recompute" if entry.recompute else "temporary"

    def _survives(self, entry: Entry) -> bool:
        ends = [
            self.marks[i + 1][0]
            for i in range(len(self.marks) - 1)
            if self.marks[i][2] == "forward" and self.marks[i][0] <= entry.birth
        ]
        return bool(ends) and (entry.death is None or entry.death > ends[-1])

    def at_peak(self) -> dict[str, int]:
        """Bytes alive at the peak by group; they add up to ``allocated_bytes``."""
        groups: dict[str, int] = {}
        for entry in self._at(self.peak_clock):
            group = self.group_of(entry)
            groups[group] = groups.get(group, 0) + entry.bytes
        return dict(sorted(groups.items(), key=lambda item: -item[1]))

    def alive(self) -> list[Entry]:
        """Every storage alive at the peak, largest first."""
        return sorted(self._at(self.peak_clock), key=lambda entry: -entry.bytes)

    def saved(self, module: str = "") -> list[Entry]:
        """Storages born in the second step's forward and alive at its end, in order of birth.

        ``module`` keeps those whose module path contains it.
        """
        return [
            entry
            for entry in self._at(self.forward_end_clock)
            if entry.step == 2
            and entry.phase == "forward"
            and entry.kind != "inputs"
            and module in entry.module + "."
        ]


def trace(
    plan: Plan,
    config: dict[str, Any],
    *,
    layers: int | None = None,
    full: bool = False,
    progress: Callable[[str], None] | None = None,
) -> TraceResult:
    """Trace one job. Raises UnsupportedError for what cannot be run on fake tensors.

    ``layers`` cuts the model's depth. ``full`` runs the first step too, instead of giving the
    optimizer its states: the same peak in twice the time.
    """
    job = resolve(plan)
    ranks = sorted({0, 1, job.world - 1}) if job.sharding in ("zero1", "zero2") else [0]
    results = [
        trace_job(
            replace(job, traced_rank=rank), config, layers=layers, full=full, progress=progress
        )
        for rank in ranks
    ]
    return max(results, key=lambda result: result.allocated_bytes)


def trace_job(
    job: Job,
    config: dict[str, Any],
    *,
    layers: int | None = None,
    full: bool = False,
    progress: Callable[[str], None] | None = None,
    around: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
) -> TraceResult:
    """:func:`trace` of a resolved job; ``around`` of the model encloses the steps (a witness)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    say = progress or (lambda text: None)
    torch.set_num_threads(1)
    ledger = Ledger()
    gc.freeze()  # what is loaded already need not be searched at every phase
    with _quiet(), contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        stack.callback(_forget_autocast)
        ledger.sharded = job.sharding == "fsdp" or max(job.tp, job.ep) > 1
        mesh = stack.enter_context(distributed(job, ledger))
        say("building the model")
        loop = loop_of(job, config, layers)
        if loop is not None:
            model, reference = loop.model, None
        else:
            model = build.build_model(job, build.model_config(config, layers))
            reference = _reference(job, config, layers)
        # images ask for values: such a job runs on real tensors
        mode = Unmultiplied() if job.images else FakeTensorMode(allow_non_fake_inputs=True)
        with mode, ledger:
            build.materialize(model)
            if reference is not None:
                build.materialize(reference)
            total = _count(model)
            padded = job.padding != "none"
            ring = mesh.ring.get_group() if job.cp > 1 else None
            with (
                cuda.as_on_cuda(ledger, job.capability, padded=padded, ring=ring),
                emulated(job, ledger),
            ):
                if job.images:
                    ledger.scalar_answer = None  # these tensors know
                with (
                    cuda.patched(torch.nn.Module, "_apply", build.apply_to_tensors),
                    cuda.patched(torch.Tensor, "__deepcopy__", build.copy_tensor),
                ):
                    if loop is not None:
                        loop.prepare(ledger)
                    else:
                        if job.ep > 1:  # as the model is loaded
                            model = spread_experts(model, job, mesh)
                        if job.tp > 1:
                            model = split(model, job, mesh)
                        model = build.adapt(model, job)
                        build.train_in_fp32(job, model)
                if loop is None:
                    build.checkpoint(job, model)
                trainable = _count(model, trained=True)
                if loop is not None:
                    trainable = sum(p.numel() for p in loop.optimised())
                if loop is not None and mesh is not None:
                    model = loop.shard(mesh)
                else:
                    model = shard(model, job, mesh)
                if reference is not None and job.sharding == "fsdp":
                    reference = shard(reference, job, mesh)
                gc.collect()
                if job.sharding.startswith("zero"):
                    from ftplan.trace.zero import run_steps

                    forward_end = run_steps(job, model, ledger, partial(_mark_model, ledger))
                    return _result(model, ledger, forward_end, total, trainable)
                _mark_model(ledger, model, offloaded=job.offload == "params")
                with around(model) if around else contextlib.nullcontext():
                    forward_end, whole = _run(job, model, reference, loop, ledger, say, full, mesh)
    if not whole and around is None:
        # a weight that no gradient reaches (a tower without images) has no optimizer states
        return trace_job(job, config, layers=layers, full=True, progress=progress)
    result = _result(model, ledger, forward_end, total, trainable)
    return replace(result, versions=loop.versions()) if loop is not None else result


def _reference(job: Job, config: dict[str, Any], layers: int | None) -> Any:
    """The second model of a preference job that has no adapter to switch off.

    TRL and axolotl leave its weights asking for gradients, of which autocast keeps the casts.
    """
    kind = job.reference
    if kind == "none":
        kind = "model" if job.method in ("full", "partial", "bitfit") else "adapter"
    if job.task not in ("dpo", "kto") or kind != "model":
        return None
    model = build.build_model(job, build.model_config(config, layers))
    return model.requires_grad_(job.stack in ("trl", "axolotl")).eval()


def _forget_autocast() -> None:
    """Leave no cast weights behind: a job that failed while recomputing never left autocast."""
    for _ in range(torch.autocast_increment_nesting()):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn about what a trace does on purpose."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)


def _mark_model(ledger: Ledger, model: Any, *, offloaded: bool = False) -> None:
    ledger.mark(model.buffers(), "buffers")
    ledger.mark(model.__dict__.get("_ddp_buckets", ()), "buckets")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            kind = "weights/frozen"
        elif any(part in name for part in ("lora_", "ia3_", "vera_", "hada_", "lokr_", "oft_")):
            kind = "adapters"
        else:
            kind = "weights/trainable"
        ledger.mark([local(parameter)], kind)
        entry = ledger.entry_of(local(parameter))
        if entry is not None:
            entry.module = name
            if offloaded:
                ledger.forget(local(parameter))


def _run(
    job: Job,
    model: Any,
    reference: Any,
    loop: Loop | None,
    ledger: Ledger,
    say: Callable[[str], None],
    full: bool,
    mesh: Any,
) -> tuple[int, bool]:
    """Two steps: the clock at the end of the second one's (last) forward, and whether its
    optimizer had the states that a first step would have made."""
    if loop is not None:
        optimizer = make_optimizer(job, loop.optimised(), model)
    else:
        optimizer = build.build_optimizer(job, model)
    for parameter in model.parameters():
        if parameter.requires_grad and local(parameter) is parameter:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.mark([p.grad], "gradients")
            )
    ledger.watch_modules(model)
    forward: Callable[..., Any]
    if loop is not None:
        forward, full = loop.forward, True
    else:
        forward = loss_of(job, model, _forward_of(job, model), reference)
    if job.cp > 1:
        forward = _on_a_part(forward, mesh.ring)
    gc.freeze()
    reached: set[int] = set()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: reached.add(id(p)))
    full = full or ledger.sharded
    if full:
        _one_step(job, model, optimizer, forward, ledger, say, 1)
    else:
        _prime(job, model, optimizer, ledger)
    end = _one_step(job, model, optimizer, forward, ledger, say, 2)
    evaluate(job, model, forward, ledger)
    return end, full or len(reached) == len({id(p) for p in trained})


def _prime(job: Job, model: Any, optimizer: Any, ledger: Ledger) -> None:
    """The first step's lasting effect, the optimizer's states, without its forward."""
    ledger.enter("step", 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    _update(job, model, optimizer, ledger)
    ledger.enter("zero_grad", 1)
    optimizer.zero_grad(set_to_none=True)


def _one_step(
    job: Job,
    model: Any,
    optimizer: Any,
    forward: Callable[..., Any],
    ledger: Ledger,
    say: Callable[[str], None],
    step: int,
) -> int:
    forward_end = 0
    ahead = 1 if job.stack == "pytorch" else job.accumulation
    fetched = [_fetched(job, model, ledger) for _ in range(ahead)]
    # with accumulation the second micro batch meets the gradients of the first; more add nothing
    batches = min(job.accumulation, 2)
    for number in range(batches):
        if job.no_sync:
            _sync(job, model, last=number == batches - 1)
        say(f"step {step}: forward")
        gc.collect()
        ledger.enter("forward", step)
        batch = fetched[number] if number < ahead else _fetched(job, model, ledger)
        outputs = forward(**batch)
        loss = outputs["loss"]
        if job.stack != "pytorch":
            outputs = None
        if job.accumulation > 1:
            loss = loss / job.accumulation
        forward_end = ledger.clock - 1
        say(f"step {step}: backward")
        ledger.enter("backward", step)
        _backward(loss)
        loss = loss.detach()
        outputs = None
    say(f"step {step}: optimizer")
    gc.collect()
    ledger.enter("step", step)
    with ledger.on_host() if job.offload == "params" else contextlib.nullcontext():
        _update(job, model, optimizer, ledger)
    ledger.enter("zero_grad", step)
    optimizer.zero_grad(set_to_none=True)
    ledger.enter("end", step + 1)
    return forward_end


EVALUATED = 3
"""Batches of an evaluation: what one leaves behind the next one meets."""


def evaluate(job: Job, model: Any, forward: Callable[..., Any], ledger: Ledger) -> None:
    """The evaluation between two steps, of which the caller keeps the losses alone."""
    if not job.eval_micro:
        return
    ledger.enter("evaluation", 2)
    model.eval()
    losses = []
    for _ in range(EVALUATED):
        batch = batch_of(replace(job, micro=job.eval_micro))
        ledger.mark([t for t in batch.values() if t is not None], "inputs")
        with torch.no_grad():
            losses.append(forward(**batch)["loss"])
    model.train()
    ledger.enter("end", 3)


def _sync(job: Job, model: Any, *, last: bool) -> None:
    """Reduce gradients with the last micro batch alone."""
    if job.fsdp_version == 2:
        model.set_requires_gradient_sync(last)
        return
    for unit in type(model).fsdp_modules(model):  # FSDP1's no_sync
        unit._sync_gradients = last


def _fetched(job: Job, model: Any, ledger: Ledger) -> dict[str, Any]:
    """A micro batch on the device, where the loop holds it until the step has ended."""
    batch = batch_of(job)
    if job.images:
        dtype = model.dtype if job.mixed == "no" else torch.float32
        ids = batch["input_ids"]
        batch |= image_batch(model.config, ids, job.images, job.image_size, dtype)
    ledger.mark([t for t in batch.values() if t is not None], "inputs")
    return batch


def _backward(loss: Any) -> None:
    """``loss.backward()`` by way of the engine.

    The method is a torch function: the function mode that knows CUDA's autocast would be off in
    it, and with it while checkpointed blocks are recomputed.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
        accumulate_grad=True,
    )  # fmt: skip


def _update(job: Job, model: Any, optimizer: Any, ledger: Ledger) -> None:
    ledger.mark((local(p.grad) for p in model.parameters() if p.grad is not None), "gradients")
    clips = job.stack != "pytorch" and job.stack not in OWN
    if clips and max(job.tp, job.ep) == 1:  # else its norm mixes meshes, and other tensors
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    ledger.mark((local(t) for t in _state_tensors(optimizer)), "optimizer")
    for scalar in host_scalars(job, optimizer):
        ledger.forget(scalar)


def _state_tensors(optimizer: Any) -> Iterator[Any]:
    stack: list[Any] = list(optimizer.state.values())
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)


def _forward_of(job: Job, model: Any) -> Callable[..., Any]:
    """The model's forward as the stack calls it: autocast around it, outputs cast to fp32."""
    if job.mixed == "no" or (job.sharding == "fsdp" and job.fsdp_version == 2):
        # accelerate hands FSDP2 a mixed-precision policy and does not autocast
        return model  # type: ignore[no-any-return]
    dtype = getattr(torch, job.mixed)

    def autocast_forward(**batch: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(**batch)

    if job.stack == "pytorch":
        return autocast_forward
    from accelerate.utils import convert_outputs_to_fp32

    return convert_outputs_to_fp32(autocast_forward)  # type: ignore[no-any-return]


def _on_a_part(forward: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """The model's forward on the rank's part of a sequence."""
    from ftplan.trace.ring import split_batch

    return lambda **batch: forward(**split_batch(batch, mesh))


def batch_of(job: Job, device: Any = "cpu", vocabulary: int = 1) -> dict[str, Any]:
    """Token ids and labels, and a mask where the plan pads; int64, shape (micro, seq_len)."""
    # a preference batch is chosen and rejected together
    pairs = job.task in ("dpo", "orpo", "rm")
    shape = (2 * job.micro if pairs else job.micro, job.seq_len)
    ids = torch.randint(0, vocabulary, shape, device=device)
    labels = ids.clone()
    if job.task == "classify":
        labels = torch.zeros(job.micro, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "labels": labels}
    if job.padding != "none":
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=device)
        if device != "cpu":
            batch["attention_mask"][0, -1] = 0  # one padded token is enough for a mask
    return batch


def _result(
    model: Any, ledger: Ledger, forward_end: int, total: int, trainable: int
) -> TraceResult:
    marks = ledger.marks
    second = next(clock for clock, step, _ in marks if step == 2)
    curve = ledger.curve()
    phases: dict[str, int] = {}
    peak, peak_clock = 0, 0
    where = ""
    index = 0
    before = 0
    for clock, live in curve:
        while index < len(marks) and marks[index][0] <= clock:
            index += 1
            _, step, phase = marks[index - 1]
            if step == 2:
                phases[phase] = max(phases.get(phase, 0), before)
        before = live
        if clock < second or index == 0:
            continue
        phase = marks[index - 1][2]
        if phase in ("zero_grad", "end"):
            continue
        phases[phase] = max(phases.get(phase, 0), live)
        if live > peak:
            peak, peak_clock, where = live, clock, phase
    named = ("rollout", "scoring", "forward", "backward", "step", "evaluation")
    phases = {name: phases[name] for name in named if name in phases}
    return TraceResult(
        allocated_bytes=peak,
        peak_phase=where,
        phases=phases,
        total_params=total,
        trainable_params=trainable,
        versions=versions(),
        entries=ledger.entries,
        peak_clock=peak_clock,
        forward_end_clock=forward_end,
        curve=curve,
        marks=marks,
    )


def _count(model: Any, trained: bool = False) -> int:
    """Parameters of the model, each tied one once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def versions() -> dict[str, str]:
    """Versions of what was run."""
    import accelerate
    import peft
    import transformers

    more = {}
    if "deepspeed" in sys.modules:
        more["deepspeed"] = sys.modules["deepspeed"].__version__
    return {
        "torch": str(torch.__version__).partition("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        **more,
    }
