"""Optimizers: the real ones where they run on CPU tensors, exact stand-ins where they do not."""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftplan.errors import UnsupportedError
from ftplan.trace.job import Job
from ftplan.trace.native import OWN

__all__ = ["BlockwiseStandIn", "host_scalars", "make_optimizer"]


class BlockwiseStandIn(torch.optim.Optimizer):
    """bitsandbytes' 8- and 32-bit optimizers: their states to the byte, updates in place.

    bitsandbytes 0.49 (optim/optimizer.py): from 4,096 elements on a state is uint8 with one fp32
    maximum per 256 elements; smaller ones are fp32. Paged states of 100,000 elements and more are
    managed memory, which PyTorch's allocator does not see. Two 256-entry maps serve all tensors.
    """

    def __init__(
        self,
        groups: Any,
        *,
        bits: int,
        moments: int,
        paged: bool,
        keep_fp32: set[int],
        first_stacked: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": 1e-4})
        self.bits, self.moments, self.paged = bits, moments, paged
        self.keep_fp32 = keep_fp32
        self.first_stacked = first_stacked
        self.maps: list[Any] = []

    def _buffer(self, parameter: Any, dtype: Any, copies: int = 1) -> Any:
        if self.paged and parameter.numel() >= 100_000:
            return None
        shape = (copies, *parameter.shape) if copies > 1 else parameter.shape
        return torch.zeros(shape, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make the states on the first call; the update itself allocates nothing."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self._make(parameter)

    def _make(self, parameter: Any) -> None:
        eight = self.bits == 8 and parameter.numel() >= 4096 and id(parameter) not in self.keep_fp32
        state = self.state[parameter]
        if eight and not self.maps:
            self.maps = [torch.zeros(256) for _ in range(self.moments)]
        for moment in range(1, self.moments + 1):
            copies = 2 if self.first_stacked and moment == 1 else 1
            dtype = torch.uint8 if eight else torch.float32
            state[f"state{moment}"] = self._buffer(parameter, dtype, copies)
            if eight:
                blocks = math.ceil(parameter.numel() / 256)
                shape = (copies, blocks) if copies > 1 else (blocks,)
                state[f"absmax{moment}"] = torch.zeros(shape)
        if eight:
            state["maps"] = self.maps


def _adamw(job: Job, groups: Any, model: Any) -> Any:
    return torch.optim.AdamW(groups, lr=1e-4, **_how(job))


def _how(job: Job) -> dict[str, Any]:
    return {
        "fused": job.implementation == "fused",
        "foreach": job.implementation == "foreach",
    }


def _sgd(job: Job, groups: Any, model: Any) -> Any:
    return torch.optim.SGD(groups, lr=1e-4, momentum=job.momentum, **_how(job))


def _adafactor(job: Job, groups: Any, model: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=1e-4, scale_parameter=False, relative_step=False)


def _adagrad(job: Job, groups: Any, model: Any) -> Any:
    return torch.optim.Adagrad(groups, lr=1e-4, **_how(job))


def _rmsprop(job: Job, groups: Any, model: Any) -> Any:
    return torch.optim.RMSprop(groups, lr=1e-4, foreach=job.implementation != "loop")


def _bitsandbytes(
    bits: int, moments: int, paged: bool = False, stacked: bool = False
) -> Callable[..., Any]:
    def make(job: Job, groups: Any, model: Any) -> Any:
        keep: set[int] = set()
        if job.stack not in ("pytorch", *OWN) and bits == 8:
            # Trainer registers 32-bit states for every embedding
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    keep.add(id(module.weight))
        return BlockwiseStandIn(
            groups, bits=bits, moments=moments, paged=paged, keep_fp32=keep,
            first_stacked=stacked,
        )  # fmt: skip

    return make


_MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adamw_bnb_8bit": _bitsandbytes(8, 2),
    "adamw_8bit": _bitsandbytes(8, 2),
    "paged_adamw_8bit": _bitsandbytes(8, 2, paged=True),
    "paged_adamw_32bit": _bitsandbytes(32, 2, paged=True),
    "paged_adamw": _bitsandbytes(32, 2, paged=True),
    "lion_32bit": _bitsandbytes(32, 1),
    "lion_8bit": _bitsandbytes(8, 1),
    "paged_lion_32bit": _bitsandbytes(32, 1, paged=True),
    "paged_lion_8bit": _bitsandbytes(8, 1, paged=True),
    "rmsprop_bnb": _bitsandbytes(8, 1),
    "rmsprop_bnb_8bit": _bitsandbytes(8, 1),
    "rmsprop_bnb_32bit": _bitsandbytes(32, 1),
    "ademamix": _bitsandbytes(32, 2, stacked=True),
    "ademamix_8bit": _bitsandbytes(8, 2, stacked=True),
}


def _real_bitsandbytes(job: Job, groups: Any) -> Any:
    """bitsandbytes' own optimizer, for a GPU; None where the name is not one of its."""
    names = {
        "adamw_bnb_8bit": "AdamW8bit",
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
        "paged_adamw": "PagedAdamW32bit",
        "lion_32bit": "Lion32bit",
        "lion_8bit": "Lion8bit",
        "paged_lion_32bit": "PagedLion32bit",
        "paged_lion_8bit": "PagedLion8bit",
        "rmsprop_bnb_8bit": "RMSprop8bit",
        "rmsprop_bnb_32bit": "RMSprop32bit",
    }
    if job.optimizer not in names:
        return None
    import bitsandbytes

    return getattr(bitsandbytes.optim, names[job.optimizer])(groups, lr=1e-4)


def make_optimizer(job: Job, groups: Any, model: Any, *, real: bool = False) -> Any:
    """The optimizer of the job over parameter groups; UnsupportedError for one that is not run."""
    if real:
        own = _real_bitsandbytes(job, groups)
        if own is not None:
            return own
    maker = _MAKERS.get(job.optimizer)
    if maker is None:
        raise UnsupportedError(
            f"tracing the optimizer {job.optimizer!r}",
            remedy=f"trace with one of {', '.join(sorted(_MAKERS))}",
        )
    return maker(job, groups, model)


def host_scalars(job: Job, optimizer: Any) -> list[Any]:
    """State tensors that a CUDA run keeps on the host: step counters, unless fused."""
    if job.implementation == "fused" or isinstance(optimizer, BlockwiseStandIn):
        return []
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim == 0
    ]
