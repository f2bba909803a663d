"""Weights in 4 or 8 bits: bitsandbytes' modules with their CUDA kernels emulated.

The modules and peft's adapters around them are the real classes (bitsandbytes 0.50). A quantised
weight is a fake uint8 or int8 tensor beside exactly the statistics that bitsandbytes keeps. Its
matmul is emulated as CUDA runs it for many tokens: the weight is expanded to the compute dtype for
a moment, forward and backward, and nothing of it is kept. (Below 1,536 tokens a fused kernel may
run, which expands nothing; the outlier columns of int8 are taken as none.)
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftplan.catalog.stacks import find_stack
from ftplan.errors import UnsupportedError
from ftplan.trace.job import Job
from ftplan.trace.ledger import Ledger

__all__ = ["emulated", "four_bit", "prepare_kbit", "quantize", "quantize_for_real"]

BLOCK = 64
"""Elements that share one scale (bitsandbytes' default for 4 bits)."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own, under double quantisation."""


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnsupportedError(
            "tracing quantised weights without bitsandbytes",
            remedy="pip install bitsandbytes (its CPU wheel is enough)",
        ) from error
    return bitsandbytes


def quantize(model: Any, job: Job) -> None:
    """Replace every linear layer but the output head by its quantised form, on fake tensors."""
    bnb = _bitsandbytes()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shared: dict[str, Any] = {}
    for path, module in list(model.named_modules()):
        conv1d = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or conv1d) or module is head:
            continue
        if path.rpartition(".")[2] in _whole(model):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        rows, columns = module.weight.shape[::-1] if conv1d else module.weight.shape
        make = four_bit if job.weights in ("nf4", "fp4", "int4") else _eight_bit
        new = make(bnb, job, rows, columns, module.bias, shared)
        new.train(module.training)
        setattr(parent, path.rpartition(".")[2], new)
    model.is_loaded_in_4bit = job.weights != "int8"
    model.is_loaded_in_8bit = job.weights == "int8"
    model.is_quantized = True


def _whole(model: Any) -> set[str]:
    """Names of linear layers that transformers' quantiser leaves as they are."""
    return {"lm_head", "score", "classifier", *(model._keep_in_fp32_modules or ())}


def quantize_for_real(model: Any, job: Job, device: Any) -> None:
    """Replace and quantise linear layers one by one on a GPU, from weights on the host."""
    bnb = _bitsandbytes()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        name = path.rpartition(".")[2]
        if name in _whole(model):
            continue
        rows, columns = module.weight.shape
        if job.weights == "int8":
            new = bnb.nn.Linear8bitLt(
                columns, rows, bias=module.bias is not None, has_fp16_weights=False, threshold=6.0
            )
            new.weight = bnb.nn.Int8Params(
                module.weight.data, requires_grad=False, has_fp16_weights=False
            )
        else:
            new = bnb.nn.Linear4bit(
                columns, rows, bias=module.bias is not None,
                compute_dtype=getattr(torch, job.compute_dtype),
                compress_statistics=job.double_quant,
                quant_type="fp4" if job.weights == "fp4" else "nf4",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=job.double_quant,
                quant_type="fp4" if job.weights == "fp4" else "nf4",
            )  # fmt: skip
        new.bias = module.bias
        setattr(model.get_submodule(path.rpartition(".")[0]), name, new.to(device))
    model.is_loaded_in_4bit = job.weights != "int8"
    model.is_loaded_in_8bit = job.weights == "int8"
    model.is_quantized = True


