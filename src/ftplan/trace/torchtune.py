"""torchtune's real model, adapters and loss on fake tensors.

NF4 weights are torchao's as to what they hold and how they are expanded: a tensor subclass cannot
be fake, so its parts are fake tensors and its own ``get_original_weight`` runs on them.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ftplan.errors import UnsupportedError
from ftplan.memory.families.native.base import parts_of
from ftplan.memory.families.native.torchtune import ERAS, METHODS, Shape, shape_of
from ftplan.memory.job import AdapterSpec
from ftplan.trace import cuda
from ftplan.trace.ledger import Ledger
from ftplan.trace.native import Loop, require_version

__all__ = ["LOOP"]

VERSIONS = {
    "torchtune": ("0.7.",),
    "torchtune-0.6": ("0.5.", "0.6."),
    "torchtune-0.4": ("0.3.", "0.4."),
    "torchtune-0.1": ("0.1.",),
}
CHUNKS = 8
"""``num_output_chunks``."""
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "output_proj"}


class Torchtune(Loop):
    """``full_finetune_single_device`` and ``lora_finetune_single_device``."""

    package = "torchtune"
    runs_on = ("torch", "torchao")

    def build(self, config: Mapping[str, Any], layers: int | None) -> Any:
        """The builder's ``TransformerDecoder`` of that shape."""
        job = self.job
        require_version(self.package, job.stack, VERSIONS[job.stack])
        if job.method not in METHODS:
            raise UnsupportedError(f"tracing the method {job.method!r} in torchtune")
        self.era, shape = ERAS[job.stack], shape_of(config)
        self.dtype = getattr(torch, job.compute_dtype if job.quantized else job.weights)
        fields = {
            "vocab_size": shape.vocab_size, "num_layers": layers or shape.num_layers,
            "num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim, "embed_dim": shape.embed_dim,
            "intermediate_dim": shape.intermediate_dim, "max_seq_len": shape.max_seq_len,
            "tie_word_embeddings": shape.tied, "hidden_capping_value": shape.softcapping,
            "final_capping_value": shape.final_capping, "sliding_window_size": 4096,
            "norm_eps": 1e-5, "rope_base": 10_000, **self._adapter(shape.tied),
        }  # fmt: skip
        if shape.kind in ("qwen2", "qwen3"):
            fields |= {f"{name}_proj_bias": shape.kind == "qwen2" for name in "qkv"}
            fields |= {f"{name}_norm": shape.kind == "qwen3" for name in "qk"}
        name = _builder(shape)
        module = importlib.import_module(f"torchtune.models.{name}._component_builders")
        builder = getattr(module, name if job.method == "full" else f"lora_{name}")
        known = inspect.signature(builder).parameters
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device("meta"):
                model = builder(**{key: value for key, value in fields.items() if key in known})
        finally:
            torch.set_default_dtype(torch.float32)
        return model.train()

    def _adapter(self, tied: bool) -> dict[str, Any]:
        job = self.job
        if job.method == "full":
            return {}
        spec = AdapterSpec(kind="lora", rank=job.rank, targets=job.targets, dtype="bf16")
        parts = parts_of(spec)
        return {
            "lora_attn_modules": [name for part, name in _ATTENTION.items() if part in parts],
            "apply_lora_to_mlp": "mlp" in parts,
            "apply_lora_to_output": "head" in parts and not tied,
            "lora_rank": job.rank, "lora_alpha": job.alpha, "lora_dropout": job.dropout,
        }  # fmt: skip

    def prepare(self, ledger: Ledger) -> None:
        """Freeze, quantise, checkpoint, and give the loss what it takes."""
        job, model = self.job, self.model
        if job.method != "full":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        for module in model.modules():
            if hasattr(module, "rope_init"):  # a table for the longest sequence, in fp32
                pairs = module.dim // 2
                wide = "Qwen" in type(module).__name__ or "Phi" in type(module).__name__
                shape = (2 * module.dim,) if wide else (pairs, 2)
                module.cache = torch.empty(module.max_seq_len, *shape)
                module.is_cache_built = True
        if job.quantized:
            self._quantize()
        if job.checkpointing == "full":
            self._checkpoint()
        elif job.checkpointing != "none":
            raise UnsupportedError(f"tracing {job.checkpointing} checkpointing in torchtune")
        self.entropy: Any = nn.CrossEntropyLoss()
        if job.loss == "chunked" and self.era.loss == "linear":
            from torchtune.modules.loss import LinearCrossEntropyLoss

            self.entropy = LinearCrossEntropyLoss(num_output_chunks=CHUNKS)
            self.entropy.set_model_output(model)
        elif job.loss == "chunked":
            from torchtune.modules.loss import CEWithChunkedOutputLoss

            self.entropy = CEWithChunkedOutputLoss(num_output_chunks=CHUNKS)
            model.set_num_output_chunks(CHUNKS)

    def shard(self, mesh: Any) -> Any:
        """``setup_model`` of the distributed recipes: FSDP2 of layers, and of what is named."""
        from torchtune.training import _distributed

        job = self.job
        names = {"embeddings": "tok_embeddings", "output": "output"}
        condition = functools.partial(
            _distributed.get_shard_conditions, names_to_match=[names[name] for name in job.apart]
        )
        copied = hasattr(_distributed, "deepcopy")  # 0.7: a fake mesh cannot be copied deep
        with cuda.patched(_distributed, "deepcopy", dict) if copied else nullcontext():
            _distributed.shard_model(
                model=self.model, shard_conditions=[condition], dp_mesh=mesh, cpu_offload=False,
                reshard_after_forward=job.reshard_after_forward,
            )  # fmt: skip
        # with the torch of its time, until 2.7, a root was never freed
        self.model._get_fsdp_state()._auto_reshard_after_forward = True
        return self.model

    def _checkpoint(self) -> None:
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        # the random state that a checkpoint stows is host memory
        wrap = functools.partial(wrapper.checkpoint_wrapper, preserve_rng_state=False)
        wrapper.apply_activation_checkpointing(
            self.model, checkpoint_wrapper_fn=wrap,
            auto_wrap_policy=ModuleWrapPolicy({type(self.model.layers[0])}),
        )  # fmt: skip

    def _quantize(self) -> None:
        """QLoRA's weights: those of adapted matrices, and in most models of all of a layer."""
        from torchtune.modules.peft import LoRALinear

        everything = shape_of_model_quantises_all(self.model)
        for layer in self.model.layers:
            for module in layer.modules():
                if isinstance(module, LoRALinear):
                    module.forward = functools.partial(_lora_forward, module)
                elif type(module) is nn.Linear and everything and not _is_thin(module, self.job):
                    module.forward = functools.partial(_linear_forward, module)
                else:
                    continue
                module.nf4 = _packed(module.weight.shape, self.dtype)
                module.register_parameter("weight", None)

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        """``_loss_step``."""
        if self.era.loss == "shifted":
            self.logits = self.model(input_ids)
            self.logits = self.logits[..., :-1, :].contiguous()
            labels = labels[..., 1:].contiguous()
            self.logits = self.logits.transpose(1, 2)
            # CUDA's log_softmax lays out what it reads (aten/src/ATen/native/cuda/SoftMax.cu)
            laid_out = self.logits.contiguous().detach()
            loss = self.entropy(self.logits, labels)
            del laid_out
            return {"loss": loss}
        outputs = self.model(input_ids)
        if not isinstance(outputs, list) and self.job.loss == "full":
            labels = labels.reshape(-1)
            outputs = outputs.reshape(-1, outputs.size(-1))
        with cuda.patched(torch, "where", _where(torch.where)):
            loss = self.entropy(outputs, labels)
        del outputs
        return {"loss": loss}


