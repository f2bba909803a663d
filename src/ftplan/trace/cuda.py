"""What a CUDA device would do where a CPU does something else, told to fake CPU tensors.

- scaled_dot_product_attention picks flash, memory-efficient or math as the CUDA dispatcher does
  (torch 2.13, ATen/native/transformers/cuda/sdp_utils.cpp), and each keeps what its kernel keeps.
- dropout keeps a one-byte mask (``native_dropout``), where a CPU keeps noise in the input's dtype.
- autocast's list of fp32 ops is the one of CUDA (layer norm, softmax, pow ...).
- a mask for packed sequences is looked for, and none is found.

Kernel workspaces of cuBLAS are left out: ``max_memory_allocated`` shows them as 8 to 32 MiB more.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ftplan.errors import UnsupportedError
from ftplan.trace.ledger import Ledger

__all__ = [
    "FLASH", "AutocastLists", "as_on_cuda", "flash_attention", "flash_mask", "patched",
    "pick_sdpa",
]  # fmt: skip

FLASH = "ftplan_varlen"
"""Name under which the emulated ``flash_attention_2`` is registered with transformers (which asks
for a kernel package when it reads "flash" in a name)."""
_is_autocast_enabled = torch.is_autocast_enabled
LOW_PRECISION = (torch.float16, torch.bfloat16)


def pick_sdpa(
    query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool,
    capability: tuple[int, int],
) -> str:  # fmt: skip
    """``flash``, ``efficient`` or ``math``: the dispatcher's order and conditions on CUDA."""
    head = query.shape[-1]
    same_head = head == key.shape[-1] == value.shape[-1]
    grouped = query.shape[1] != key.shape[1]
    contiguous = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (query, key, value))
    needs_grad = any(t.requires_grad for t in (query, key, value))
    consumer = capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    flash = (
        mask is None
        and same_head
        and head <= 256
        and capability >= (8, 0)
        and query.dtype in LOW_PRECISION
        and contiguous
        and not (causal and query.shape[2] != key.shape[2])
        and not (needs_grad and consumer and (192 < head <= 224 or (head > 224 and dropout > 0)))
    )
    if flash:
        return "flash"
    alignment = 8 if query.dtype in LOW_PRECISION else 4
    efficient = (
        not grouped
        and query.shape[0] == key.shape[0]
        and head == key.shape[-1]
        and head % alignment == 0
        and value.shape[-1] % alignment == 0
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (query.dtype != torch.bfloat16 or capability >= (8, 0))
        and (contiguous)
    )
    return "efficient" if efficient else "math"


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Flash(torch.autograd.Function):
    """FlashAttention 2 inside PyTorch: saves q, k, v, out, fp32 log-sum-exp, philox state."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, ledger: Ledger) -> Any:
        with ledger.named_op("sdpa_flash"):
            out, *rest = _Flash.allocate(query)
        ctx.save_for_backward(query, key, value, out, *rest)
        ctx.ledger = ledger
        return out

    @staticmethod
    def allocate(query: Any) -> tuple[Any, ...]:
        """What the kernel makes: output, log-sum-exp, random state."""
        out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        return out, lse, torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, out, *_ = ctx.saved_tensors
        with ctx.ledger.named_op("sdpa_flash_backward"):
            return (*_Flash.gradients(query, key, value, out, grad), None)

    @staticmethod
    def gradients(query: Any, key: Any, value: Any, out: Any, grad: Any) -> tuple[Any, ...]:
        """What the kernel's way back makes, with what it needs for a moment."""
        grad = grad.transpose(1, 2).contiguous()
        out = out.transpose(1, 2).contiguous()
        batch, heads, length, head = query.shape
        kv_heads, kv_length = key.shape[1], key.shape[2]
        grad_q = torch.empty_like(query.transpose(1, 2))
        grad_k = torch.empty_like(key.transpose(1, 2))
        grad_v = torch.empty_like(value.transpose(1, 2))
        rounded = _round(length, 128)
        softmax_d = torch.empty(batch, heads, rounded, dtype=torch.float32)
        head_rounded = _round(head, 32) if head <= 192 else 256
        accumulator = torch.empty(batch, rounded, heads, head_rounded, dtype=torch.float32)
        if kv_heads != heads:
            shape = (batch, kv_length, heads, head)
            wide_k = torch.empty(shape, dtype=key.dtype)
            wide_v = torch.empty(shape, dtype=key.dtype)
            del wide_k, wide_v
        del softmax_d, accumulator
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


