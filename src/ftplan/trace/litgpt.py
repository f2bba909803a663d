"""LitGPT's real model, adapters and loss on fake tensors.

Fabric itself is not run: what it does around the model is four lines of
``lightning/fabric/wrappers.py`` (outputs cast to fp32, the precision's default dtype or autocast
inside), and its quantised layers are bitsandbytes' with weights that were fp16.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ftplan.errors import UnsupportedError
from ftplan.memory.families.native.base import parts_of
from ftplan.memory.families.native.litgpt import ERAS, Era, shape_of
from ftplan.memory.job import AdapterSpec
from ftplan.trace import cuda
from ftplan.trace.ledger import Ledger
from ftplan.trace.native import Loop, require_version
from ftplan.trace.quantized import four_bit

__all__ = ["LOOP"]

VERSIONS = {
    "litgpt": ("0.5.7", "0.5.8", "0.5.9", "0.5.1"),
    "litgpt-0.4": ("0.4.", "0.5.0"),
    "litgpt-0.3": ("0.4.0.dev",),
    "litgpt-2023": ("0.1",),
}
FILES = {"full": "model", "lora": "lora", "qlora": "lora", "llama_adapter": "adapter",
         "llama_adapter_v2": "adapter_v2"}  # fmt: skip


class LitGPT(Loop):
    """``litgpt finetune_*`` on one device."""

    def build(self, config: Mapping[str, Any], layers: int | None) -> Any:
        """The method's ``GPT`` of that shape."""
        job = self.job
        self.era = ERAS[job.stack]
        self.runs_on = ("torch", "lightning", "bitsandbytes")
        self.package = "lit-gpt" if job.stack == "litgpt-2023" else "litgpt"
        require_version(self.package, job.stack, VERSIONS[job.stack])
        if job.method not in FILES:
            raise UnsupportedError(f"tracing the method {job.method!r} in LitGPT")
        root = self.package.replace("-", "_")
        self.utils = importlib.import_module(f"{root}.utils")
        module = importlib.import_module(f"{root}.{FILES[job.method]}")
        base = importlib.import_module(f"{root}.model").GPT
        self.dtype = getattr(torch, job.compute_dtype if job.quantized else job.weights)
        made = module.Config(**_fields(module.Config, self.era, config, layers, self._lora()))
        with cuda.patched(base, "rope_cache", _no_table), torch.device("meta"):
            model = module.GPT(made).to(self.dtype)
        mark = {"lora": "mark_only_lora_as_trainable",
                "adapter": "mark_only_adapter_as_trainable",
                "adapter_v2": "mark_only_adapter_v2_as_trainable"}  # fmt: skip
        if job.method != "full":
            getattr(module, mark[FILES[job.method]])(model)
        return model.train()

    def _lora(self) -> dict[str, Any]:
        """The keys of ``finetune_lora`` for the plan's targets."""
        job = self.job
        if job.method not in ("lora", "qlora"):
            return {}
        spec = AdapterSpec(kind="lora", rank=job.rank, targets=job.targets, dtype="bf16")
        parts = parts_of(spec)
        keys: dict[str, Any] = {"r": job.rank, "alpha": job.alpha, "dropout": job.dropout}
        if self.package == "lit-gpt":
            return keys | {f"to_{part}": part in parts for part in PARTS}
        keys = {f"lora_{key}": value for key, value in keys.items()}
        return keys | {f"lora_{part}": part in parts for part in PARTS}

    def prepare(self, ledger: Ledger) -> None:
        """Sines for the longest sample, quantised matrices, the embedding that bitsandbytes wants,
        and the validation that comes before training."""
        model, job = self.model, self.job
        table: tuple[int, ...] = (job.seq_len, model.config.rope_n_elem)
        if getattr(model.config, "rope_local_base_freq", None):
            table += (2,)
        model._max_seq_length = job.seq_len
        model.cos, model.sin = torch.empty(table), torch.empty(table)
        if job.quantized:
            self._quantize()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if job.quantized and self.era.stable_embedding:
            self._stabilise()
        ids = torch.empty(job.micro, job.seq_len, dtype=torch.int64)
        model.eval()
        with torch.no_grad():
            self._returned(ids)
        model.train()

    def _quantize(self) -> None:
        import bitsandbytes

        stored = dataclasses.replace(self.job, compute_dtype="float16")
        shared: dict[str, Any] = {}
        for path, module in list(self.model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            rows, columns = module.weight.shape
            new = four_bit(bitsandbytes, stored, rows, columns, module.bias, shared)
            new.compute_dtype = self.dtype
            setattr(self.model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)

    def _stabilise(self) -> None:
        from bitsandbytes.nn import StableEmbedding

        self.replaced = self.model.transformer.wte
        shape = (self.replaced.num_embeddings, self.replaced.embedding_dim)
        with torch.device("meta"):
            new = StableEmbedding(*shape).to(self.dtype)
        for part in (new, new.norm):
            for name, old in list(part._parameters.items()):
                part._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=self.dtype))
        self.model.transformer.wte = new

    def shard(self, mesh: Any) -> Any:
        """Fabric's ``FSDPStrategy(auto_wrap_policy={Block})``, and its checkpoints inside."""
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        job = self.job
        computed = self.dtype if job.mixed == "no" else getattr(torch, job.mixed)
        policy = ModuleWrapPolicy({type(self.model.transformer.h[0])})
        self.model = FullyShardedDataParallel(
            self.model, process_group=torch.distributed.group.WORLD, auto_wrap_policy=policy,
            mixed_precision=MixedPrecision(
                param_dtype=computed, reduce_dtype=computed, buffer_dtype=computed
            ),
            use_orig_params=True, limit_all_gathers=True, device_id=torch.device("cpu"),
        )  # fmt: skip
        if job.checkpointing == "full":
            wrap = functools.partial(
                wrapper.checkpoint_wrapper, preserve_rng_state=False,
                checkpoint_impl=wrapper.CheckpointImpl.NO_REENTRANT,
            )  # fmt: skip
            wrapper.apply_activation_checkpointing(
                self.model, checkpoint_wrapper_fn=wrap, auto_wrap_policy=policy
            )
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        return self.model

    def optimised(self) -> Sequence[Any]:
        """What asked for gradients before the embedding was replaced."""
        return self._trained

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """The precision plugin's ``forward_context``."""
        if self.job.mixed != "no":
            with torch.autocast("cpu", dtype=getattr(torch, self.job.mixed)):
                yield
            return
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    def _returned(self, ids: Any, **more: Any) -> Any:
        """What ``_FabricModule`` returns: floats in fp32, all of them before any of the others
        goes."""
        with self._precision():
            output = self.model(ids, **more)
        if isinstance(output, list):
            return [chunk.to(torch.float32) for chunk in output]
        return output.to(torch.float32)

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        """The loop's names are kept until the next batch has been through the model."""
        entropy = self.utils.chunked_cross_entropy
        if self.era.longest_first:
            self.logits = self.loss = None
        if self.job.method == "full":
            self.logits = self._returned(input_ids)
            self.loss = entropy(self.logits[..., :-1, :], labels[..., 1:])
        else:
            self.logits = self._returned(input_ids, lm_head_chunk_size=128)
            self.logits[-1] = self.logits[-1][..., :-1, :]
            self.loss = entropy(self.logits, labels[..., 1:])
        return {"loss": self.loss}


