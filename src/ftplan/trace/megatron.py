"""Megatron-Core's real modules on fake tensors: a rank's micro batch, with its gradient buffers.

    python -m ftplan.trace.megatron [--out validation/trainers]

Transformer Engine's functions are stood in for (:mod:`ftplan.trace.transformer_engine`); kernels
that ``torch.compile`` makes are one operation each, with the buffers that inductor of torch 2.13
allocates beside their outputs; communication carries nothing; and every expert gets an even share
of the tokens. The rest, mcore-bridge's adapters, ms-swift's trainers (:mod:`megatron_swift`) and
Megatron's schedules included, is the packages' own code.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ftplan.trace import megatron_swift, transformer_engine
from ftplan.trace.ledger import Ledger

__all__ = ["JOBS", "main", "record", "trace"]

Job = Mapping[str, Any]
"""A line of the bench: name, layers, stage (of a pipeline) and plan."""


def _job(name: str, model: str, layers: int, **plan: Any) -> Job:
    sharding = {"kind": "none", **plan.pop("sharding", {})}
    ranks = sharding.get("tp", 1) * sharding.get("ep", 1) * sharding.get("pp", 1)
    shape, batches = plan.pop("shape", (1, 1024)), plan.pop("batches", 1)
    way = {
        "version": 1, "model": model, "stack": "megatron", "task": "sft",
        "precision": {"weights": "bf16", "mixed": "no"}, "method": {"kind": "full"},
        "batch": {"micro": shape[0], "seq_len": shape[1], "accumulation": batches,
                  "packing": True},
        "optimizer": "adamw_torch_fused", "gradient_checkpointing": False, "attention": "flash",
        "loss": "full", "hardware": {"gpu": "a100-80gb", "count": ranks}, "sharding": sharding,
        **plan,
    }  # fmt: skip
    if way["task"] in ("rm", "classify"):
        del way["loss"]
    return {"name": f"megatron {name}", "layers": layers, "plan": way}


_LORA = {
    "kind": "lora",
    "rank": 8,
    "targets": "all-linear",
    "dropout": 0.0,
    "adapter_dtype": "bf16",
}
_DROPS = {**_LORA, "dropout": 0.05}
_FULL = {"kind": "full", "reentrant": True}
_CORE = {"kind": "selective", "reentrant": True}
_TP2 = {"tp": 2, "sequence_parallel": True}
_TP4 = {"tp": 4, "sequence_parallel": True}

JOBS: tuple[Job, ...] = (
    _job("full", "llama-3.1-8b", 2),
    _job("full-micro", "llama-3.2-1b", 3, shape=(3, 512)),
    _job("full-selective", "qwen2.5-7b", 3, gradient_checkpointing=_CORE),
    _job("full-recomputed", "qwen3-8b", 4, gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("full-tp2", "llama-3.1-8b", 2, sharding={"tp": 2}),
    _job("full-tp2-sp", "qwen3-8b", 3, sharding=_TP2, shape=(1, 2048)),
    _job("full-tp4-sp", "qwen2.5-7b", 3, sharding=_TP4, shape=(2, 1024)),
    _job("full-tp4-sp-recomputed", "qwen2.5-7b", 4, sharding=_TP4, shape=(1, 4096),
         gradient_checkpointing=_FULL),
    _job("full-tied", "qwen2.5-0.5b", 3, shape=(2, 512)),
    _job("full-tied-tp2-sp", "qwen3-4b", 3, sharding=_TP2, gradient_checkpointing=_FULL),
    _job("lora", "llama-3.1-8b", 3, method=_LORA),
    _job("lora-dropout", "qwen3-8b", 3, method=_DROPS),
    _job("lora-recomputed", "qwen2.5-7b", 4, method=_DROPS, gradient_checkpointing=_FULL,
         shape=(1, 2048)),
    _job("lora-tp2-sp", "qwen3-8b", 3, method=_LORA, sharding=_TP2),
    _job("lora-tp4-sp-recomputed", "qwen2.5-7b", 4, method=_DROPS, sharding=_TP4,
         gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("lora-tp2", "llama-3.1-8b", 3, method=_LORA, sharding={"tp": 2}),
    _job("mixture", "qwen3-30b-a3b", 2, shape=(1, 512)),
    _job("mixture-recomputed", "qwen3-30b-a3b", 3, gradient_checkpointing=_FULL,
         sharding={"ep": 8}),
    _job("mixture-ep4", "qwen3-30b-a3b", 2, sharding={"ep": 4}, shape=(1, 2048)),
    _job("mixture-lora", "qwen3-30b-a3b", 2, method=_LORA, shape=(1, 512)),
    _job("mixture-lora-recomputed", "qwen3-30b-a3b", 3, method=_DROPS, sharding={"ep": 2},
         gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("mixture-lora-ep4-recomputed", "qwen3-30b-a3b", 3, method={**_DROPS, "rank": 32},
         sharding={"ep": 4}, gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("mixture-mixtral", "mixtral-8x7b", 2, sharding={"ep": 4}, shape=(1, 1024)),
    _job("mixture-shared", "qwen1.5-moe-a2.7b", 2, sharding={"ep": 4}, shape=(1, 1024)),
    _job("dpo", "qwen3-4b", 3, task="dpo", reference="model", shape=(1, 2048)),
    _job("dpo-tp2-sp-recomputed", "qwen2.5-7b", 3, task="dpo", reference="model", sharding=_TP2,
         gradient_checkpointing=_FULL, shape=(1, 4096)),
    _job("dpo-lora", "llama-3.1-8b", 3, task="dpo", reference="adapter", method=_DROPS),
    _job("dpo-mixture-lora-recomputed", "qwen3-30b-a3b", 2, task="dpo", reference="adapter",
         method=_DROPS, sharding={"ep": 2}, gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("kto", "qwen2.5-7b", 2, task="kto", reference="model", shape=(1, 2048)),
    _job("kto-tp2-sp-recomputed", "qwen2.5-7b", 3, task="kto", reference="model", sharding=_TP2,
         gradient_checkpointing=_FULL, shape=(1, 4096)),
    _job("kto-lora", "qwen3-8b", 3, task="kto", reference="adapter", method=_LORA),
    _job("rm", "qwen2.5-7b", 3, task="rm"),
    _job("rm-lora-recomputed", "qwen3-8b", 4, task="rm", method=_DROPS,
         gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("rm-tp2-sp", "qwen3-8b", 3, task="rm", sharding=_TP2, shape=(1, 2048)),
    _job("classify-tp2-sp-recomputed", "qwen2.5-7b", 4, task="classify", sharding=_TP2,
         gradient_checkpointing=_FULL, shape=(1, 4096)),
    _job("classify-lora-tp2-sp", "qwen3-8b", 3, task="classify", method=_LORA, sharding=_TP2),
    _job("classify-mixture-lora-recomputed", "qwen3-30b-a3b", 2, task="classify", method=_DROPS,
         sharding={"ep": 2}, gradient_checkpointing=_FULL, shape=(1, 2048)),
    _job("pipeline", "llama-3.1-8b", 4, sharding={"pp": 2}, batches=4),
    _job("pipeline-recomputed", "qwen2.5-7b", 6, sharding={"pp": 2}, batches=4, shape=(1, 2048),
         gradient_checkpointing=_FULL),
    _job("pipeline-tp2-sp", "qwen3-8b", 4, sharding={"pp": 2, **_TP2}, batches=4, shape=(1, 2048)),
    _job("pipeline-four-stages", "qwen3-8b", 8, sharding={"pp": 4}, batches=8),
    _job("pipeline-lora", "qwen3-8b", 6, method=_DROPS, sharding={"pp": 2}, batches=4),
)  # fmt: skip


class _Work:
    """What a communication returns."""

    def wait(self) -> None:
        pass


def _carry_nothing(*_given: Any, **_more: Any) -> _Work:
    return _Work()


class _Counts(list[int]):
    """Numbers of tokens that are known without asking a device."""

    def tolist(self) -> list[int]:
        return list(self)

    def ravel(self) -> _Counts:
        return self

    @property
    def T(self) -> _Counts:
        return self


def _bridge() -> None:
    """mcore-bridge without its package's imports, of which its adapters need one function."""
    found = importlib.util.find_spec("mcore_bridge")
    assert found is not None and found.submodule_search_locations
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("mcore_bridge", "mcore_bridge.utils", "mcore_bridge.tuners"):
        module: Any = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    sys.modules["mcore_bridge.utils"].get_current_device = lambda: "cpu"  # type: ignore[attr-defined]
    importlib.import_module("mcore_bridge.tuners.lora")  # before anything is patched


