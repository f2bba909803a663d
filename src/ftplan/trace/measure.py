"""A job for a few steps on the GPU here: random weights from the config, nothing downloaded.

What is read, per job: the allocator's peaks over the steps after the first (which makes the
optimizer's states), what the driver says is in use on the card (by everyone), the host's peak, the
time of a step.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftplan.errors import FtplanError, InputError, Location, UnsupportedError

__all__ = ["measure_job", "measure_plan", "measure_suite", "require_gpu"]

Reading = dict[str, Any]
Progress = Callable[[str], None]


def require_gpu() -> None:
    """Raise FtplanError, saying what to do instead, unless PyTorch sees a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise FtplanError(
            "there is no CUDA device here to measure on",
            remedy="run it where there is a GPU, or use `ftplan trace`, which needs none",
        )


def measure_job(job: Any, *, steps: int = 4, progress: Progress | None = None) -> Reading:
    """Measure a job as :func:`ftplan.front.jobs.read_job` returns it."""
    from ftplan.front.api import job_mapping
    from ftplan.front.resolve import resolve

    resolved = resolve(job.plan, base=job.base)
    if resolved.config is None:
        raise UnsupportedError(
            "measuring a bare parameter count", remedy="give --model NAME or --config PATH"
        )
    reading = measure_plan(resolved.plan, dict(resolved.config), steps=steps, progress=progress)
    return {"plan": job_mapping(resolved.plan), **reading}