def four_bit(bnb: Any, job: Job, rows: int, columns: int, bias: Any, shared: Any) -> Any:
    """A ``Linear4bit`` whose weight is expanded to the job's compute dtype."""
    dtype = getattr(torch, job.compute_dtype)
    kind = "fp4" if job.weights == "fp4" else "nf4"
    module = _bare(bnb.nn.Linear4bit, columns, rows)
    module.compute_dtype = dtype
    module.compute_type_is_set = True
    module.quant_storage = torch.uint8
    module.support_avx512bf16_for_cpu = False
    count = rows * columns
    scales = math.ceil(count / BLOCK)
    # bnb_4bit_quant_storage: FSDP shards what looks like a float
    storage = dtype if job.sharding == "fsdp" else torch.uint8
    packed = -(-count // (2 * storage.itemsize))
    weight = nn.Parameter(torch.empty(packed, 1, dtype=storage), requires_grad=False)
    nested = None
    offset = None
    absmax = torch.empty(scales, dtype=torch.uint8 if job.double_quant else torch.float32)
    if job.double_quant:
        if "map" not in shared:
            shared["map"] = torch.empty(256)
        offset = torch.empty(())
        nested = bnb.functional.QuantState(
            absmax=torch.empty(math.ceil(scales / NESTED_BLOCK)), code=shared["map"],
            blocksize=NESTED_BLOCK, dtype=torch.float32,
        )  # fmt: skip
    weight.quant_state = bnb.functional.QuantState(
        absmax=absmax, shape=torch.Size((rows, columns)), code=torch.empty(16), blocksize=BLOCK,
        quant_type=kind, dtype=dtype, offset=offset, state2=nested,
    )  # fmt: skip
    weight.compress_statistics = job.double_quant
    weight.quant_type = kind
    weight.blocksize = BLOCK
    weight.quant_storage = torch.uint8
    weight.bnb_quantized = True
    module.weight = weight
    module.quant_state = weight.quant_state
    module.bias = bias
    return module


def _bare(kind: Any, columns: int, rows: int) -> Any:
    """A module of that class without its own weights, which fake tensors cannot become."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.in_features, module.out_features = columns, rows
    module.weight = module.bias = None
    return module


def _eight_bit(bnb: Any, job: Job, rows: int, columns: int, bias: Any, shared: Any) -> Any:
    module = _bare(bnb.nn.Linear8bitLt, columns, rows)
    module.state = bnb.MatmulLtState()
    module.state.threshold = 6.0
    module.state.has_fp16_weights = False
    module.index = None
    weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
    weight.CB = None
    weight.SCB = None
    weight.has_fp16_weights = False
    module.weight = weight
    module.state.CB = weight.data
    module.state.SCB = torch.empty(rows, dtype=torch.float32)
    module.bias = bias
    return module


def prepare_kbit(model: Any, job: Job) -> None:
    """``prepare_model_for_kbit_training``: freeze, and cast what is not quantised to fp32."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if old.dtype in (torch.float16, torch.bfloat16):
                cast = model.__dict__.setdefault("_kbit_casts", {})
                if id(old) not in cast:
                    cast[id(old)] = (nn.Parameter(old.to(torch.float32), requires_grad=False), old)
                module._parameters[name] = cast[id(old)][0]
            else:
                old.requires_grad_(False)
    model.__dict__.pop("_kbit_casts", None)


class _Matmul4Bit(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit where CUDA expands the weight and calls a dense matmul."""

    @staticmethod
    def forward(
        ctx: Any, input: Any, packed: Any, bias: Any, state: Any, ledger: Ledger, holds: bool
    ) -> Any:
        with ledger.named_op("dequantize_4bit"):
            dense = _expand(state).to(input.dtype)
        out = F.linear(input, dense, bias)
        del dense
        ctx.state, ctx.ledger = state, ledger
        if holds and ctx.needs_input_grad[0]:
            ctx.tensors = input  # an attribute: it goes with the graph
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        with ctx.ledger.named_op("dequantize_4bit"):
            dense = _expand(ctx.state).to(grad.dtype)
        return torch.matmul(grad, dense), None, None, None, None, None


def _expand(state: Any) -> Any:
    scales = None
    if state.nested:
        scales = torch.empty(state.absmax.shape, dtype=torch.float32)
    dense = torch.empty(state.shape, dtype=state.dtype)
    del scales
    return dense


class _Matmul8Bit(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt: keeps its input, expands the weight in backward."""

    @staticmethod
    def forward(ctx: Any, input: Any, bias: Any, state: Any, ledger: Ledger) -> Any:
        flat = input.reshape(-1, input.shape[-1])
        with ledger.named_op("int8_matmul"):
            half = flat.to(torch.float16)
            row_stats = torch.empty(half.shape[0], dtype=torch.float32)
            quantized = torch.empty(half.shape, dtype=torch.int8)
            outliers = half.abs() >= 6.0
            del outliers
            del half
            whole = torch.empty(flat.shape[0], state.CB.shape[0], dtype=torch.int32)
            out = torch.empty(whole.shape, dtype=torch.float16)
            del whole, quantized, row_stats
            out = out.to(input.dtype)
        ctx.state, ctx.ledger, ctx.shape = state, ledger, input.shape
        ctx.kept = flat
        return out.view(*input.shape[:-1], state.CB.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        with ctx.ledger.named_op("int8_matmul_backward"):
            flat = grad.reshape(-1, grad.shape[-1]).contiguous()
            dense = ctx.state.CB.to(ctx.kept.dtype, copy=True)
            grad_input = torch.matmul(flat.to(ctx.kept.dtype), dense).view(ctx.shape)
        return grad_input, None, None, None


@contextlib.contextmanager
def emulated(job: Job, ledger: Ledger) -> Iterator[None]:
    """bitsandbytes' matmuls as on CUDA while the block runs, those of the stack's time."""
    if not job.quantized:
        yield
        return
    from ftplan.trace.cuda import patched

    bnb, holds = _bitsandbytes(), find_stack(job.stack).holds_4bit_inputs

    def matmul_4bit(
        input: Any, packed: Any, quant_state: Any, out: Any = None, bias: Any = None
    ) -> Any:
        return _Matmul4Bit.apply(input, packed, bias, quant_state, ledger, holds)

    def matmul(
        input: Any, weight: Any, out: Any = None, state: Any = None, threshold: float = 0.0,
        bias: Any = None,
    ) -> Any:  # fmt: skip
        result = _Matmul8Bit.apply(input, bias, state, ledger)
        return result if bias is None else result + bias.to(result.dtype)

    def recover(module: Any) -> None:
        module.weight.quant_state = module.quant_state  # lost when FSDP replaced the parameter

    modules = bnb.nn.modules
    with (
        patched(bnb, "matmul_4bit", matmul_4bit),
        patched(bnb, "matmul", matmul),
        patched(modules, "fix_4bit_weight_quant_state_from_module", recover),
    ):
        yield