def _core(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


class _Selected(torch.autograd.Function):
    """``masked_select`` of so many elements as are known to be chosen."""

    @staticmethod
    def forward(ctx: Any, x: Any, mask: Any, count: int) -> Any:
        ctx.save_for_backward(mask)
        ctx.dtype = x.dtype
        return x.new_empty(count)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grad.new_empty(mask.shape), None, None


def _permute(tokens: Any, routing_map: Any, probs: Any = None, num_out_tokens: Any = None,
             fused: bool = False, drop_and_pad: bool = False) -> Any:  # fmt: skip
    """``moe_utils.permute``, not fused, for a known number of rows."""
    routing_map = routing_map.bool().T.contiguous()
    indices = torch.arange(tokens.shape[0]).unsqueeze(0).expand(routing_map.shape[0], -1)
    sorted_indices = indices.new_empty(num_out_tokens)
    chosen = _Selected.apply(probs.T.contiguous(), routing_map, num_out_tokens)
    return tokens.index_select(0, sorted_indices), chosen, sorted_indices


def _preprocess(self: Any, routing_map: Any) -> Any:
    """``MoEAlltoAllTokenDispatcher.preprocess`` where every expert gets as much."""
    self.num_out_tokens = total = routing_map.shape[0] * self.config.moe_router_topk
    even = [total // self.ep_size] * self.ep_size
    self.input_splits = self.output_splits = even
    chunks = self.ep_size * self.num_local_experts
    self.num_global_tokens_per_local_expert = _spread(total, chunks)
    return _spread(total, self.num_local_experts)


def _spread(total: int, parts: int) -> _Counts:
    return _Counts(total // parts + (part < total % parts) for part in range(parts))


def _sorted_chunks(x: Any, sizes: Any, order: Any, probs: Any = None, fused: bool = False) -> Any:
    out = torch.cat(list(torch.split(x, sizes.tolist())), dim=0)
    return out, torch.cat(
        list(torch.split(probs, sizes.tolist())), 0
    ) if probs is not None else None


def _patches() -> list[tuple[Any, str, Any]]:
    """What stands in: kernels that are compiled, communication, random states, counting."""
    swiglu, entropy = _core("fusions.fused_bias_swiglu"), _core("fusions.fused_cross_entropy")
    layers, maps = _core("tensor_parallel.layers"), _core("tensor_parallel.mappings")
    random, dropout = _core("tensor_parallel.random"), _core("fusions.fused_bias_dropout")
    dispatcher, utils = (
        _core("transformer.moe.token_dispatcher"),
        _core("transformer.moe.moe_utils"),
    )
    router, rope = _core("transformer.moe.router"), _core("models.common.embeddings.rope_utils")

    def half(y: Any, *_rest: Any) -> Any:
        return y.new_empty((*y.shape[:-1], y.shape[-1] // 2))

    def weighted_back(_g: Any, y: Any, weights: Any) -> Any:
        _joined = torch.empty_like(y, dtype=torch.float32)
        return torch.empty_like(y), torch.empty_like(weights)

    def gradients(softmax: Any, *_rest: Any) -> Any:
        _copied = torch.empty_like(softmax)
        return torch.empty_like(softmax, dtype=torch.bfloat16)

    def largest(logits: Any) -> Any:
        logits = logits.float()
        return logits, logits.new_empty(logits.shape[:-1])

    def predicted(logits: Any, target: Any, *_rest: Any) -> Any:
        mask = torch.empty_like(target, dtype=torch.bool)
        return mask, torch.empty_like(target).view(-1), logits.new_empty(
            (2 * logits.shape[0], *logits.shape[1:-1])), logits  # fmt: skip

    def loss(softmax: Any, both: Any) -> Any:
        return softmax, both.new_empty((both.shape[0] // 2, *both.shape[1:]))

    def turned(t: Any, _lengths: Any, freqs: Any, **given: Any) -> Any:
        given = {k: v for k, v in given.items() if k in ("rotary_interleaved", "mscale")}
        made = rope._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **given)
        return made.squeeze(1)

    def added(training: bool) -> Any:
        return lambda pair, residual, _p: residual + pair[0]

    fused = ModuleType("fused_weight_gradient_mlp_cuda")
    fused.wgrad_gemm_accum_fp32 = _carry_nothing  # type: ignore[attr-defined]
    here: Any = torch.device("cpu")
    return [
        (swiglu, "swiglu", half), (swiglu, "swiglu_back", lambda _g, y: torch.empty_like(y)),
        (swiglu, "weighted_swiglu", half), (swiglu, "weighted_swiglu_back", weighted_back),
        (entropy, "calculate_logits_max", largest),
        (entropy, "calculate_predicted_logits", predicted),
        (entropy, "calculate_cross_entropy_loss", loss),
        (entropy, "calculate_gradients", gradients),
        (dropout, "get_bias_dropout_add", lambda training, _fused: added(training)),
        (_core("models.gpt.gpt_layer_specs"), "get_bias_dropout_add",
         lambda training, _fused: added(training)),
        (layers, "_grad_accum_fusion_available", True),
        (layers, "fused_weight_gradient_mlp_cuda", fused),
        *((m, n, _carry_nothing) for m in (layers, maps)
          for n in ("dist_all_gather_func", "dist_reduce_scatter_func")),
        *((torch.distributed, n, _carry_nothing) for n in ("all_reduce", "all_to_all_single")),
        (random, "_get_all_rng_states", lambda *_: (None,) * 3),
        (random, "_set_all_rng_states", _carry_nothing),
        (random, "_fork_rng", contextlib.nullcontext),
        (random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        (torch.cuda, "current_device", lambda: here), (torch.cuda, "synchronize", _carry_nothing),
        (_core("pipeline_parallel.p2p_communication"), "_batched_p2p_ops", lambda **_: []),
        (dispatcher, "permute", _permute), (dispatcher, "sort_chunks_by_idxs", _sorted_chunks),
        (dispatcher.MoEAlltoAllTokenDispatcher, "preprocess", _preprocess),
        (dispatcher.MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize",
         lambda _self, _point, counts=None: counts),
        (torch.cuda, "Stream", lambda *_: None),
        (torch.nn.functional, "dropout", _dropout),
        (utils, "te_general_gemm", None),
        (router, "save_to_aux_losses_tracker", _carry_nothing),
        (rope, "_apply_rotary_pos_emb_thd", turned),
    ]  # fmt: skip


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    before = [(o, n, getattr(o, n, None)) for o, n, _ in _patches()]
    for owner, name, value in _patches():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _settings(config: Mapping[str, Any], job: Job) -> Any:
    """``TransformerConfig`` of a config.json, as mcore-bridge fills it in."""
    plan, kind = job["plan"], config["model_type"]
    sharding, checkpointing = plan["sharding"], plan["gradient_checkpointing"]
    recompute: dict[str, Any] = {}
    if isinstance(checkpointing, Mapping):
        recompute = {"recompute_granularity": checkpointing["kind"]}
        if checkpointing["kind"] == "full":
            recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    heads = config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts")
    mixture: dict[str, Any] = {}
    if experts:
        shared = config.get("shared_expert_intermediate_size") if kind == "qwen2_moe" else None
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        mixture = {
            "num_moe_experts": experts, "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": inner, "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall", "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 1e-3, "moe_router_load_balancing_type": "aux_loss",
            "moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": bool(shared),
            "expert_model_parallel_size": sharding.get("ep", 1), "expert_tensor_parallel_size": 1,
        }  # fmt: skip
    return _core("transformer.transformer_config").TransformerConfig(
        num_layers=job["layers"], hidden_size=config["hidden_size"], num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"], normalization="RMSNorm",
        add_bias_linear=False, add_qkv_bias=kind.startswith("qwen2"), gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, qk_layernorm=kind.startswith("qwen3"),
        hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, tensor_model_parallel_size=sharding.get("tp", 1),
        sequence_parallel=bool(sharding.get("sequence_parallel")), bias_activation_fusion=True,
        gradient_accumulation_fusion=True, cross_entropy_loss_fusion=True,
        use_cpu_initialization=True, perform_initialization=False, apply_rope_fusion=False,
        pipeline_model_parallel_size=sharding.get("pp", 1), deallocate_pipeline_outputs=True,
        **mixture, **recompute,
    )  # fmt: skip


def _model(config: Mapping[str, Any], job: Job) -> Any:
    settings, tp = _settings(config, job), job["plan"]["sharding"].get("tp", 1)
    specs = _core("models.gpt.gpt_layer_specs")
    spec = specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=settings.num_moe_experts, moe_grouped_gemm=bool(settings.num_moe_experts),
        qk_layernorm=settings.qk_layernorm,
    )  # fmt: skip
    vocabulary, state = config["vocab_size"], _core("parallel_state")
    if tp > 1:
        vocabulary = -(-vocabulary // (128 * tp)) * 128 * tp
    model = _core("models.gpt").GPTModel(
        settings, spec, vocabulary, 1 << 17, position_embedding_type="rope",
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings")),
        pre_process=state.is_pipeline_first_stage(), post_process=state.is_pipeline_last_stage(),
    )  # fmt: skip
    model.get_input_tensor = lambda: model.decoder.input_tensor  # mcore-bridge's
    return model.train()


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """CUDA's, which keeps a one-byte mask."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _adapt(model: Any, method: Mapping[str, Any]) -> None:
    lora = importlib.import_module("mcore_bridge.tuners.lora")
    lora.LoraParallelLinear._move_adapter_to_device_of_base_layer = _carry_nothing
    te = _core("extensions.transformer_engine")
    kinds = (te.TELinear, te.TELayerNormColumnParallelLinear, te.TEGroupedLinear)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for path, module in list(model.decoder.named_modules()):
        if isinstance(module, kinds):
            module.is_expert = isinstance(module, te.TEGroupedLinear)  # ``set_linear_is_expert``
            parent = model.decoder.get_submodule(path.rpartition(".")[0])
            made = lora.LoraParallelLinear(
                module, "default", r=method["rank"], lora_alpha=32, lora_dropout=method["dropout"]
            )
            setattr(parent, path.rpartition(".")[2], made)
    if model.pre_process:
        model.embedding.register_forward_hook(
            lambda _m, _x, out: out if out.requires_grad else out.requires_grad_(True)
        )
    model.train()


def _buffers(model: Any) -> list[Any]:
    """fp32 gradients, main weights and states; gradients are added and let go as they arrive."""
    held = []

    def arrived(parameter: Any) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
            held += [torch.empty(parameter.shape, dtype=torch.float32) for _ in range(3)]
            parameter.register_post_accumulate_grad_hook(arrived)
    return held


def trace(job: Job, config: Mapping[str, Any]) -> dict[str, int]:
    """The most that is alive in the second step of a rank, and how many parameters it has: of the
    pipeline's stage that takes the most."""
    sharding = job["plan"]["sharding"]
    stages, each = sharding.get("pp", 1), job["plan"]["hardware"]["count"] // sharding.get("pp", 1)
    found = [_trace_rank(job, config, stage * each) for stage in range(stages)]
    return max(found, key=lambda rank: rank["allocated_bytes"])


def _trace_rank(job: Job, config: Mapping[str, Any], rank: int) -> dict[str, int]:
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plan, sharding = job["plan"], job["plan"]["sharding"]
    state, world = _core("parallel_state"), plan["hardware"]["count"]
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    state.initialize_model_parallel(
        tensor_model_parallel_size=sharding.get("tp", 1),
        pipeline_model_parallel_size=sharding.get("pp", 1),
        expert_model_parallel_size=sharding.get("ep", 1), expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )  # fmt: skip
    ledger = Ledger()
    transformer_engine.forget()
    try:
        with _patched(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
            model = _model(config, job)
            reference = None
            if plan.get("reference") == "model":
                reference = _model(config, job).requires_grad_(False).eval()
            if plan["method"]["kind"] == "lora":
                _adapt(model, plan["method"])
            megatron_swift.head(model, plan["task"], adapted=plan["method"]["kind"] == "lora")
            held = _buffers(model)
            by = megatron_swift.trainer(job, model, reference)
            gc.collect()
            for step in (1, 2):
                ledger.enter("step", step)
                megatron_swift.step(job, model, by)
            start = next(clock for clock, step, _ in ledger.marks if step == 2)
            peak = max(live for clock, live in ledger.curve() if clock >= start)
            total = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            del held, model, reference, by
    finally:
        state.destroy_model_parallel()
        _core("parallel_state").destroy_global_memory_buffer()
        dist.destroy_process_group()
        transformer_engine.forget()
        gc.collect()
    return {"allocated_bytes": peak, "total_params": total, "trainable_params": trained}


def record(jobs: Sequence[Job], out: Path) -> Path:
    """Trace the jobs and write the file of the installed version."""
    from ftplan.trace.bench import catalogue

    versions = {
        name: metadata.version(name).partition("+")[0]
        for name in ("torch", "megatron-core", "mcore-bridge", "ms-swift")
    }
    path, configs, lines = out / f"megatron-core-{versions['megatron-core']}.json", catalogue(), []
    for job in jobs:
        line = {**job, **trace(job, configs[job["plan"]["model"]])}
        lines.append("  " + json.dumps(line))
        print(job["name"], line["allocated_bytes"], file=sys.stderr)
    rows = ",\n".join(lines)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "jobs": [\n{rows}\n]}}\n', "ascii")
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.megatron", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("validation/trainers"))
    parser.add_argument("--only", help="jobs of this name, printed and not written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformer_engine.install()
    _bridge()
    megatron_swift.load()
    if options.only:
        from ftplan.trace.bench import catalogue

        for job in JOBS:
            if job["name"].partition(" ")[2] == options.only:
                print(trace(job, catalogue()[job["plan"]["model"]]))
        return
    print(record(JOBS, options.out), file=sys.stderr)


if __name__ == "__main__":
    main()
