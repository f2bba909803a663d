"""FSDP2 for one rank of many, traced in one process with PyTorch's fake process group.

Collectives move nothing but allocate what they would; rank 0 holds the largest shards. Gathered
units are storages that FSDP resizes in place, so ``UntypedStorage.resize_`` is followed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from ftplan.errors import UnsupportedError
from ftplan.trace.cuda import patched
from ftplan.trace.experts import balanced, expert_meshes, expert_modules
from ftplan.trace.job import Job
from ftplan.trace.ledger import Ledger

__all__ = ["distributed", "local", "shard", "split"]


def local(tensor: Any) -> Any:
    """The rank's own part of a DTensor; any other tensor is itself."""
    return getattr(tensor, "_local_tensor", tensor)


@contextlib.contextmanager
def distributed(job: Job, ledger: Ledger) -> Iterator[Any]:
    """A fake process group of the job's size while the block runs, if the job has one.

    Yields its device mesh, or None.
    """
    if job.world == 1 or (job.sharding == "none" and job.tp == job.ep == 1):
        yield None
        return
    if job.sharding.startswith("zero"):  # DeepSpeed makes its own (ftplan.trace.zero)
        yield None
        return
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = job.cp - 1  # of a ring the last one
    dist.init_process_group("fake", rank=rank, world_size=job.world, store=FakeStore())
    original = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        result = original(storage, size)
        ledger.resize(storage, size)
        return result

    replicas = job.dp_replicate
    shape = (replicas, job.world // replicas) if replicas > 1 else (job.world,)
    shared = job.tp > 1 or job.sharding == "none"  # one batch on all ranks
    names = ("tp",) if shared else ("replicate", "shard")[-len(shape) :]
    if job.cp > 1:
        shape, names = (job.world // job.cp, job.cp), ("dp", "cp")
    try:
        with patched(torch.UntypedStorage, "resize_", resize), _two_memories(job, ledger):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            if job.cp > 1:  # weights are sharded over all ranks, of a sequence and of replicas
                mesh.all_ranks, mesh.ring = mesh._flatten("dp_cp"), mesh["cp"]
            if job.ep > 1:
                expert_meshes(job, mesh)
            with balanced() if job.ep > 1 else contextlib.nullcontext():
                yield mesh
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _two_memories(job: Job, ledger: Ledger) -> Iterator[None]:
    """FSDP2's copies between host and device, which are one memory where all tensors are cpu's.

    FSDP2 alone passes ``non_blocking``: what the ledger knows is on the device and goes to the
    host, anything else comes from there.
    """
    if job.offload != "params":
        yield
        return
    original = torch.Tensor.to

    def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if "non_blocking" not in kwargs or not isinstance(args[0], torch.device):
            return original(tensor, *args, **kwargs)
        if ledger.entry_of(local(tensor)) is None:
            return torch.empty_like(tensor)
        with ledger.on_host():
            return torch.empty_like(tensor)

    with patched(torch.Tensor, "to", to):
        yield


def _dtype(name: str) -> Any:
    return getattr(torch, name) if name else None


def shard(model: Any, job: Job, mesh: Any) -> Any:
    """Shard the model as the plan says; with ``wrap: block`` each block is a unit of its own."""
    if job.sharding == "ddp" and job.world > 1:
        model.__dict__["_ddp_buckets"] = _ddp_buckets(model)
        return model
    if job.sharding != "fsdp" or job.world == 1:
        return model
    if job.fsdp_version == 1:
        return _shard_flat(model, job, mesh)
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    offload = CPUOffloadPolicy(pin_memory=False) if job.offload == "params" else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=_dtype(job.param_dtype),
        reduce_dtype=_dtype(job.reduce_dtype),
        output_dtype=_dtype(job.mixed) if job.mixed != "no" else None,
    )
    if job.cp > 1:
        mesh = mesh.all_ranks
    ignored = _shard_experts(model, job, mesh, mp_policy=policy, offload_policy=offload)
    given = {
        "mesh": mesh, "mp_policy": policy, "offload_policy": offload,
        "reshard_after_forward": job.reshard_after_forward, "ignored_params": ignored,
    }  # fmt: skip
    if "head" in job.apart:
        return _shard_by_accelerate(model, job, given)
    for layer in _apart(model, job):
        fully_shard(layer, **given)
    if job.wrap == "block":
        for block in _units(model):
            fully_shard(block, **given)
    if not job.reshard_root:
        del given["reshard_after_forward"]
    fully_shard(model, **given)
    return model


def _apart(model: Any, job: Job) -> list[Any]:
    """What LLaMA-Factory v1 and axolotl wrap by themselves: untied embeddings, LoRA's matrices."""
    layers = []
    if "adapters" in job.apart:
        adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
        pairs = [(module.lora_A["default"], module.lora_B["default"]) for module in adapted]
        layers += [matrix for pair in pairs for matrix in pair]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if "embeddings" in job.apart and table.weight is not head.weight:
        layers.append(table)
    return layers


def _shard_by_accelerate(model: Any, job: Job, given: dict[str, Any]) -> Any:
    """accelerate's own wrapping, which makes units of embeddings and head too."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = SimpleNamespace(
        reshard_after_forward=given["reshard_after_forward"],
        cpu_offload=given["offload_policy"],
        mixed_precision_policy=given["mp_policy"],
        auto_wrap_policy=transformer_auto_wrap_policy if job.wrap == "block" else None,
        transformer_cls_names_to_wrap=None,
        cpu_ram_efficient_loading=False,
        ignored_modules=None,
        set_auto_wrap_policy=lambda _model: None,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=job.mixed,
        is_main_process=False,
        torch_device_mesh={("all",): given["mesh"]},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["all"]),
    )
    return fsdp2_prepare_model(accelerator, model)


def _shard_experts(model: Any, job: Job, mesh: Any, **policies: Any) -> set[Any] | None:
    """Shard experts that are spread over those ranks that have the same ones.

    Returns what FSDP must leave alone: axolotl's, where no other rank has them.
    """
    from torch.distributed.fsdp import fully_shard

    if job.ep == 1:
        return None
    spread = expert_modules(model)
    if job.stack == "axolotl" and job.world == job.ep:
        return {weight for experts in spread for weight in experts.parameters()}
    for experts in spread:
        fully_shard(experts, mesh=mesh.experts["efsdp"], reshard_after_forward=True, **policies)
        if job.stack != "axolotl":  # which scales gradients in a hook
            experts.set_gradient_divide_factor(float(job.world))
            if job.world > job.ep:
                experts.set_force_sum_reduction_for_comms(True)
    return None


def split(model: Any, job: Job, mesh: Any) -> Any:
    """Tensor parallelism by the model's own plan (transformers' ``tp_plan``), as it is loaded."""
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        raise UnsupportedError(
            "tracing tensor parallelism of tied embeddings", remedy="trace a model that has none"
        )
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    settings = DistributedConfig(tp_size=job.tp, ep_size=job.ep)
    model.config.distributed_config, model._device_mesh = settings, mesh  # PEFT looks for them
    plan, _, _ = model._resolve_parallel_plans(settings)
    return apply_tensor_parallelism(model, mesh, plan)


def _shard_flat(model: Any, job: Job, mesh: Any) -> Any:
    """FSDP1: one flat parameter for each unit, as accelerate asks for it."""
    from torch.distributed.fsdp import (
        CPUOffload,
        FullyShardedDataParallel,
        MixedPrecision,
        ShardingStrategy,
    )
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    dtype = _dtype(job.param_dtype)
    mixed = None
    if dtype is not None:
        mixed = MixedPrecision(
            param_dtype=dtype, reduce_dtype=_dtype(job.reduce_dtype), buffer_dtype=dtype
        )
    policy: Any = ModuleWrapPolicy({type(block) for block in _units(model)})
    if (
        hasattr(model, "peft_config") and job.stack != "pytorch"
    ):  # Trainer's: what is trained is a unit of its own
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model,
        process_group=torch.distributed.group.WORLD,
        sharding_strategy=ShardingStrategy.FULL_SHARD
        if job.reshard_after_forward
        else ShardingStrategy.SHARD_GRAD_OP,
        cpu_offload=CPUOffload(offload_params=job.offload == "params"),
        auto_wrap_policy=policy if job.wrap == "block" else None,
        mixed_precision=mixed,
        use_orig_params=job.use_orig_params,
        device_id=torch.device("cpu"),
    )


def _units(model: Any) -> list[Any]:
    """The blocks that transformers says must stay whole, which accelerate wraps one by one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    return [module for module in base.modules() if type(module).__name__ in names]


def _ddp_buckets(model: Any) -> list[Any]:
    """DDP's flat buckets, which hold a second copy of every gradient.

    torch 2.13, torch/csrc/distributed/c10d/reducer.cpp: 1 MiB first, then 25 MiB, each closed by
    the tensor that fills it, by dtype, in the order in which gradients arrive.
    """
    limits = {True: 1 << 20, False: 25 << 20}
    open_buckets: dict[Any, int] = {}
    closed: list[tuple[Any, int]] = []
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        dtype = parameter.dtype
        filled = open_buckets.get(dtype, 0) + parameter.numel() * parameter.itemsize
        if filled >= limits[not any(kind == dtype for kind, _ in closed)]:
            closed.append((dtype, filled))
            filled = 0
        open_buckets[dtype] = filled
    closed += [(dtype, filled) for dtype, filled in open_buckets.items() if filled]
    return [torch.empty(filled // dtype.itemsize, dtype=dtype) for dtype, filled in closed]
