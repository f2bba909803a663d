"""Transformer Engine's autograd functions in torch's operations, for machines that cannot run them.

The package is CUDA libraries with Python around them. What stands here takes its place in
``sys.modules`` so that Megatron-Core's and mcore-bridge's real code runs on it: each function saves
what the original saves, makes what it makes in that order, and communicates where it does.

Source: NVIDIA/TransformerEngine transformer_engine/pytorch, 2.20.0.dev0 (commit d0067d0da):
module/{linear,layernorm_linear,grouped_linear,base}.py, ops/basic/rmsnorm.py, utils.py,
attention/dot_product_attention/{dot_product_attention,utils,backends}.py.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["forget", "install"]

VERSION = "2.2.0"
"""What Megatron-Core is told: new enough for grouped layers, older than what it asks more of."""
_DUMMIES: dict[tuple[Any, ...], Any] = {}


def _gather(x: Any, size: int) -> Any:
    return x.new_empty((x.shape[0] * size, *x.shape[1:]))


def _scatter(x: Any, size: int) -> Any:
    return x.new_empty((x.shape[0] // size, *x.shape[1:]))


def _dummy(weight: Any) -> Any:
    """``get_dummy_wgrad``: one tensor of each shape, for good."""
    key = (*weight.shape, weight.dtype)
    if key not in _DUMMIES:
        _DUMMIES[key] = torch.empty(weight.shape, dtype=weight.dtype)
    return _DUMMIES[key].detach()


def _added(weight: Any, grad: Any, x: Any) -> Any:
    """The weight's gradient, added to ``main_grad`` by the product that makes it."""
    if not weight.requires_grad:
        return None
    weight.grad_added_to_main_grad = True
    return _dummy(weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, layer: Any) -> Any:
        total = _gather(x, layer.tp_size) if layer.gathers else x
        out = torch.nn.functional.linear(total, weight, bias)
        del total
        if layer.scatters:
            out = _scatter(out, layer.tp_size)
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.layer, ctx.wants, ctx.biased = layer, x.requires_grad, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        dgrad, wgrad, bgrad = _linear_backward(ctx, grad, x, weight)
        return dgrad, wgrad, bgrad, None


def _linear_backward(ctx: Any, grad: Any, x: Any, weight: Any) -> tuple[Any, Any, Any]:
    layer = ctx.layer
    grad = _gather(grad, layer.tp_size) if layer.scatters else grad
    total = x
    if layer.gathers and weight.requires_grad:
        total = _gather(x, layer.tp_size)
    made = grad.matmul(weight) if ctx.wants else None
    own = _scatter(made, layer.tp_size) if layer.gathers and made is not None else made
    wgrad = _added(weight, grad, total)
    bgrad = None
    if ctx.biased and ctx.needs_input_grad[2]:
        bgrad = grad.new_empty(weight.shape[0])
    return own, wgrad, bgrad


def _norm(x: Any, weight: Any) -> tuple[Any, Any]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


class _LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, norm_weight: Any, weight: Any, bias: Any, layer: Any) -> Any:
        normal, root = _norm(x, norm_weight)
        total = _gather(normal, layer.tp_size) if layer.gathers else normal
        out = torch.nn.functional.linear(total, weight, bias)
        del total
        returned = layer.return_layernorm_output
        kept = normal if weight.requires_grad or returned else None
        ctx.save_for_backward(x, weight, norm_weight, kept, root)
        ctx.layer, ctx.wants, ctx.biased = layer, True, False
        ctx.dgrad, ctx.with_bias, ctx.returned = x.requires_grad, bias is not None, returned
        return (out, normal.view_as(normal)) if returned else out

    @staticmethod
    def backward(ctx: Any, grad: Any, more: Any = None) -> Any:
        _x, weight, norm_weight, normal, _root = ctx.saved_tensors
        dgrad, wgrad, _ = _linear_backward(ctx, grad, normal, weight)
        if ctx.returned:
            dgrad = dgrad + more.view_as(dgrad)
        own, dgamma = torch.empty_like(dgrad), torch.empty_like(norm_weight)
        bias = grad.new_empty(weight.shape[0]) if ctx.with_bias else None
        return own, dgamma, wgrad, bias, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Any, weight: Any) -> Any:
        x = given.contiguous()
        out, root = _norm(x, weight)
        ctx.save_for_backward(x, root)
        ctx.width = weight.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, _root = ctx.saved_tensors
        return torch.empty_like(x), x.new_empty(ctx.width)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, *weights: Any) -> Any:
        first = weights[0]
        out = x.new_empty((x.shape[0], first.shape[0]))
        ctx.save_for_backward(x if first.requires_grad else None, *weights)
        ctx.wants = x.requires_grad
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, *weights = ctx.saved_tensors
        dgrad = grad.new_empty((grad.shape[0], weights[0].shape[1])) if ctx.wants else None
        return dgrad, *(_added(weight, grad, x) for weight in weights)