LOOP = LitGPT
PARTS = ("query", "key", "value", "projection", "mlp", "head")


def _no_table(self: Any, device: Any = None) -> Any:
    """Sines are sizes here, and set once the job's length is known."""
    return torch.empty(1, 1), torch.empty(1, 1)


def _fields(
    kind: Any, era: Era, config: Mapping[str, Any], layers: int | None, lora: dict[str, Any]
) -> dict[str, Any]:
    """The shape in the words of that version's ``Config``."""
    shape = dataclasses.asdict(shape_of(config))
    if layers is not None:
        shape["n_layer"] = layers
    named = {"block_size": 1 << 20, "name": "Gemma" if shape["scale_embeddings"] else "", **lora}
    fields = {field.name for field in dataclasses.fields(kind)}
    window = shape.pop("sliding_window_indices")
    if not any(era.slides(shape_of(config), layer) for layer in range(shape["n_layer"])):
        window = shape["sliding_window_size"] = None
    every = {True: "all", False: "interleaved"}[bool(window) and all(window)]
    old = {"norm_class_name": "_norm_class", "mlp_class_name": "_mlp_class"}
    for name, value in shape.items():
        named[name if name in fields else old.get(name, name)] = value
    if "sliding_window_layer_placing" in fields and window:
        named["sliding_window_layer_placing"] = every
    elif "sliding_window_indices" in fields and window:
        named["sliding_window_indices"] = list(window)
        if shape["rope_local_base_freq"]:
            named["rope_indices"] = list(window)
    return {name: value for name, value in named.items() if name in fields and value is not None}
