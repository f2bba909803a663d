"""The bench of trainers' own commands: the file that a user writes, run by the trainer itself.

    python -m ftplan.trace.bench_commands llamafactory [--out validation/trainers] [--only NAME ...]

One file for each trainer and version. A job is the trainer's own configuration, so that its
reader, its profile and the walk are compared with the trainer at once. Needs the trainer and the
versions that it asks for (the file names them); a job that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ftplan.catalog.models import find_model
from ftplan.trace.bench import catalogue

__all__ = ["JOBS", "jobs", "main"]

Settings = Mapping[str, Any]
MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "smollm2-1.7b", "qwen3-4b", "mistral-7b-v0.1")
"""In turn: tied and untied heads, biases, normed queries, many and few key-value heads."""
_UNKNOWN = {"ms-swift": ("smollm2-1.7b",)}
"""Models that a trainer does not know by name."""

_LF: Settings = {
    "stage": "sft", "finetuning_type": "lora", "cutoff_len": 512,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": True,
}  # fmt: skip
_FULL: Settings = {"finetuning_type": "full"}
_QLORA: Settings = {"quantization_bit": 4, "quantization_method": "bnb"}
_KEPT: Settings = {"disable_gradient_checkpointing": True}
_LLAMAFACTORY: dict[str, Settings] = {
    "sft lora": {},
    "sft lora kept": _KEPT,
    "sft lora dropout": {"lora_dropout": 0.05, "lora_rank": 16, **_KEPT},
    "sft lora targets": {"lora_target": "q_proj,v_proj"},
    "sft lora embeddings": {"additional_target": "embed_tokens,lm_head"},
    "sft lora accumulated": {"gradient_accumulation_steps": 4},
    "sft lora pure": {"pure_bf16": True, "bf16": False},
    "sft dora": {"use_dora": True},
    "sft oft": {"finetuning_type": "oft"},
    "sft lora upcast": {"upcast_layernorm": True},
    "sft lora flash": {"flash_attn": "fa2", **_KEPT},
    "sft lora eager": {"flash_attn": "disabled"},
    "sft qlora": _QLORA,
    "sft qlora kept": {**_QLORA, **_KEPT},
    "sft qlora upcast": {**_QLORA, "upcast_layernorm": True},
    "sft int8": {"quantization_bit": 8, "quantization_method": "bnb"},
    "sft full": _FULL,
    "sft full kept": {**_FULL, **_KEPT},
    "sft full pure": {**_FULL, "pure_bf16": True, "bf16": False, **_KEPT},
    "sft full 8-bit": {**_FULL, "optim": "adamw_bnb_8bit"},
    "sft freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "sft packed": {"packing": True},
    "sft neat": {
        "neat_packing": True,
        "flash_attn": "fa2",
        "per_device_train_batch_size": 1,
    },
    "sft no autocast": {"bf16": False},
    "pt lora": {"stage": "pt"},
    "pt full": {"stage": "pt", **_FULL},
    "rm lora": {"stage": "rm"},
    "rm lora kept": {"stage": "rm", **_KEPT},
    "rm full": {"stage": "rm", **_FULL},
    "dpo lora": {"stage": "dpo"},
    "dpo lora kept": {"stage": "dpo", **_KEPT},
    "dpo qlora": {"stage": "dpo", **_QLORA},
    "dpo full": {"stage": "dpo", **_FULL},
    "orpo lora": {"stage": "dpo", "pref_loss": "orpo"},
    "simpo full": {"stage": "dpo", "pref_loss": "simpo", **_FULL},
    "kto lora": {"stage": "kto"},
    "kto lora kept": {"stage": "kto", **_KEPT},
    "kto full": {"stage": "kto", **_FULL},
    "sft lora fp16 checkpoint": {"MODEL": "llama-2-7b"},
    "sft lora fp16 checkpoint kept": {"MODEL": "llama-2-7b", **_KEPT},
    "sft lora fp32 checkpoint kept": {"MODEL": "olmo-2-1b", **_KEPT},
    "sft qlora fp16 checkpoint": {"MODEL": "llama-2-7b", **_QLORA},
    "sft full fp16 checkpoint": {"MODEL": "llama-2-7b", **_FULL},
    "sft full fp32 checkpoint pure": {
        "MODEL": "olmo-2-1b",
        **_FULL,
        "pure_bf16": True,
        "bf16": False,
    },
    "dpo full fp32 checkpoint": {"MODEL": "olmo-2-1b", "stage": "dpo", **_FULL},
    "sft neat masked": {"neat_packing": True, "MODEL": "llama-3.2-1b", **_KEPT},
}
_V1: Settings = {"train_dataset": "rows.jsonl", "cutoff_len": 512, "micro_batch_size": 2}
_V1_KEPT: Settings = {"enable_activation_checkpointing": False}
_V1_LORA: Settings = {"peft_config": {"name": "lora", "r": 16, "lora_alpha": 32}}
_V1_QLORA: Settings = {**_V1_LORA, "quant_config": {"name": "bnb", "quantization_bit": 4}}
_LLAMAFACTORY_V1: dict[str, Settings] = {
    "v1 full": {},
    "v1 full kept": _V1_KEPT,
    "v1 full accumulated": {"global_batch_size": 8},
    "v1 full single": {"micro_batch_size": 1},
    "v1 lora": _V1_LORA,
    "v1 lora kept": {**_V1_LORA, **_V1_KEPT},
    "v1 lora undropped": {"peft_config": {"name": "lora", "lora_dropout": 0.0}, **_V1_KEPT},
    "v1 lora targets": {"peft_config": {"name": "lora", "target_modules": ["q_proj", "v_proj"]}},
    "v1 dora": {"peft_config": {"name": "lora", "use_dora": True}},
    "v1 lora accumulated": {**_V1_LORA, "global_batch_size": 8},
    "v1 lora eager": {**_V1_LORA, "flash_attn": "eager"},
    "v1 qlora": _V1_QLORA,
    "v1 qlora kept": {**_V1_QLORA, **_V1_KEPT},
    "v1 qlora bf16": {
        "quant_config": {"name": "bnb", "quantization_bit": 4, "compute_dtype": "bfloat16"},
        **_V1_LORA,
    },
    "v1 int8": {**_V1_LORA, "quant_config": {"name": "auto", "quantization_bit": 8}},
    "v1 freeze bf16": {
        "peft_config": {
            "name": "freeze", "freeze_trainable_layers": 1, "cast_trainable_params_to_fp32": False,
        },
    },
    "v1 rm full": {"stage": "rm"},
    "v1 rm freeze": {
        "stage": "rm", **_V1_KEPT,
        "peft_config": {
            "name": "freeze", "freeze_trainable_layers": 1, "cast_trainable_params_to_fp32": False,
        },
    },
    "v1 full liger": {
        "MODEL": "qwen3-4b", "kernel_config": {"name": "liger_kernel", "include_kernels": "auto"},
    },
    "v1 full padding-free": {
        "batching_strategy": "padding_free", "flash_attn": "flash_attention_2",
    },
    "v1 lora padding-free": {
        "batching_strategy": "padding_free", "flash_attn": "flash_attention_2", **_V1_LORA,
        **_V1_KEPT,
    },
}  # fmt: skip
_SWIFT: Settings = {
    "tuner_type": "lora", "max_length": 512, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
_ALL: Settings = {"tuner_type": "full"}
_BNB: Settings = {
    "quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip
_OPEN: Settings = {"gradient_checkpointing": False}
_RL: Settings = {"VERB": "rlhf"}
_MS_SWIFT: dict[str, Settings] = {
    "sft lora": {},
    "sft lora kept": _OPEN,
    "sft lora dropout": {"lora_dropout": 0.0, "lora_rank": 16, **_OPEN},
    "sft lora fp32": {"lora_dtype": "float32", **_OPEN},
    "sft lora targets": {"target_modules": ("q_proj", "v_proj")},
    "sft lora embeddings": {"modules_to_save": ("embed_tokens", "lm_head")},
    "sft lora accumulated": {"gradient_accumulation_steps": 4},
    "sft dora": {"use_dora": True},
    "sft qlora": _BNB,
    "sft qlora kept": {**_BNB, **_OPEN},
    "sft int8": {"quant_method": "bnb", "quant_bits": 8},
    "sft full": _ALL,
    "sft full kept": {**_ALL, **_OPEN},
    "sft full 8-bit": {**_ALL, "optim": "adamw_bnb_8bit"},
    "sft lora flash": {"attn_impl": "flash_attention_2", **_OPEN},
    "sft lora eager": {"attn_impl": "eager"},
    "sft packed": {"attn_impl": "flash_attention_2", "packing": True},
    "sft padding-free": {"attn_impl": "flash_attention_2", "padding_free": True},
    "pt full": {"VERB": "pt", **_ALL},
    "pt lora": {"VERB": "pt"},
    "rm lora": {**_RL, "rlhf_type": "rm"},
    "rm full": {**_RL, "rlhf_type": "rm", **_ALL},
    "dpo lora": {**_RL, "rlhf_type": "dpo"},
    "dpo lora kept": {**_RL, "rlhf_type": "dpo", **_OPEN},
    "dpo qlora": {**_RL, "rlhf_type": "dpo", **_BNB},
    "dpo full": {**_RL, "rlhf_type": "dpo", **_ALL},
    "kto lora": {**_RL, "rlhf_type": "kto"},
    "kto full": {**_RL, "rlhf_type": "kto", **_ALL},
    "orpo lora": {**_RL, "rlhf_type": "orpo"},
    "simpo full": {**_RL, "rlhf_type": "simpo", **_ALL},
    "sft liger": {"use_liger_kernel": True},
    "sft full liger": {"use_liger_kernel": True, **_ALL},
    "sft full packed liger": {
        "attn_impl": "flash_attention_2",
        "packing": True,
        "use_liger_kernel": True,
        **_ALL,
        **_OPEN,
    },
    "cls lora": {"task_type": "seq_cls", "num_labels": 3},
    "cls full": {"task_type": "seq_cls", "num_labels": 3, **_ALL},
    "sft qlora liger": {**_BNB, "use_liger_kernel": True},
    "cpo lora": {**_RL, "rlhf_type": "cpo"},
    "simpo lora": {**_RL, "rlhf_type": "simpo"},
    "orpo full": {**_RL, "rlhf_type": "orpo", **_ALL},
    "rm lora kept": {**_RL, "rlhf_type": "rm", **_OPEN},
    "kto qlora": {**_RL, "rlhf_type": "kto", **_BNB},
    "embedding lora": {"task_type": "embedding", "loss_type": "infonce"},
    "reranker lora": {"task_type": "reranker", "loss_type": "pointwise_reranker"},
}
_AX: Settings = {
    "sequence_len": 512, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
    "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True,
    "optimizer": "adamw_torch_fused", "bf16": True, "attn_implementation": "sdpa",
    "gradient_checkpointing": True,
}  # fmt: skip
_NO_ADAPTER: Settings = {"adapter": None}
_4BIT: Settings = {"adapter": "qlora", "load_in_4bit": True}
_HELD: Settings = {"gradient_checkpointing": False}
_PACKED: Settings = {
    "sample_packing": True, "pad_to_sequence_len": True, "attn_implementation": "flash_attention_2",
}  # fmt: skip
_LIGER: Settings = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rms_norm": True,
    "liger_glu_activation": True, "liger_rope": True,
}  # fmt: skip
_CUT: Settings = {
    "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
    "cut_cross_entropy": True,
}  # fmt: skip
_PLAIN: Settings = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
_KTO: Settings = {"rl": "kto", "remove_unused_columns": False}
_AXOLOTL: dict[str, Settings] = {
    "sft lora": {},
    "sft lora kept": _HELD,
    "sft lora dropout": {"lora_dropout": 0.05, **_HELD},
    "sft lora accumulated": {"gradient_accumulation_steps": 4},
    "sft lora flash": {"attn_implementation": "flash_attention_2", **_HELD},
    "sft lora packed": _PACKED,
    "sft qlora": _4BIT,
    "sft qlora kept": {**_4BIT, **_HELD},
    "sft qlora packed": {**_4BIT, **_PACKED},
    "sft int8": {"load_in_8bit": True},
    "sft full": _NO_ADAPTER,
    "sft full kept": {**_NO_ADAPTER, **_HELD},
    "sft full 8-bit": {**_NO_ADAPTER, "optimizer": "adamw_bnb_8bit"},
    "dpo lora": {"rl": "dpo"},
    "dpo full": {"rl": "dpo", **_NO_ADAPTER},
    "orpo lora": {"rl": "orpo"},
    "sft lora plain": {**_PLAIN, **_HELD},
    "rm full": {"reward_model": True, **_NO_ADAPTER},
    "sft full flash": {"attn_implementation": "flash_attention_2", **_NO_ADAPTER, **_HELD},
    "sft full packed": {**_NO_ADAPTER, **_PACKED},
    "sft full auto": {"bf16": "auto", **_NO_ADAPTER, **_HELD},
    "sft full fp32": {"bf16": False, **_NO_ADAPTER, **_HELD},
    "sft int8 plain": {"load_in_8bit": True, "bf16": False, **_HELD},
    "sft full bfloat16": {"bf16": False, "bfloat16": True, **_NO_ADAPTER},
    "sft qlora plain": {**_4BIT, **_PLAIN},
    "sft dora": {"peft_use_dora": True},
    "sft lora embeddings": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "sft lora eager": {"attn_implementation": "eager", **_HELD},
    "sft lora liger": {**_LIGER, **_HELD},
    "sft full liger": {**_LIGER, "liger_fused_linear_cross_entropy": True, **_NO_ADAPTER},
    "sft full chunked": {"chunked_cross_entropy": True, **_NO_ADAPTER},
    "sft lora packed sdpa": {"sample_packing": True, "pad_to_sequence_len": True},
    "dpo qlora": {"rl": "dpo", **_4BIT},
    "dpo lora kept": {"rl": "dpo", **_HELD},
    "orpo full": {"rl": "orpo", **_NO_ADAPTER},
    "simpo lora": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.5},
    "rm lora": {"reward_model": True, **_PLAIN},
    "kto lora": _KTO,
    "kto lora kept": {**_KTO, **_HELD},
    "kto full": {**_KTO, **_NO_ADAPTER},
    "kto qlora": {**_KTO, **_4BIT},
    "orpo qlora": {"rl": "orpo", **_4BIT},
    "orpo lora fused": {"rl": "orpo", **dict.fromkeys(_PLAIN, True)},
    "dpo int8": {"rl": "dpo", "load_in_8bit": True},
    "rm qlora": {"reward_model": True, **_4BIT, **_PLAIN},
    "sft lora adafactor": {"optimizer": "adafactor"},
    "sft full lion": {"optimizer": "lion_8bit", **_NO_ADAPTER, **_HELD},
    "sft full liger flash": {
        **_LIGER,
        "liger_fused_linear_cross_entropy": True,
        **_NO_ADAPTER,
        **_HELD,
        "attn_implementation": "flash_attention_2",
        "sequence_len": 4096,
    },
    "sft lora cut": {**_CUT, **_HELD},
    "sft full cut": {**_CUT, **_NO_ADAPTER},
    "sft full cut kept": {**_CUT, **_NO_ADAPTER, **_HELD},
    "sft qlora cut packed": {**_CUT, **_4BIT, **_PACKED},
}
_COMPONENTS = "nemo_automodel.components"
_AM: Settings = {
    "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
    "step_scheduler": {"global_batch_size": 2, "local_batch_size": 2, "max_steps": 4},
    "model": {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"},
    "distributed": {"strategy": "fsdp2"},
    "loss_fn": {"_target_": f"{_COMPONENTS}.loss.masked_ce.MaskedCrossEntropy"},
    "dataset": {
        "_target_": f"{_COMPONENTS}.datasets.llm.nanogpt_dataset.NanogptDataset",
        "file_pattern": "tokens.bin", "seq_len": 512,
    },
    "dataloader": {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "shuffle": False,
        "collate_fn": f"{_COMPONENTS}.datasets.utils.default_collater",
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-5},
}  # fmt: skip
_PEFT: Settings = {
    "_target_": f"{_COMPONENTS}._peft.lora.PeftConfig", "target_modules": "*_proj", "dim": 16,
}  # fmt: skip
_ADAPTED: Settings = {"peft": _PEFT}
_RECOMPUTED: Settings = {"distributed": {"activation_checkpointing": True}}
_IN_CHUNKS: Settings = {
    "loss_fn": {"_target_": f"{_COMPONENTS}.loss.chunked_ce.ChunkedCrossEntropy"}
}
_FUSED: Settings = {
    "loss_fn": {"_target_": f"{_COMPONENTS}.loss.linear_ce.FusedLinearCrossEntropy"}
}
_FP32: Settings = {"model": {"torch_dtype": "float32"}}
_HF: Settings = {"model": {"force_hf": True}}
_NF4: Settings = {
    "quantization": {
        "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    },
    "peft": _PEFT,
}  # fmt: skip
_ON_2: Settings = {"nproc_per_node": 2, "step_scheduler": {"global_batch_size": 4}}
_ON_8: Settings = {"nproc_per_node": 8, "step_scheduler": {"global_batch_size": 16}}
_LONG: Settings = {"dataset": {"seq_len": 4096}}
_MORE: Settings = {"step_scheduler": {"global_batch_size": 8}}
_NEMO: dict[str, Settings] = {
    "sft full": {},
    "sft full checkpointed": _RECOMPUTED,
    "sft full chunked": _IN_CHUNKS,
    "sft full fused": _FUSED,
    "sft full hf": {},
    "sft full accumulated": _MORE,
    "sft full fp32": _FP32,
    "sft full selective": {"distributed": {"activation_checkpointing": "selective"}},
    "sft full single": {"step_scheduler": {"global_batch_size": 1, "local_batch_size": 1}},
    "sft full fused adam": {"optimizer": {"_target_": "torch.optim.Adam", "fused": True}, **_FUSED},
    "sft lora": _ADAPTED,
    "sft lora checkpointed": {**_ADAPTED, **_RECOMPUTED},
    "sft lora dropout": {"peft": {**_PEFT, "dropout": 0.1}},
    "sft lora targets": {"peft": {**_PEFT, "target_modules": ["*.q_proj", "*.v_proj"]}},
    "sft lora mlp": _ADAPTED,
    "sft lora chunked": {**_ADAPTED, **_IN_CHUNKS},
    "sft lora fused": {**_ADAPTED, **_FUSED},
    "sft lora accumulated": {**_ADAPTED, **_MORE},
    "sft lora plain": {"peft": {**_PEFT, "use_memory_efficient_lora": False}},
    "sft lora mlp checkpointed": {**_ADAPTED, **_RECOMPUTED},
    "sft lora triton": {"peft": {**_PEFT, "use_triton": True}},
    "sft lora hf": {**_ADAPTED, **_HF},
    "sft dora": {"peft": {**_PEFT, "use_dora": True}},
    "sft lora fp32": {"peft": {**_PEFT, "lora_dtype": "float32"}},
    "sft lora mlp fused": {**_ADAPTED, **_FUSED},
    "sft qlora": _NF4,
    "sft qlora checkpointed": {**_NF4, **_RECOMPUTED},
    "sft full fused long": {**_FUSED, **_LONG},
    "sft full fused long checkpointed": {**_FUSED, **_LONG, **_RECOMPUTED},
    "sft lora mlp fused long": {**_ADAPTED, **_FUSED, **_LONG},
    "sft lora fused long checkpointed": {**_ADAPTED, **_FUSED, **_LONG, **_RECOMPUTED},
    "sft full chunked long checkpointed": {**_IN_CHUNKS, **_LONG, **_RECOMPUTED},
    "sft full 2": _ON_2,
    "sft full 8 checkpointed": {**_ON_8, **_RECOMPUTED},
    "sft full 8 hf": _ON_8,
    "sft full 8 fp32": {**_ON_8, **_FP32},
    "sft lora 8": {**_ON_8, **_ADAPTED},
    "sft lora 2 checkpointed": {**_ON_2, **_ADAPTED, **_RECOMPUTED},
    "sft full 8 fused": {**_ON_8, **_FUSED},
    "sft full 2 hf": _ON_2,
    "sft full 8 chunked": {**_ON_8, **_IN_CHUNKS},
    "sft full 8 accumulated": {
        "nproc_per_node": 8, "step_scheduler": {"global_batch_size": 64},
    },
    "sft lora 8 fp32": {**_ON_8, **_ADAPTED, **_FP32},
}  # fmt: skip
JOBS: dict[str, tuple[Settings, str, dict[str, Settings]]] = {
    "llamafactory": (_LF, "model_name_or_path", _LLAMAFACTORY),
    "llamafactory-v1": (_V1, "model", _LLAMAFACTORY_V1),
    "ms-swift": (_SWIFT, "model", _MS_SWIFT),
    "axolotl": (_AX, "base_model", _AXOLOTL),
    "nemo-automodel": (_AM, "model.pretrained_model_name_or_path", _NEMO),
}
"""By trainer: what every file says, the key of the model, what each job's file says beside it.