class _Efficient(torch.autograd.Function):
    """The memory-efficient (CUTLASS) kernel: any of fp32, fp16, bf16, and additive masks."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, ledger: Ledger) -> Any:
        batch, heads, length, _ = query.shape
        with ledger.named_op("sdpa_efficient"):
            out = torch.empty(batch, length, heads, value.shape[-1], dtype=query.dtype)
            lse = torch.empty(batch, heads, _round(length, 32), dtype=torch.float32)
            seed = torch.empty((), dtype=torch.int64)
            offset = torch.empty((), dtype=torch.int64)
            if value.shape[-1] > 128 and query.dtype != torch.float32:
                accumulator = torch.empty(out.shape, dtype=torch.float32)
                del accumulator
        out = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, out, lse, seed, offset)
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, bias, *_ = ctx.saved_tensors
        with ctx.ledger.named_op("sdpa_efficient_backward"):
            batch, heads, length, head = query.shape
            grad_q, grad_k, grad_v = (
                torch.empty(t.transpose(1, 2).shape, dtype=t.dtype).transpose(1, 2)
                for t in (query, key, value)
            )
            grad_bias = None
            if bias is not None and ctx.needs_input_grad[3]:
                grad_bias = torch.empty_like(bias)
            delta = torch.empty(batch, heads, _round(length, 32), dtype=torch.float32)
            workspace = None
            if query.dtype != torch.float32:
                workspace = torch.empty(
                    batch * heads * _round(length, 64) * _round(head, 32), dtype=torch.float32
                )
            del delta, workspace
        return grad_q, grad_k, grad_v, grad_bias, None


class _SafeSoftmax(torch.autograd.Function):
    """``_safe_softmax``: a softmax, a mask of rows that are all -inf, and what is both."""

    @staticmethod
    def forward(ctx: Any, scores: Any, ledger: Ledger) -> Any:
        with ledger.named_op("_safe_softmax"):
            plain = torch.empty_like(scores)
            masked = torch.empty(scores.shape, dtype=torch.bool)
            result = torch.empty_like(scores)
            del plain, masked
        ctx.save_for_backward(result)
        ctx.ledger = ledger
        return result

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (result,) = ctx.saved_tensors
        with ctx.ledger.named_op("_softmax_backward_data"):
            return torch.empty_like(result), None


def _math(
    query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool,
    scale: float | None, grouped: bool, ledger: Ledger,
) -> Any:  # fmt: skip
    """The math path as CUDA runs it: fp32 throughout, mask added in place, one-byte dropout.

    ATen/native/transformers/attention.cpp, ``_scaled_dot_product_attention_math``; its C++ takes
    other branches when a dispatch mode is on.
    """
    origin = query.dtype
    mask = _additive(mask, origin)
    accurate = (query, key, value)  # held until the function returns, as all that follows
    if origin in LOW_PRECISION:
        accurate = tuple(t.to(torch.float32) for t in accurate)
    query, key, value = accurate
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        mask = _additive(mask, query.dtype)
    root = (scale if scale is not None else query.shape[-1] ** -0.5) ** 0.5
    scaled = query * root
    if grouped and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)
    scores = torch.matmul(scaled, key.transpose(-2, -1) * root)
    if mask is not None:
        if mask.requires_grad:
            scores = scores + mask
        else:
            scores.add_(mask)
    weights = _SafeSoftmax.apply(scores, ledger)
    del scores
    if dropout > 0.0:
        weights = torch.native_dropout(weights, dropout, True)[0]
    out = torch.matmul(weights, value)
    second = weights.to(origin)  # the function's other result, which nobody takes
    result = out.to(origin)
    del second
    return result


def _additive(mask: Any, dtype: Any) -> Any:
    """``convert_boolean_attn_mask`` (ATen/native/transformers/attention.cpp)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask.logical_not(), float("-inf"), torch.zeros((), dtype=dtype))


def _sdpa(ledger: Ledger, capability: tuple[int, int], ring: Any = None) -> Any:
    def scaled_dot_product_attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if _is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            cast = [t.to(dtype) if t.dtype == torch.float32 else t for t in (query, key, value)]
            query, key, value = cast
            if attn_mask is not None and attn_mask.dtype == torch.float32:
                attn_mask = attn_mask.to(dtype)
            with torch.autocast("cpu", enabled=False):
                return scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
                )
        kernel = pick_sdpa(query, key, value, attn_mask, dropout_p, is_causal, capability)
        if kernel == "math":
            return _math(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, ledger
            )
        head = query.shape[-1]
        if kernel == "flash":
            if head % 8:
                query, key, value = (F.pad(t, (0, 8 - head % 8)) for t in (query, key, value))
            if ring is not None:
                from ftplan.trace.ring import RingFlash

                return RingFlash.apply(query, key, value, ledger, ring, _Flash)
            out = _Flash.apply(query, key, value, ledger)
            return out[..., :head] if head % 8 else out
        bias = _additive(attn_mask, query.dtype)
        if bias is not None:
            if bias.shape[-1] % 16:
                last = bias.shape[-1]
                bias = F.pad(bias, (0, 16 - last % 16))[..., :last]
            bias = bias.expand(*query.shape[:3], key.shape[2])
        return _Efficient.apply(query, key, value, bias, ledger)

    return scaled_dot_product_attention


