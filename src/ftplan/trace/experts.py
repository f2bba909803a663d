"""Expert parallelism as transformers 5.23 runs it, traced for one rank of many.

``DistributedConfig(fsdp_size=world, ep_size=ep)``: each rank has its own batch, experts lie on
``ep`` ranks and are sharded by FSDP2 over those that have the same ones; without FSDP the ranks
share one batch (``tp_size=ep_size``, with ``tp_plan={}`` or the model's). How many rows a rank
receives depends on values, which fake tensors have none of: here the router is balanced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ftplan.trace.cuda import patched
from ftplan.trace.deep_ep import spread_by_deep_ep
from ftplan.trace.job import Job

__all__ = ["balanced", "expert_meshes", "expert_modules", "spread_experts"]


def expert_meshes(job: Job, mesh: Any) -> None:
    """Give the dense mesh the two that experts need: their own, and that of a shared batch."""
    from torch.distributed.device_mesh import init_device_mesh

    copies = job.world // job.ep
    mesh.experts = init_device_mesh("cpu", (copies, job.ep), mesh_dim_names=("efsdp", "ep"))
    if job.sharding == "fsdp":  # each rank has a batch of its own
        dense = init_device_mesh("cpu", (job.world, 1), mesh_dim_names=("fsdp", "tp"))
        mesh.batch = dense["tp"]
    else:
        mesh.batch = mesh


def spread_experts(model: Any, job: Job, mesh: Any) -> Any:
    """Leave the rank its experts: by the model's own plan, or as axolotl's plugin does."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    if job.stack == "axolotl":
        spread_by_deep_ep(expert_modules(model), job.ep)
        return model
    plan = model._expand_parallel_plan(dict(model.ep_plan))
    return apply_expert_parallelism(model, mesh.experts["ep"], mesh.batch, plan)


def expert_modules(model: Any) -> list[Any]:
    """The modules that hold a layer's experts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = base._expand_parallel_plan(dict(base.ep_plan)).items()
    return [base.get_submodule(name) for name, style in names if style == "ep_dispatch_experts"]


@contextlib.contextmanager
def balanced() -> Iterator[None]:
    """Every rank is sent as many rows as every other one."""
    from torch._subclasses.fake_tensor import FakeTensor
    from transformers.distributed.expert_parallel import AllToAllEP

    original = AllToAllEP._dispatch_tokens

    def dispatch(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
        rows = -(-index.shape[0] // self.tp_mesh.size()) * index.shape[1]
        ranks = self.ep_mesh.size()
        even = [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
        with patched(FakeTensor, "tolist", lambda tensor: [even, even]):
            return original(self, hidden, index, weights)

    with patched(AllToAllEP, "_dispatch_tokens", dispatch), _real_meshes():
        yield


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """FSDP2 joins its mesh and the experts' own: ranks are numbers, whatever tensors are there."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils._python_dispatch import _disable_current_modes

    original = DeviceMesh._concatenate

    def concatenate(meshes: Any) -> Any:
        with _disable_current_modes():
            return original(meshes)

    with patched(DeviceMesh, "_concatenate", staticmethod(concatenate)):
        yield
