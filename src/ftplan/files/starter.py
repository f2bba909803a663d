"""The files that ``ftplan init`` writes: complete, commented, ready to be edited."""

from __future__ import annotations

from ftplan.files.failures import FAILURES_SCHEMA_LINE
from ftplan.files.plan import SCHEMA_LINE

__all__ = ["STARTERS"]

_PLAN = f"""\
{SCHEMA_LINE}
# (ftplan schema plan -o ftplan-plan.schema.json writes that file)
#
# One finetuning job. Only version and model are needed; everything else has a default, and the
# answer lists each default it used. Try: ftplan memory FILE, ftplan fit FILE, ftplan check FILE
version: 1

# A catalogue name (ftplan models), or {{config: path/to/config.json}}, or {{params: 13e9}}
model: llama-3.1-8b

# The trainer whose defaults hold: transformers, trl, axolotl, llamafactory, unsloth, ...
stack: transformers

# serve, sft, pt, rm, dpo, kto, orpo, ppo, grpo, distill, classify, embed
task: sft

# {{kind: full}}, {{kind: partial, last_layers: 2}}, {{kind: qlora, rank: 16}}, ...
# Leave method out to plan inference.
method: {{kind: lora, rank: 16, targets: all-linear}}

# weights: how the base is stored. mixed: autocast (quote "no": a bare no is false in YAML)
precision: {{weights: bf16, mixed: "no"}}

# micro: sequences per GPU at once. seq_len: tokens per sequence
batch: {{micro: 1, seq_len: 2048, accumulation: 8}}

# ftplan optimizers lists them
optimizer: adamw_torch_fused

gradient_checkpointing: true

# eager, sdpa or flash
attention: sdpa

# ftplan gpus lists them. count: GPUs per machine
hardware: {{gpu: a100-80gb, count: 1, nodes: 1, host_ram: 256GiB}}

# none, ddp, zero1, zero2, zero3, fsdp; offload: none, optimizer, params, activations, nvme
sharding: {{kind: none}}

# How much of the GPU must stay free
budget: {{headroom: 5%}}
"""

_FAILURES = f"""\
{FAILURES_SCHEMA_LINE}
# (ftplan schema failures -o ftplan-failures.schema.json writes that file)
#
# What goes wrong with a system, and what has been tried. Leave out whatever you do not know:
# unknown is not false, and the answer says what would be worth finding out.
# Try: ftplan advise FILE. From an evaluation's results: ftplan label RESULTS -o FILE
version: 1
task: answer support questions from the product manual

state:
  eval_pipeline: true          # an evaluation with criteria and ground truth that can be re-run
  eval_examples: 200
  accuracy: 0.71
  target_accuracy: 0.9
  prompt_iterations: 6         # prompts measured against each other
  few_shot_examples: 4
  rag: none                    # none, full_context, term, embedding, hybrid
  knowledge_changes: monthly   # never, yearly, monthly, weekly, daily
  labelled_examples: 1800
  # larger_model_fixes, oracle_context_fixes, preference_pairs, latency_limited, ... (see schema)

failures:
  - id: t-17
    kind: outdated_knowledge   # left out: suggested from the checks, and marked as a suggestion
    count: 3                   # or share: 12%
    description: says the price of the year before
    tests: {{oracle_context: pass}}   # what was tried on this very item
  - id: t-23
    kind: format_error
    count: 1
    description: the answer is not the JSON that was asked for
"""

STARTERS = {"plan": _PLAN, "failures": _FAILURES}
"""Text of each starter file, by the name that ``ftplan init`` takes."""
