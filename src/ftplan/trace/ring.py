"""PyTorch's ring attention for one rank of a sequence, with an emulated flash kernel.

The loops are PyTorch's own (``torch.distributed.tensor.experimental``): keys and values go round
by an all-gather, the last rank is traced, which merges whole outputs. What accelerate does to a
batch before the model sees it is done here too, with PyTorch's own function.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.nn.functional import pad

from ftplan.trace.ledger import Ledger

__all__ = ["RingFlash", "split_batch"]


def split_batch(batch: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """The rank's part of a batch: Trainer's ``_prepare_context_parallel_inputs``, then PyTorch's
    ``context_parallel``, which makes each buffer shorter in place."""
    labels = pad(batch["labels"], (0, 1), value=-100)
    batch = {**batch, "shift_labels": labels[:, 1:].contiguous()}
    ids = batch["input_ids"]
    batch["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape[0], -1).clone()
    length, buffers = ids.shape[1], list(batch.values())
    balancer = ring._create_default_load_balancer(length, mesh.size(), ids.device)
    parts = ring._context_parallel_buffers(mesh, buffers, [1] * len(buffers), balancer)
    for buffer, part in zip(buffers, parts, strict=True):
        shorter = part.clone()
        buffer.resize_(shorter.shape).copy_(shorter)
    return batch


class RingFlash(torch.autograd.Function):
    """Flash attention over keys and values that go round the ranks of a group."""

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, ledger: Ledger, group: Any, kernel: Any
    ) -> Any:
        with ledger.named_op("ring_flash"):
            attend = functools.partial(_attend, kernel)
            out, lse, *rest = ring._templated_ring_attention(
                group, 2, attend, query, key, value, is_causal=True
            )
        ctx.save_for_backward(query, key, value, out, lse, *rest)
        ctx.group, ctx.ledger, ctx.kernel = group, ledger, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, out, lse, *_ = ctx.saved_tensors
        with ctx.ledger.named_op("ring_flash_backward"):
            attend = functools.partial(_attend_back, ctx.kernel)
            grads = ring._templated_ring_attention_backward(
                ctx.group, 2, attend, grad, "grad_out", query, key, value, out, lse, True
            )
        return (*grads[:3], None, None, None)


def _attend(kernel: Any, query: Any, key: Any, value: Any, **_: Any) -> Any:
    return kernel.allocate(query)


def _attend_back(
    kernel: Any, query: Any, key: Any, value: Any, out: Any, grad_out: Any, **_: Any
) -> Any:
    return kernel.gradients(query, key, value, out, grad_out)