class _FlashAttention(torch.autograd.Function):
    """FlashAttention 2 over packed tokens: queries, keys, values, output, a log-sum-exp a head."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)
        sums = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        state = [torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)]
        ctx.save_for_backward(q, k, v, out, sums, *state)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tokens, heads, width = q.shape
        rounded = -(-tokens // 128) * 128 + 128
        held = [q.new_empty((heads, rounded), dtype=torch.float32)]
        held.append(q.new_empty((rounded, heads, width), dtype=torch.float32))
        if k.shape[1] != heads:  # of every query head, summed afterwards
            held += [q.new_empty((tokens, heads, width)), q.new_empty((tokens, heads, width))]
        held.clear()
        return grads


class _SplitAlongDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dim: int, sizes: Any) -> Any:
        ctx.dim = dim
        return torch.split(x, sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.cat(grads, dim=ctx.dim), None, None


class _Layer(nn.Module):
    """What the modules have in common: sizes of a rank's part."""

    def _set(self, in_features: int, out_features: int, given: dict[str, Any]) -> None:
        self.parallel_mode, self.tp_size = given.get("parallel_mode"), given.get("tp_size", 1)
        self.tp_group = given.get("tp_group")
        self.sequence_parallel = bool(given.get("sequence_parallel")) and self.tp_size > 1
        self.in_features = in_features // (self.tp_size if self.parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if self.parallel_mode == "column" else 1)
        self.gathers = self.sequence_parallel and self.parallel_mode == "column"
        self.scatters = self.sequence_parallel and self.parallel_mode == "row"
        self.return_bias, self.use_bias = given.get("return_bias", False), given.get("bias", True)

    def _weight(self, *shape: int) -> Any:
        return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))


class Linear(_Layer):
    """``te.Linear``."""

    def __init__(self, in_features: int, out_features: int, **given: Any) -> None:
        super().__init__()
        self._set(in_features, out_features, given)
        self.weight = self._weight(self.out_features, self.in_features)
        self.bias = self._weight(self.out_features) if self.use_bias else None

    def forward(self, x: Any, is_first_microbatch: Any = None) -> Any:
        bias = None if self.return_bias else self.bias
        out = _Linear.apply(x, self.weight, bias, self)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(_Layer):
    """``te.LayerNormLinear`` with an RMSNorm."""

    def __init__(self, in_features: int, out_features: int, **given: Any) -> None:
        super().__init__()
        self._set(in_features, out_features, given)
        self.layer_norm_weight = self._weight(in_features)
        self.weight = self._weight(self.out_features, self.in_features)
        self.bias = self._weight(self.out_features) if self.use_bias else None
        self.return_layernorm_output = bool(given.get("return_layernorm_output"))

    def forward(self, x: Any, is_first_microbatch: Any = None) -> Any:
        bias = None if self.return_bias else self.bias
        made = _LayerNormLinear.apply(x, self.layer_norm_weight, self.weight, bias, self)
        out, normal = made if self.return_layernorm_output else (made, None)
        if self.return_bias:
            return (out, self.bias, normal) if normal is not None else (out, self.bias)
        return (out, normal) if normal is not None else out


class GroupedLinear(_Layer):
    """``te.GroupedLinear``: a matrix for each of a rank's experts."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **given: Any) -> None:
        super().__init__()
        self._set(in_features, out_features, given)
        self.num_gemms = num_gemms
        for number in range(num_gemms):
            weight = self._weight(self.out_features, self.in_features)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: Any, m_splits: Any, is_first_microbatch: Any = None) -> Any:
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        out = _GroupedLinear.apply(x, *weights)
        return (out, None) if self.return_bias else out


class RMSNorm(nn.Module):
    """``te.RMSNorm``."""

    def __init__(self, hidden_size: int, **_given: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.bfloat16))

    def forward(self, x: Any) -> Any:
        return _RMSNorm.apply(x, self.weight)


class DotProductAttention(nn.Module):
    """``te.DotProductAttention`` where FlashAttention runs: what lies apart is laid together."""

    def __init__(self, *_given: Any, **_more: Any) -> None:
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, *_rest: Any, **_more: Any) -> Any:
        query, key, value = (x.contiguous() for x in (query, key, value))
        out = _FlashAttention.apply(query, key, value)
        return out.view(out.shape[0], -1)


class _Nothing:
    """A name that Megatron-Core imports and these jobs do not use."""

    def __init__(self, *_given: Any, **_more: Any) -> None:
        pass

    def __class_getitem__(cls, _item: Any) -> Any:
        return cls

    def __getattr__(self, _name: str) -> Any:
        return self

    def __call__(self, *_given: Any, **_more: Any) -> Any:
        return self

    def is_fp8_enabled(self) -> bool:
        return False


class _Package(ModuleType):
    """A module of the package: what it lacks is a class of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Nothing,), {})
        setattr(self, name, made)
        return made


def forget() -> None:
    """Let go of what stands for gradients."""
    _DUMMIES.clear()


def install() -> None:
    """Stand in for the package, before Megatron-Core is imported."""
    names = (
        "", "pytorch", "common", "common.recipe", "pytorch.fp8", "pytorch.distributed",
        "pytorch.attention", "pytorch.attention.rope", "pytorch.ops",
        "pytorch.float8_tensor", "pytorch.tensor", "pytorch.optimizers", "pytorch.utils",
        "pytorch.module",
        "pytorch.module.base",
    )  # fmt: skip
    made: dict[str, Any] = {}
    for name in names:
        path = f"transformer_engine.{name}".rstrip(".")
        module = made[name] = _Package(path)
        module.__path__ = []
        module.__spec__ = ModuleSpec(path, None)
        sys.modules[path] = module
        parent, _, own = name.rpartition(".")
        if name:
            setattr(made[parent], own, module)
    made[""].__version__ = VERSION
    for kind in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
        setattr(made["pytorch"], kind.__name__, kind)
    made["pytorch.module.base"].get_dummy_wgrad = lambda shape, dtype, **_: _dummy(
        torch.empty(shape, dtype=dtype, device="meta")
    )
    made["pytorch"].LayerNorm = type("LayerNorm", (nn.Module,), {})
    made["pytorch.attention"]._SplitAlongDim = _SplitAlongDim
