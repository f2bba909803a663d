"""Remedies are said in the words of the trainer's file: written there, they do as promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.front.checking import check_one
from ftplan.report import Remedy
from ftplan.spec import Plan

AXOLOTL = """
base_model: meta-llama/Llama-3.1-8B
adapter: lora
lora_r: 16
lora_target_linear: true
sequence_len: 8192
micro_batch_size: 4
gradient_accumulation_steps: 1
bf16: true
flash_attention: true
optimizer: adamw_torch_fused
"""
LLAMAFACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
do_train: true
finetuning_type: full
cutoff_len: 4096
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
pure_bf16: true
bf16: true
"""
TRL = """
model_name_or_path: Qwen/Qwen3-8B
dtype: bfloat16
use_peft: true
lora_r: 16
lora_target_modules: all-linear
max_length: 8192
per_device_train_batch_size: 8
gradient_checkpointing: false
bf16: true
dataset_name: x
"""
SWIFT = """
model: Qwen/Qwen2.5-14B-Instruct
tuner_type: lora
max_length: 8192
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
gradient_checkpointing: false
attn_impl: flash_attn
torch_dtype: bfloat16
dataset: x
"""
TORCHTUNE = """
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: [q_proj, v_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 8192
batch_size: 8
gradient_accumulation_steps: 1
optimizer:
  _component_: torch.optim.AdamW
  fused: true
  lr: 3e-4
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
dtype: bf16
device: cuda
enable_activation_checkpointing: false
"""
FILES = {
    "axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY, "trl": TRL, "ms-swift": SWIFT,
    "torchtune": TORCHTUNE,
}  # fmt: skip


def changed(text: str, words: dict[str, Any]) -> str:
    """The file with these words written into it."""
    data = yaml.safe_load(text)
    for key, value in words.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    return yaml.safe_dump(data)


def on_a_small_card(plan: Plan | None) -> tuple[Plan, tuple[()]]:
    """On a card of 24 GB."""
    assert plan is not None
    return replace(plan, hardware=replace(plan.hardware, gpu="a10g", count=1)), ()


@pytest.mark.parametrize("trainer", FILES)
def test_what_a_remedy_says_is_what_it_does(trainer: str, tmp_path: Path) -> None:
    """The remedies of a job that does not fit, written into its file in their order, give the
    verdicts that were promised; at least one is in the trainer's own words."""
    path = tmp_path / "sft.yaml"
    text = FILES[trainer]
    path.write_text(text)
    report = check_one(path, change=on_a_small_card, raise_faults=True)
    assert report.verdict == "over" and report.remedies
    worded = 0
    for remedy in report.remedies:
        if remedy.in_file is None:
            break
        text = changed(text, dict(remedy.in_file))
        path.write_text(text)
        after = check_one(path, change=on_a_small_card, raise_faults=True)
        assert after.verdict == remedy.verdict, (remedy, after.device_bytes)
        worded += 1
    assert worded, report.remedies[0]


def test_plugins_that_no_plan_knows_stay(tmp_path: Path) -> None:
    """A key that is a list keeps the user's own entries beside the new one."""
    path = tmp_path / "sft.yaml"
    path.write_text(AXOLOTL + "plugins: [mine.Plugin]\n")
    report = check_one(path, change=on_a_small_card, raise_faults=True)
    (plugins,) = [dict(r.in_file or {})["plugins"] for r in report.remedies if _has_plugins(r)]
    assert plugins[0] == "mine.Plugin" and len(plugins) == 2


def _has_plugins(remedy: Remedy) -> bool:
    return "plugins" in (remedy.in_file or {})
