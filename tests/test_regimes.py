"""Regimes that meet rarely: what several rooms have to agree on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ftplan.errors import InputError, UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.report import Report
from ftplan.spec import Batch, Hardware, Method, Model, Plan, Precision, Sharding

QLORA = {"kind": "qlora", "double_quant": True}
EIGHT = {"gpu": "a100-80gb", "count": 8}


def plan_of(**keys: Any) -> Plan:
    base: dict[str, Any] = {
        "version": 1,
        "model": "smollm-135m",
        "method": {"kind": "lora"},
        "batch": {"micro": 1, "seq_len": 128},
        "hardware": {"gpu": "a100-80gb"},
    }
    return parse_plan(parse_document(json.dumps({**base, **keys}), file="plan.json"))


def sized(**keys: Any) -> Report:
    return estimate(plan_of(**keys), with_remedies=False)


def term(report: Report, name: str) -> int:
    return sum(t.bytes for t in report.terms if t.name == name)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "full"},
        {"kind": "lora"},
        {"kind": "partial", "last_layers": 2},
        {"kind": "lora", "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_was_made_is_freed(method: dict[str, Any], checkpointing: bool) -> None:
    """When backward has ended only gradients, the batch and the loss are left of the step."""
    job = job_of(resolve(plan_of(method=method, gradient_checkpointing=checkpointing)))
    left = Structure(job).program.rest(job.micro, job.seq_len)
    groups = {label.group for label, alive in left.items() if alive.bytes}
    assert groups <= {"activations", "logits", "gradients"}
    assert all(alive.bytes > 0 for alive in left.values())
    small = sum(a.bytes for label, a in left.items() if label.group != "gradients")
    assert small < 200_000


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_packed_weights_are_sharded_and_their_scales_are_not(kind: str) -> None:
    """Eight ranks hold an eighth of the 4-bit values each, and all of the scales."""
    alone = sized(method=QLORA)
    spread = sized(method=QLORA, sharding={"kind": kind}, hardware=EIGHT)
    assert 1 / 8 < term(spread, "weights/frozen") / term(alone, "weights/frozen") < 1 / 4


def test_buffers_are_on_every_rank() -> None:
    """GPTQ's packed values are buffers: FSDP leaves them whole."""
    weights = {"weights": "gptq-int4"}
    alone = sized(precision=weights)
    spread = sized(precision=weights, sharding={"kind": "fsdp"}, hardware=EIGHT)
    assert term(spread, "weights/frozen") > term(alone, "weights/frozen") / 2


def test_falcon_has_flash_attention() -> None:
    """Without a mask, and not where alibi is (the library refuses that too)."""
    assert sized(model="falcon-7b", attention="flash").verdict == "fits"


def test_quantised_weights_are_not_trained() -> None:
    """Neither in full, nor is QLoRA what it says on plain weights."""
    with pytest.raises(InputError, match="cannot be trained"):
        sized(method={"kind": "full"}, precision={"weights": "nf4"})
    with pytest.raises(InputError, match="quantised weights"):
        sized(method={"kind": "qlora"}, precision={"weights": "bf16"})


def test_no_more_layers_than_there_are() -> None:
    """``last_layers`` beyond the model is a mistake, not the whole model."""
    with pytest.raises(InputError, match="last_layers is 99, the model has 30"):
        sized(method={"kind": "partial", "last_layers": 99})


def test_targets_that_match_nothing_are_named() -> None:
    """As PEFT does, the job is refused."""
    with pytest.raises(UnsupportedError, match="no_such_module"):
        sized(method={"kind": "lora", "targets": ["no_such_module"]})


def test_an_evaluation_that_is_not_played_is_said() -> None:
    """Training is sized all the same."""
    report = sized(task="dpo", batch={"micro": 1, "seq_len": 128, "eval_micro": 4})
    assert report.verdict == "fits"
    assert "MEM006" in {finding.code for finding in report.findings}


def test_parallel_degrees_say_how_many_gpus() -> None:
    """Four ranks of tensor parallelism are four GPUs when nothing else is said, and the model is
    as large as before."""
    alone = sized(model="llama-3.2-1b", method={"kind": "full"})
    report = sized(model="llama-3.2-1b", method={"kind": "full"}, sharding={"tp": 4})
    assert report.gpu is not None and report.gpu.count == 4
    assert report.model is not None and alone.model is not None
    assert report.model.total_params == alone.model.total_params


def test_a_sequence_nobody_sized_is_prompt_and_completion() -> None:
    """A completion longer than the default sequence makes the sequence longer."""
    report = sized(task="grpo", batch={"micro": 8}, rollout={"completion_tokens": 4096})
    assert report.job["batch"]["seq_len"] == 512 + 4096


def test_a_head_that_classifies_is_not_quantised() -> None:
    """RoBERTa's head has matrices within: all of it is left alone, and trained."""
    report = sized(model="xlm-roberta-base", method=QLORA, task="rm", loss="full")
    assert report.model is not None and report.model.trainable_params > 590_592


