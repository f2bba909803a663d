"""DeepSpeed's real engine and ZeRO optimizers for one rank of many, on fake tensors.

DeepSpeed runs on its CPU accelerator over PyTorch's fake process group: collectives move nothing
and allocate what they would. What looks at values is told that nothing overflowed. Install
DeepSpeed without its compiled operations (``DS_BUILD_OPS=0``).
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftplan.errors import UnsupportedError
from ftplan.trace import build
from ftplan.trace.cuda import patched
from ftplan.trace.job import Job
from ftplan.trace.ledger import Ledger

__all__ = ["cast", "launched", "run_steps", "settings_of", "some_value"]


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UnsupportedError(
            "tracing ZeRO without DeepSpeed",
            remedy="DS_BUILD_OPS=0 pip install deepspeed (no GPU is needed)",
        ) from error
    return deepspeed


@contextlib.contextmanager
def _group(job: Job, rank: int) -> Iterator[None]:
    """A fake process group that DeepSpeed takes for its own."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    deepspeed = _deepspeed()
    where = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(job.world),
        "LOCAL_WORLD_SIZE": str(job.world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in where}
    os.environ.update(where)
    dist.init_process_group("fake", rank=rank, world_size=job.world, store=FakeStore())
    try:
        deepspeed.init_distributed(dist_backend="fake")
        yield
    finally:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        importlib.reload(deepspeed.utils.groups)  # it remembers every group it made
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """What DeepSpeed reads from tensors, where they have none."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2

    def no(*_args: Any, **_kwargs: Any) -> bool:
        return False

    def everybody_alike(gathered: list[Any], given: Any, **_kwargs: Any) -> None:
        gathered[:] = [given] * len(gathered)

    def address(_tensor: Any) -> int:
        return 0

    accelerator = type(get_accelerator())
    with (
        patched(torch.Tensor, "data_ptr", address),
        patched(torch.distributed, "all_gather_object", everybody_alike),
        patched(accelerator, "is_fp16_supported", lambda _self: True),
        patched(stage_1_and_2, "is_invalid_grad_norm", no),
        patched(stage3, "is_invalid_grad_norm", no),
        patched(stage3.DeepSpeedZeroOptimizer_Stage3, "has_overflow", no),
        patched(stage_1_and_2.DeepSpeedZeroOptimizer, "has_overflow", no),
        patched(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", no),
        patched(stage3, "assert_ints_same_as_other_ranks", no)
        if hasattr(stage3, "assert_ints_same_as_other_ranks")
        else contextlib.nullcontext(),
    ):
        yield


def settings_of(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration of a job."""
    dtype = {"bfloat16": "bf16", "float16": "fp16"}.get(_dtype(job))
    return {
        "train_micro_batch_size_per_gpu": job.micro,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": job.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        **({dtype: {"enabled": True}} if dtype else {}),
    }


@contextlib.contextmanager
def launched(job: Job, model: Any, ledger: Ledger) -> Iterator[None]:
    """One rank of many, as a launcher would have started it: DeepSpeed finds its process group,
    and accelerate, which asks for it with a trainer's arguments, finds DeepSpeed."""
    from accelerate.state import AcceleratorState
    from transformers import training_args
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    bf16 = patched(training_args, "is_torch_bf16_gpu_available", lambda: True)
    with _group(job, _rank(job, model)), _without_values(), _apart(job, ledger), bf16:
        try:
            yield
        finally:
            for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
                os.environ.pop(name, None)
            AcceleratorState._reset_state(reset_partial_state=True)
            unset_hf_deepspeed_config()  # else the next model would be made under ZeRO-3


def run_steps(job: Job, model: Any, ledger: Ledger, mark: Callable[[Any], None]) -> int:
    """Two steps of DeepSpeed's engine; the clock at the end of the second step's last forward."""
    from ftplan.trace.core import batch_of, evaluate

    ledger.scalar_answer = lambda tensor, _phase: some_value(tensor)
    forward_end = 0
    with launched(job, model, ledger):
        with (
            patched(torch.nn.Module, "_apply", build.apply_to_tensors),
            patched(torch.Tensor, "__deepcopy__", build.copy_tensor),
        ):
            engine, _, _, _ = _deepspeed().initialize(
                model=cast(job, model),
                optimizer=build.build_optimizer(job, model),
                config=settings_of(job),
            )
        mark(model)
        ledger.watch_modules(model)
        gc.collect()
        for step in (1, 2):
            for _ in range(job.accumulation):
                ledger.enter("forward", step)
                batch: Any = batch_of(job)
                ledger.mark([t for t in batch.values() if t is not None], "inputs")
                loss = engine(**batch)["loss"]
                batch = None
                forward_end = ledger.clock - 1
                ledger.enter("backward", step)
                engine.backward(loss)
                del loss
                ledger.enter("step", step)
                engine.step()
            ledger.enter("end", step + 1)
        evaluate(job, engine, engine, ledger)
    return forward_end


def _apart(job: Job, ledger: Ledger) -> contextlib.AbstractContextManager[None]:
    """Host and device are two memories where something is offloaded."""
    if job.offload == "none":
        return contextlib.nullcontext()
    from ftplan.trace.two_memories import two_memories

    return two_memories(ledger)


def _rank(job: Job, model: Any) -> int:
    """The rank that is traced; 1: that whose partition touches the most gradients."""
    if job.traced_rank != 1:
        return job.traced_rank
    owned = [0] * job.world
    for group in build.build_optimizer(job, model).param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        part = -(-sum(sizes) // (2 * job.world)) * 2
        start = 0
        for size in sizes:
            for rank in range(start // part, (start + size - 1) // part + 1):
                owned[rank] += size
            start += size
    return max(range(1, job.world), key=lambda rank: (owned[rank], rank))


def _dtype(job: Job) -> str:
    if job.mixed != "no":
        return job.mixed
    return job.compute_dtype if job.quantized else job.weights


def cast(job: Job, model: Any) -> Any:
    """``module.bfloat16()``: here, so that the optimizer is made of what is trained."""
    wanted = getattr(torch, _dtype(job))
    swapped: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or not old.is_floating_point() or old.dtype == wanted:
                continue
            if id(old) not in swapped:
                new = torch.nn.Parameter(old.detach().to(wanted), requires_grad=old.requires_grad)
                swapped[id(old)] = (new, old)
            module._parameters[name] = swapped[id(old)][0]
    return model


def some_value(tensor: Any) -> Any:
    if tensor.dtype == torch.bool:
        return False
    return 0.5 if tensor.dtype.is_floating_point else 1