class _GroupedMM(torch.autograd.Function):
    """``grouped_mm`` for the dtypes that its CUDA kernel takes and its shape function refuses."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, ledger: Ledger) -> Any:
        with ledger.named_op("_grouped_mm"):
            out = torch.empty(input.shape[0], weight.shape[-1], dtype=input.dtype)
        wants_input, wants_weight, _ = ctx.needs_input_grad  # each needs the other operand alone
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.ledger, ctx.like = (
            ledger,
            tuple((t.shape, t.stride(), t.dtype) for t in (input, weight)),
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _kept = ctx.saved_tensors
        grads = [None, None]
        with ctx.ledger.named_op("_grouped_mm"):
            for place, (shape, stride, dtype) in enumerate(ctx.like):
                if ctx.needs_input_grad[place]:
                    grads[place] = torch.empty_strided(shape, stride, dtype=dtype)
        return *grads, None


def _grouped_mm(original: Any, ledger: Ledger) -> Any:
    def grouped_mm(mat_a: Any, mat_b: Any, *, offs: Any = None, **rest: Any) -> Any:
        if mat_a.dtype == torch.bfloat16:
            return original(mat_a, mat_b, offs=offs, **rest)
        return _GroupedMM.apply(mat_a, mat_b, ledger)

    return grouped_mm


class _HalfSoftmax(torch.autograd.Function):
    """softmax(fp16, dtype=fp32): one CUDA kernel, no fp32 copy of the input, fp16 gradient."""

    @staticmethod
    def forward(ctx: Any, input: Any, ledger: Ledger) -> Any:
        with ledger.named_op("_softmax"):
            out = torch.empty(input.shape, dtype=torch.float32)
        ctx.save_for_backward(out)
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (out,) = ctx.saved_tensors
        with ctx.ledger.named_op("_softmax_backward_data"):
            return torch.empty(out.shape, dtype=torch.float16), None


def _softmax(original: Any, ledger: Ledger) -> Any:
    def softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        if input.dtype == torch.float16 and dtype == torch.float32:
            return _HalfSoftmax.apply(input, ledger)
        return original(input, dim, _stacklevel, dtype)

    return softmax


def flash_attention(ledger: Ledger) -> Any:
    """The attention function of transformers' ``flash_attention_2``, its kernel emulated."""

    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
        dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if query.dtype == torch.float32:
            dtype = torch.bfloat16
            if _is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (t.to(dtype) for t in (query, key, value))
        batch, heads, length, head = query.shape
        if attention_mask is not None:
            # unpad: the valid tokens are gathered, attended and scattered back
            index = torch.empty(batch * length, dtype=torch.int64)
            query, key, value = (
                t.transpose(1, 2).reshape(batch * length, -1, head)[index]
                .view(batch, length, -1, head).transpose(1, 2)
                for t in (query, key, value)
            )  # fmt: skip
        if head % 8:
            query, key, value = (F.pad(t, (0, 8 - head % 8)) for t in (query, key, value))
        out = _Flash.apply(query, key, value, ledger)[..., :head].transpose(1, 2)
        if attention_mask is not None:
            flat = torch.zeros(batch * length, heads, head, dtype=out.dtype)
            flat[index] = out.reshape(batch * length, heads, head)
            out = flat.view(batch, length, heads, head)
        return out, None

    return forward