LOOP = Torchtune


def _builder(shape: Shape) -> str:
    if shape.kind != "llama":
        return shape.kind
    if shape.tied:
        return "llama3_2"
    return "llama3_1" if shape.shares_table else "llama2"


def shape_of_model_quantises_all(model: Any) -> bool:
    """Whether the builder's other matrices are NF4 too: not in Qwen's."""
    return not any("Qwen" in type(module).__name__ for module in model.modules())


def _is_thin(module: Any, job: Any) -> bool:
    return job.rank in (module.in_features, module.out_features)


def _packed(shape: Any, dtype: Any) -> Any:
    """The parts of an ``NF4Tensor`` of that shape."""
    from torchtune.modules.peft import lora

    kind = inspect.getmodule(lora.linear_nf4).NF4Tensor  # type: ignore[union-attr]
    blocks = shape.numel() // 64
    parts = SimpleNamespace(
        shape=shape, dtype=dtype, block_size=64, scaler_block_size=256, n_blocks=blocks,
        quantized_data=torch.empty(shape.numel() // 2, dtype=torch.uint8),
        quantized_scalers=torch.empty(blocks, dtype=torch.int8),
        quantization_factor=torch.empty(max(1, blocks // 256), dtype=dtype),
        scaler_mean=torch.empty((), dtype=dtype), nf4=torch.empty(16, dtype=dtype),
        dequantize=kind.dequantize,
    )  # fmt: skip
    parts.dequantize_scalers = functools.partial(kind.dequantize_scalers, parts)
    parts.whole = functools.partial(kind.get_original_weight, parts)
    return parts


class _LinearNF4(torch.autograd.Function):
    """torchao's ``LinearNF4``."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any) -> Any:
        ctx.weight = weight
        return torch.nn.functional.linear(input, weight.whole())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad @ ctx.weight.whole(), None


def _linear_forward(module: Any, x: Any) -> Any:
    """``FrozenNF4Linear.forward``."""
    out = _LinearNF4.apply(x, module.nf4)
    return out if module.bias is None else out + module.bias


def _lora_forward(module: Any, x: Any) -> Any:
    """``LoRALinear.forward`` with a quantised base."""
    out = _linear_forward(module, x)
    lora_out = module.lora_a(module.dropout(x))
    lora_out = (module.alpha / module.rank) * module.lora_b(lora_out)
    return out + lora_out


def _where(original: Any) -> Any:
    def where(condition: Any, *others: Any) -> Any:
        """Which tokens are valid: all of them, which fake tensors cannot tell."""
        if others:
            return original(condition, *others)
        return (torch.empty(condition.numel(), dtype=torch.int64),)

    return where