``MODEL`` is no key of a file: a model that is stored in another dtype than bf16."""
SEQ_LEN = 512


def jobs(trainer: str) -> Iterator[Mapping[str, Any]]:
    """Every job of a trainer, always the same ones."""
    common, key, each = JOBS[trainer]
    models = [name for name in MODELS if name not in _UNKNOWN.get(trainer, ())]
    for number, (name, settings) in enumerate(each.items()):
        model = settings.get("MODEL", models[number % len(models)])
        told = {name: value for name, value in settings.items() if name != "MODEL"}
        section, _, name_of_model = key.rpartition(".")
        hub = {name_of_model: find_model(model).hub_ids[0]}
        said = _merged({section: hub} if section else hub, common, told)
        yield {
            "name": f"{trainer.removesuffix('-v1')} {name}",
            "model": model,
            "layers": (2, 3)[number % 2],
            "settings": {"command": _command(said)} if trainer == "ms-swift" else said,
        }


def _merged(*parts: Settings) -> dict[str, Any]:
    """Mappings with the keys of all, of which a later one wins; one level down too."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
    return merged


def _command(settings: Settings) -> str:
    """``swift sft --model NAME ...``: a user's line."""
    words = ["swift", settings.get("VERB", "sft")]
    for name, value in settings.items():
        if name != "VERB":
            values = value if isinstance(value, tuple) else (value,)
            words += [
                f"--{name}",
                *(str(v).lower() if isinstance(v, bool) else str(v) for v in values),
            ]
    return shlex.join(words)