def measure_plan(
    plan: Any,
    config: dict[str, Any],
    *,
    layers: int | None = None,
    steps: int = 4,
    progress: Progress | None = None,
) -> Reading:
    """Run a resolved plan on CUDA device 0. An out-of-memory run is a reading too."""
    import torch

    from ftplan.trace import build, core
    from ftplan.trace.job import resolve as resolve_job

    require_gpu()
    say = progress or (lambda text: None)
    job = resolve_job(plan)
    if job.world > 1:
        raise UnsupportedError(
            "measuring on several GPUs", remedy="set hardware: {count: 1}; trace shards instead"
        )
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    reading: Reading = {"layers": layers, "steps": steps, "oom": False}
    model = optimizer = None
    try:
        say("building the model on the GPU")
        model, optimizer = _built(job, build, build.model_config(config, layers), device)
        reading["loaded_bytes"] = torch.cuda.memory_allocated(device)
        reading |= _steps(job, model, optimizer, device, steps, say, core)
    except torch.cuda.OutOfMemoryError as error:
        reading |= {"oom": True, "message": str(error).splitlines()[0]}
        reading["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        reading["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    finally:
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    return {**reading, "where": _where(device), "versions": core.versions()}


def _built(job: Any, build: Any, config: Any, device: Any) -> tuple[Any, Any]:
    import torch

    if job.attention == "flash":
        attention = "flash_attention_2"
    else:
        attention = build.attention_of(job, config)
    kind = build.auto_class(config, job.task)
    dtype = getattr(torch, job.compute_dtype if job.quantized else job.weights)
    with torch.device("cpu" if job.quantized else device):
        model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    if job.quantized:
        from ftplan.trace.quantized import quantize_for_real

        quantize_for_real(model, job, device)
    model.to(device)
    model = build.adapt(model, job, quantized_already=True)
    build.train_in_fp32(job, model)
    model.to(device)
    model.train()
    build.checkpoint(job, model)
    return model, build.build_optimizer(job, model, real=True)


def _steps(
    job: Any, model: Any, optimizer: Any, device: Any, steps: int, say: Progress, core: Any
) -> Reading:
    import torch

    from ftplan.trace.losses import loss_of

    if job.task == "dpo" and not hasattr(model, "disable_adapter"):
        raise UnsupportedError("measuring a preference job with a second model")
    forward = loss_of(job, model, _forward(job, model), None)
    # the scaler touches memory only by a few scalars, but without it fp16 steps are skipped
    scaler = torch.amp.GradScaler("cuda", enabled=job.mixed == "float16")
    trained = [p for p in model.parameters() if p.requires_grad]
    times: list[float] = []
    phases: dict[str, int] = {}
    torch.cuda.reset_peak_memory_stats(device)
    overall = {"allocated": 0, "reserved": 0}

    def lap(name: str, counts: bool) -> None:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        overall["reserved"] = max(overall["reserved"], torch.cuda.max_memory_reserved(device))
        if counts:
            phases[name] = max(phases.get(name, 0), peak)
            overall["allocated"] = max(overall["allocated"], peak)
        torch.cuda.reset_peak_memory_stats(device)

    for step in range(steps):
        say(f"step {step + 1} of {steps}")
        counts = step > 0
        begun = time.perf_counter()
        for _ in range(job.accumulation):
            batch = core.batch_of(job, device, vocabulary=_vocabulary(model))
            outputs = forward(**batch)
            loss = outputs["loss"]
            if job.stack != "pytorch":
                del outputs, batch
            if job.accumulation > 1:
                loss = loss / job.accumulation
            lap("forward", counts)
            scaler.scale(loss).backward()
            loss = loss.detach()
            lap("backward", counts)
            outputs = batch = None
        if job.stack != "pytorch":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        lap("step", counts)
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    free, total = torch.cuda.mem_get_info(device)
    later = sorted(times[1:])
    return {
        "allocated_bytes": overall["allocated"],
        "reserved_bytes": overall["reserved"],
        "device_bytes": total - free,
        "host_bytes": _host_peak_bytes(),
        "peak_phase": max(phases, key=lambda name: phases[name]),
        "phases": phases,
        "step_seconds": later[len(later) // 2],
        "trainable_params": sum(p.numel() for p in trained),
    }


def _forward(job: Any, model: Any) -> Callable[..., Any]:
    import torch

    if job.mixed == "no":
        return model  # type: ignore[no-any-return]
    dtype = getattr(torch, job.mixed)

    def autocast_forward(**batch: Any) -> Any:
        with torch.autocast("cuda", dtype=dtype):
            return model(**batch)

    if job.stack == "pytorch":
        return autocast_forward
    from accelerate.utils import convert_outputs_to_fp32

    return convert_outputs_to_fp32(autocast_forward)  # type: ignore[no-any-return]


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _host_peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _where(device: Any) -> dict[str, Any]:
    import platform

    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def measure_suite(
    suite: Path, readings: Path, *, steps: int = 4, progress: Progress | None = None
) -> int:
    """Measure every job of a suite file and append a line per job; returns how many.

    The file is a list under ``jobs``; each is ``{name: ..., plan: {...}, layers: N or left out}``.
    A job that is refused is a line with its error, and the next one is run.
    """
    import yaml

    from ftplan.front.resolve import resolve
    from ftplan.trace.job import plan_from

    try:
        document = yaml.safe_load(suite.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(
            f"cannot read the suite: {error}", location=Location(file=str(suite))
        ) from error
    jobs = document.get("jobs") if isinstance(document, dict) else None
    if not isinstance(jobs, list) or not jobs:
        raise InputError(
            "the suite lists no jobs",
            location=Location(file=str(suite)),
            remedy="write jobs: [{name: ..., plan: {model: ..., method: {...}}}]",
        )
    readings.parent.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda text: None)
    for number, job in enumerate(jobs, start=1):
        name = str(job.get("name", number))
        say(f"[{number}/{len(jobs)}] {name}")
        line: Reading = {"name": name, "plan": job.get("plan")}
        try:
            resolved = resolve(plan_from(job["plan"]), base=suite.parent)
            if resolved.config is None:
                raise UnsupportedError("measuring a bare parameter count")
            line |= measure_plan(
                resolved.plan, dict(resolved.config), layers=job.get("layers"), steps=steps,
                progress=progress,
            )  # fmt: skip
        except Exception as error:
            # whatever one job does, the others are still worth a reading
            line["error"] = f"{type(error).__name__}: {error}"
            say(f"  refused: {error}")
        with readings.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")
    return len(jobs)