@pytest.mark.parametrize("task", ["sft", "dpo", "orpo", "embed"])
def test_zero2_keeps_a_part_of_accumulated_gradients(task: str) -> None:
    """Between micro batches the gradients of the weights in a rank's eighth are there, whatever
    computes the loss: no less than an eighth, nor all."""
    keys: dict[str, Any] = {"task": task, "method": {"kind": "full"}, "hardware": EIGHT}
    keys["batch"] = {"micro": 1, "seq_len": 128, "accumulation": 4}
    whole = term(sized(sharding={"kind": "zero1"}, **keys), "gradients/accumulated")
    part = term(sized(sharding={"kind": "zero2"}, **keys), "gradients/accumulated")
    assert whole / 8 <= part < whole / 2


def _zero3(**changes: Any) -> Report:
    sharding = Sharding(kind="zero3", **changes.pop("sharding", {}))
    return estimate(
        Plan(
            model=Model(name="qwen2.5-0.5b"),
            method=Method(kind="full"),
            precision=Precision(weights="bf16"),
            batch=Batch(micro=1, seq_len=64),
            hardware=Hardware(count=8, **changes),
            sharding=sharding,
        )
    )


def test_automatic_buckets_are_the_hidden_size_squared() -> None:
    """DeepSpeed's "auto" is resolved as transformers does: two buckets of 896 x 896 values."""
    buckets = {t.name: t.bytes for t in _zero3(sharding={"auto_buckets": True}).terms}
    assert buckets["runtime/reduce_buckets"] == 896 * 896 * 2


def test_a_disk_without_room_for_a_checkpoint_is_a_finding() -> None:
    """FIT005 comes when one checkpoint is larger than the disk, and not before."""
    assert "FIT005" in {f.code for f in _zero3(disk=10**9).findings}
    assert "FIT005" not in {f.code for f in _zero3(disk=10**12).findings}


def test_keys_of_sharding_without_a_use_are_named() -> None:
    """The size of DDP's buckets does nothing under ZeRO-3: it is named, not swallowed."""
    told = [f.message for f in _zero3(sharding={"bucket_bytes": 25 * 2**20}).findings]
    assert any("sharding.bucket_bytes" in message for message in told)


@pytest.mark.parametrize(("kind", "blocks"), [("lora", 30), ("full", 0)])
def test_hooks_of_fsdp1_hold_what_entered_frozen_blocks(kind: str, blocks: int) -> None:
    """A block that trains nothing and runs again reentrantly keeps the gradient of its input too,
    until backward has ended; one that trains does not.
    """

    def peak(reentrant: bool) -> int:
        job = job_of(
            resolve(
                plan_of(
                    method={"kind": kind},
                    gradient_checkpointing={"kind": "full", "reentrant": reentrant},
                    sharding={"kind": "fsdp", "version": 1},
                    batch={"micro": 8, "seq_len": 2048},
                    loss="chunked",
                    hardware=EIGHT,
                )
            )
        )
        structure = Structure(job)
        left = structure.program.rest(job.micro, job.seq_len)
        assert {label.group for label, alive in left.items() if alive.bytes} <= {
            "activations", "logits", "gradients",
        }  # fmt: skip
        assert sum(a.bytes for n, a in left.items() if n.group != "gradients") < 1_000_000
        return structure.at(job.micro, job.seq_len, job.loss_chunk).peak_bytes

    states = (peak(True) - peak(False)) / (8 * 2048 * 576 * 2)
    assert blocks - 3 <= states <= blocks + 3


def test_checkpointing_by_operation_keeps_every_second_product() -> None:
    """torchtitan keeps of a Llama block what queries, values, gate and down projections and fused
    attention return; its input is kept anyway, and the rest runs again.

    torchtitan/parallelisms/parallelize_llama.py, December 2024; PyTorch's own
    ``create_selective_checkpoint_contexts`` on transformers' Llama keeps the same, traced.
    """

    def grown(kind: str) -> int:
        saved = []
        for layers in (2, 3):
            plan = plan_of(
                model="llama-3.2-1b",
                stack="torchtitan-2024",
                method={"kind": "full"},
                precision={"weights": "bf16", "mixed": "no"},
                gradient_checkpointing={"kind": kind},
                batch={"micro": 1, "seq_len": 1024},
            )
            resolved = resolve(plan)
            config = {**(resolved.config or {}), "num_hidden_layers": layers}
            structure = Structure(job_of(replace(resolved, config=config)))
            forward = dict(structure.phases(1, 1024))["forward"]
            saved.append(forward - structure.static_bytes)
        return saved[1] - saved[0]

    hidden, narrow, inner, heads = 2048, 512, 8192, 32
    kept = 2 * (hidden + narrow + inner + hidden + hidden) + 4 * heads
    extra = grown("selective") - grown("full")
    assert 0 <= extra - 1024 * kept < 10_000


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("c3a", {"block_size": "wide"}),
        ("road", {"variant": "road_3"}),
        ("miss", {"init_weights": "bet"}),
        ("trainable_tokens", {"token_indices": 5}),
        ("peanut", {"depth": True}),
    ],
)
def test_a_setting_that_its_kind_cannot_have_is_refused(kind: str, options: dict[str, Any]) -> None:
    """A value of the wrong type or name is a mistake that names the key."""
    with pytest.raises(InputError, match=next(iter(options))):
        sized(method={"kind": kind, "options": options})


def test_a_setting_that_its_kind_does_not_have_is_named() -> None:
    """It moves nothing, and the report says so."""
    report = sized(method={"kind": "lora", "options": {"block_size": 4}})
    assert report.allocated_bytes == sized(method={"kind": "lora"}).allocated_bytes
    assert any("method.options.block_size" in f.message for f in report.findings)