def record(trainer: str, job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run one job; its line of the bench."""
    from ftplan.trace.commands import run_command

    result = run_command(
        trainer, job["settings"], catalogue()[job["model"]], layers=job["layers"],
        model=find_model(job["model"]).hub_ids[0], seq_len=SEQ_LEN,
    )  # fmt: skip
    return {
        **job,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
        "trainable_params": result.trainable_params,
    }


def write(trainer: str, out: Path, only: Sequence[str], *, fresh: bool) -> int:
    """Run what is missing; returns how many jobs there are now."""
    from ftplan.trace.commands import COMMANDS, command_versions

    versions = command_versions(trainer)
    path = out / f"{trainer}-{versions[COMMANDS[trainer].package]}.json"
    out.mkdir(parents=True, exist_ok=True)
    kept = {} if fresh or not path.exists() else _kept(path)
    for job in jobs(trainer):
        key = json.dumps(job)
        if key in kept or (only and not any(word in job["name"] for word in only)):
            continue
        began = time.monotonic()
        try:
            kept[key] = _apart(trainer, job)
        except Exception as error:
            print(f"{job['name']}: {error!r}"[:300], file=sys.stderr, flush=True)
            continue
        print(f"{job['name']} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        _save(path, versions, [kept[key] for key in map(json.dumps, jobs(trainer)) if key in kept])
    return len(kept)


def _save(path: Path, versions: Mapping[str, str], ordered: Sequence[Mapping[str, Any]]) -> None:
    lines = ",\n".join("  " + json.dumps(job) for job in ordered)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "jobs": [\n{lines}\n]}}\n', "ascii")


def _apart(trainer: str, job: Mapping[str, Any]) -> Mapping[str, Any]:
    """:func:`record` in a process of its own: trainers leave patches and tensors behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(record, trainer, job).result()


def _kept(path: Path) -> dict[str, Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["jobs"]
    asked = ("name", "model", "layers", "settings")
    return {json.dumps({name: job[name] for name in asked}): job for job in found}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.bench_commands")
    parser.add_argument("trainer", choices=list(JOBS))
    parser.add_argument("--out", type=Path, default=Path("validation/trainers"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of jobs")
    parser.add_argument("--fresh", action="store_true", help="run every job again")
    options = parser.parse_args()
    total = write(options.trainer, options.out, options.only, fresh=options.fresh)
    print(f"{total} jobs in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
