"""Write what transformers builds and keeps for the small configs in tests/cases/mixtures.

As tools/family_cases.py does for its own, with three things said to the trace: a vision-language
wrapper is an image-text model; SDPA is used where a part has it; and outside of tensor subclasses
the gradient of an index is added in place (torch/csrc/autograd/FunctionsManual.cpp,
``index_backward``), where fake tensors take a copy.

    python tools/mixture_cases.py [name ...]           # write (all, or the named files)
    python tools/mixture_cases.py --check [name ...]   # exit 1 if a file would change
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import family_cases
import torch
import transformers

from ftplan.trace import build, cuda
from ftplan.trace.ledger import Ledger

IN_PLACE = ("IndexBackward0", "TopkBackward0", "GatherBackward0")


class InPlaceLedger(Ledger):
    """A ledger that lets the gradient of an index be added in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        out_of_place = (torch.ops.aten.index_put.default, torch.ops.aten.scatter.src)
        if node is not None and func in out_of_place and node.name() in IN_PLACE:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


class GroupedMM(torch.autograd.Function):
    """``grouped_mm`` in fp32: each operand is kept where the other one asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Any, weight: Any, offs: Any) -> Any:
        wants = ctx.needs_input_grad
        ctx.save_for_backward(rows if wants[1] else None, weight if wants[0] else None, offs)
        ctx.shapes = rows.shape, weight.shape, weight.stride(), rows.dtype
        return torch.empty(rows.shape[0], weight.shape[-1], dtype=rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        rows, shape, stride, dtype = ctx.shapes
        wants = ctx.needs_input_grad
        grad_weight = torch.empty_strided(shape, stride, dtype=dtype) if wants[1] else None
        return torch.empty(rows, dtype=dtype) if wants[0] else None, grad_weight, None


def grouped_mm(original: Any, _ledger: Any) -> Any:
    """bf16 as it is; other dtypes by :class:`GroupedMM`, as their shape function refuses them."""

    def run(mat_a: Any, mat_b: Any, *, offs: Any = None, **rest: Any) -> Any:
        if mat_a.dtype == torch.bfloat16:
            return original(mat_a, mat_b, offs=offs, **rest)
        return GroupedMM.apply(mat_a, mat_b, offs)

    return run


def real_model(config: dict[str, Any], dtype: torch.dtype, attention: str) -> Any:
    """The class for the config's usual task, on the meta device."""
    settings = build.model_config(copy.deepcopy(config))
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in config:
        auto = transformers.AutoModelForImageTextToText
    elif "audio_config" in config:
        auto = transformers.AutoModelForMultimodalLM
    wanted = None if attention == "sdpa" else attention  # by default, and where a part has it
    with torch.device("meta"):
        return auto.from_config(settings, dtype=dtype, attn_implementation=wanted)


if __name__ == "__main__":
    family_cases.CASES = Path(__file__).parents[1] / "tests/cases/mixtures"
    family_cases.Ledger = InPlaceLedger  # type: ignore[misc]
    family_cases.real_model = real_model
    cuda._grouped_mm = grouped_mm
    torch.distributions.Distribution.set_default_validate_args(False)  # fake numbers have no value
    sys.exit(family_cases.main(sys.argv[1:]))