def _dropout(original: Any) -> Any:
    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p <= 0.0 or p >= 1.0 or inplace:
            return original(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    return dropout


class AutocastLists(TorchFunctionMode):
    """Adds what CUDA's autocast runs in fp32 and a CPU's does not.

    torch 2.13, ATen/autocast_mode.h: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE.
    """

    names = (
        "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
        "reciprocal", "rsqrt", "sinh", "tan", "pow", "softplus", "layer_norm", "native_layer_norm",
        "group_norm", "norm", "nuclear_norm", "cosine_similarity", "poisson_nll_loss",
        "cosine_embedding_loss", "nll_loss", "hinge_embedding_loss", "kl_div", "l1_loss",
        "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss",
        "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
        "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
        "rms_norm", "__pow__", "__rpow__",
    )  # fmt: skip
    with_dtype = ("prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "cross_entropy" and _is_autocast_enabled("cpu") and _low(args[0]):
            return _cross_entropy(*args, **kwargs)
        if (name in _FP32 or name in _FP32_DTYPE) and _is_autocast_enabled("cpu"):
            if name in _FP32:
                args = tuple(_up(value) for value in args)
                kwargs = {key: _up(value) for key, value in kwargs.items()}
            elif _low(args[0] if args else kwargs.get("input")) and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


_FP32 = frozenset(AutocastLists.names)
_FP32_DTYPE = frozenset(AutocastLists.with_dtype)


def _cross_entropy(input: Any, target: Any, *, ignore_index: int = -100, reduction: str = "mean",
                   **rest: Any) -> Any:  # fmt: skip
    """CUDA's autocast has no rule for ``cross_entropy_loss`` (a CPU's runs all of it in fp32).

    It asks ``log_softmax`` for the logits' own dtype, and ``nll_loss`` runs in fp32.
    """
    if rest.get("label_smoothing"):
        raise UnsupportedError("tracing label smoothing under autocast")
    with torch.autocast("cpu", enabled=False):
        scores = F.log_softmax(input, 1 if input.dim() > 1 else 0, dtype=input.dtype)
        return F.nll_loss(
            scores.to(torch.float32), target, rest.get("weight"), ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip


def _low(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in LOW_PRECISION


def _up(value: Any) -> Any:
    return value.to(torch.float32) if _low(value) else value


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for the length of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _no_packed_sequences(original: Any) -> Any:
    def find_packed_sequence_indices(position_ids: Any) -> None:
        # the GPU computes the indices, finds one sequence and drops them: nothing stays
        return None

    return find_packed_sequence_indices


def flash_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    return attention_mask


@contextlib.contextmanager
def as_on_cuda(
    ledger: Ledger, capability: tuple[int, int] = (8, 0), *, padded: bool = True, ring: Any = None
) -> Iterator[None]:
    """Run the block as if the fake CPU tensors were on a CUDA device of that capability.

    ``padded``: a mask that is passed hides something; masks that models make themselves do not.
    ``ring``: the group of ranks around which keys and values go.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.utils import import_utils

    AttentionInterface.register(FLASH, flash_attention(ledger))
    AttentionMaskInterface.register(FLASH, flash_mask)

    ledger.scalar_answer = functools.partial(_scalar, padded=padded)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(patched(F, "scaled_dot_product_attention", _sdpa(ledger, capability, ring)))
        enter(patched(F, "dropout", _dropout(F.dropout)))
        enter(patched(F, "softmax", _softmax(F.softmax, ledger)))
        enter(patched(F, "grouped_mm", _grouped_mm(F.grouped_mm, ledger)))
        enter(patched(import_utils, "is_fake_tensor", lambda tensor: False))
        enter(
            patched(
                masking_utils,
                "find_packed_sequence_indices",
                _no_packed_sequences(masking_utils.find_packed_sequence_indices),
            )
        )
        enter(patched(torch, "is_autocast_enabled", _autocast_enabled))
        enter(AutocastLists())
        yield


def _autocast_enabled(device_type: str = "cuda") -> bool:
    # peft asks about CUDA, where the autocast of this trace would be
    return bool(_is_autocast_enabled("cpu" if device_type == "cuda" else device_type))


def _scalar(tensor: Any, phase: str, *, padded: bool) -> Any:
    """What ``tensor.item()`` says: no value is known, and zero (false) is the useful answer.

    Whether a mask hides nothing is known of the job. In the optimizer's step the answer is one:
    the counter of steps. peft asks whether a random number is above its module dropout, which is
    zero: true; its VB-LoRA, whether a logit is infinite: false.
    """
    if tensor.dtype == torch.bool:
        asker = _asker()
        return asker == "peft" or (asker == "mask" and not padded)
    value = 1 if phase == "step" else 0
    return float(value) if tensor.dtype.is_floating_point else value


def _asker() -> str:
    """Who asks for a truth value: ``peft``, ``mask`` (transformers' masks) or somebody else."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "masking_utils" in name:
            return "mask"
        if "peft" in name or "transformers" in name:
            return "peft" if "transformers" not in name and "vblora" not in name else ""
        frame = frame.f_back
    return ""
