"""Tasks, stacks, kernels and checkpoints: every choice moves the numbers as the real code does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ftplan.catalog.stacks import stack_names
from ftplan.errors import FtplanError, InputError, UnsupportedError
from ftplan.front import api
from ftplan.front.assembling import job_of
from ftplan.front.comparing import compare_stacks
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Estimate, estimate
from ftplan.spec import Plan

CASES = Path(__file__).parent / "cases" / "tasks"
MODEL = "qwen2.5-0.5b"
LORA = {"kind": "lora", "rank": 16, "targets": "all-linear", "adapter_dtype": "fp32"}
BASE: Mapping[str, Any] = {
    "model": {"name": MODEL},
    "stack": "transformers",
    "task": "sft",
    "method": {"kind": "full"},
    "precision": {"weights": "bf16", "mixed": "no"},
    "batch": {"micro": 2, "seq_len": 512, "padding": "none"},
    "optimizer": {"name": "adamw_torch_fused"},
    "gradient_checkpointing": {"kind": "none"},
    "loss": {"kind": "full"},
}


def plan_of(*, without: tuple[str, ...] = (), **changes: Any) -> Plan:
    mapping = {key: value for key, value in {**BASE, **changes}.items() if key not in without}
    if isinstance(mapping["model"], str):
        mapping["model"] = {"name": mapping["model"]}
    if isinstance(mapping.get("optimizer"), str):
        mapping["optimizer"] = {"name": mapping["optimizer"]}
    if isinstance(mapping.get("loss"), str):
        mapping["loss"] = {"kind": mapping["loss"]}
    checkpointing = mapping.get("gradient_checkpointing")
    if isinstance(checkpointing, bool):
        mapping["gradient_checkpointing"] = {"kind": "full" if checkpointing else "none"}
    return TypeAdapter(Plan).validate_python(mapping)


def sized(*, layers: int = 4, without: tuple[str, ...] = (), **changes: Any) -> Estimate:
    job = job_of(resolve(plan_of(without=without, **changes)))
    config = {**job.config, "num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:layers]
    return estimate(replace(job, config=config))


def peak(**changes: Any) -> int:
    return sized(**changes).peak_bytes


TRACED = json.loads((CASES / "traced.json").read_text(encoding="utf-8"))["jobs"]


def test_how_many_traced_jobs_there_are() -> None:
    """The corpus of traced tasks is whole."""
    assert len(TRACED) == 17


@pytest.mark.parametrize("case", TRACED, ids=[case["name"] for case in TRACED])
def test_tasks_agree_with_their_traces(case: Mapping[str, Any]) -> None:
    """Preference pairs, reward models and classifiers peak where the real code does, to 0.3 %."""
    found = sized(
        layers=case["layers"], **{k: v for k, v in case["plan"].items() if k != "version"}
    )
    assert found.peak_bytes == pytest.approx(case["allocated_bytes"], rel=3e-3)
    assert found.total_params == case["total_params"]
    assert found.trainable_params == case["trainable_params"]


@pytest.mark.parametrize("method", [{"kind": "full"}, LORA], ids=["full", "lora"])
def test_pairs_take_more_than_single_samples(method: Mapping[str, Any]) -> None:
    """DPO puts two sequences through the model for each sample: never less than SFT.

    ORPO adds a cross entropy to the same log-probabilities: never less than DPO without reference.
    """
    pairs = peak(method=method, task="dpo", reference="precomputed")
    assert peak(method=method, task="dpo") >= pairs
    assert peak(method=method, task="dpo") > peak(method=method)
    assert peak(method=method, task="orpo") >= pairs


def test_a_reference_model_adds_its_weights() -> None:
    """A second model adds at least its weights to every phase; precomputed adds nothing."""
    alone = sized(task="dpo", reference="precomputed")
    beside = sized(task="dpo", reference="model")
    term = next(t for t in beside.static if t.name == "weights/reference")
    weights = next(t for t in beside.static if t.name == "weights/trainable")
    assert term.bytes == weights.bytes
    without = dict(alone.phases)
    for name, size in beside.phases:
        assert size >= without[name] + term.bytes


def test_a_reference_that_the_trainer_loads_has_a_dtype_of_its_own() -> None:
    """KTO's trainer gets none from axolotl, and loads one in fp32; DPO's gets the policy's twin."""
    bytes_of = {}
    for task in ("dpo", "kto"):
        found = sized(task=task, stack="axolotl", reference="model")
        term = next(t for t in found.static if t.name == "weights/reference")
        bytes_of[task] = term.bytes / found.total_params
    assert bytes_of["dpo"] < bytes_of["kto"] == pytest.approx(4, rel=1e-3)


def test_weights_that_ask_for_gradients_leave_their_casts_in_autocast() -> None:
    """TRL's reference asks, though nobody wants its gradients: its casts stay for its forward."""
    mixed = {"weights": "fp32", "mixed": "bf16"}
    plan = plan_of(task="dpo", reference="model", precision=mixed, stack="trl")
    job = replace(job_of(resolve(plan)), micro=1, seq_len=16)
    asking = dict(estimate(job).phases)
    frozen = dict(estimate(replace(job, reference_frozen=True)).phases)
    assert asking["forward"] > frozen["forward"] + 10**8
    assert asking["backward"] == frozen["backward"]


def test_metrics_of_logits_copy_them() -> None:
    """TRL 1.9 to 1.14 copies a batch's logits twice for KTO's metrics: more than nothing at all,
    by no less than both copies in 4-byte numbers."""
    plan = plan_of(task="kto", method=LORA, reference="adapter", stack="trl-1.10")
    job = job_of(resolve(plan))
    silent = replace(job, environment=replace(job.environment, logit_metrics="none"))
    logits = 2 * 511 * 151_936 * 2
    more = dict(estimate(job).phases)["forward"] - dict(estimate(silent).phases)["forward"]
    assert logits < more <= 2 * logits + 2**20


def test_an_adapter_switched_off_needs_no_second_model() -> None:
    """With adapters the reference is the model itself without them."""
    names = {term.name for term in sized(task="dpo", method=LORA).static}
    assert "weights/reference" not in names


def test_a_teacher_is_resident() -> None:
    """Distillation holds the teacher's weights and both models' logits."""
    found = sized(task="distill", teacher="qwen2.5-1.5b")
    assert any(term.name == "weights/teacher" for term in found.static)
    assert found.peak_bytes > peak() + 3 * 10**9


def test_a_sampler_on_the_card_reserves_its_share() -> None:
    """GRPO's colocated engine is a term of its own: its share of the card."""
    rollout = {"sampler": "colocate", "sampler_share": 0.25, "generations": 2,
               "prompt_tokens": 128, "completion_tokens": 128}  # fmt: skip
    found = sized(task="grpo", rollout=rollout, hardware={"gpu": "h100-80gb"})
    term = next(t for t in found.static if t.name == "runtime/sampler")
    usable = api.estimate(plan_of(hardware={"gpu": "h100-80gb"})).gpu
    assert usable is not None and term.bytes == usable.usable_bytes // 4
    with pytest.raises(InputError, match="no card is named"):
        sized(task="grpo", rollout=rollout)


def test_a_model_that_generates_fills_a_cache() -> None:
    """Without an engine the model generates a whole step's completions: their cache is a moment."""
    rollout = {"prompt_tokens": 256, "completion_tokens": 256, "generations": 8}
    batch = {"micro": 1, "seq_len": 512, "accumulation": 2048}
    own = sized(task="grpo", rollout={**rollout, "sampler": "trainer"}, batch=batch, layers=2)
    served = sized(task="grpo", rollout={**rollout, "sampler": "server"}, batch=batch, layers=2)
    assert own.peak_phase == "rollout" and own.peak_bytes > served.peak_bytes
    cache = next(term for term in own.static if term.name == "kv_cache/rollout")
    # two layers, two key-value heads of 64, keys and values, bf16
    assert cache.bytes == 2 * 2 * 64 * 2 * 2 * 512 * 2048
    assert own.static_bytes + sum(a.bytes for a in own.alive.values()) == own.peak_bytes


def test_keys_without_a_use_are_named() -> None:
    """A key that this job cannot use is a finding, not silence."""
    plan = plan_of(
        method={"kind": "full", "rank": 8}, precision={"weights": "bf16", "kv_cache": "fp8"}
    )
    messages = [f.message for f in resolve(plan).findings if f.code == "MEM005"]
    assert len(messages) == 1 and "method.rank" in messages[0]
    assert "precision.kv_cache" in messages[0]


def test_a_longer_completion_takes_more_of_the_same_sequence() -> None:
    """GRPO's logits are those of the completion alone."""
    short = {"prompt_tokens": 384, "completion_tokens": 128}
    long = {"prompt_tokens": 128, "completion_tokens": 384}
    assert peak(task="grpo", rollout=short) < peak(task="grpo", rollout=long)


PPO: dict[str, Any] = {
    "task": "ppo", "stack": "trl", "without": ("loss",),
    "rollout": {"prompt_tokens": 128, "completion_tokens": 384},
}  # fmt: skip


def test_ppo_trains_a_critic_and_holds_two_frozen_models() -> None:
    """The critic's weights and states come beside the policy's; two models are frozen."""
    whole = sized(**PPO)
    statics = {term.name: term.bytes for term in whole.static}
    alone = {term.name: term.bytes for term in sized().static}
    assert statics["weights/trainable"] > 1.7 * alone["weights/trainable"]
    assert {"weights/reference", "weights/reward"} <= set(statics)
    adapted = {term.name for term in sized(**PPO, method=LORA).static}
    assert "weights/reference" not in adapted and "weights/reward" in adapted


def test_ppo_keeps_the_scores_of_its_rollout() -> None:
    """A longer completion is scored in fp32 over the vocabulary, and kept while PPO trains."""
    long = {**PPO, "rollout": {"prompt_tokens": 128, "completion_tokens": 896}}
    short, longer = dict(sized(**PPO).phases), dict(sized(**long).phases)
    assert {"rollout", "scoring"} <= set(short)
    assert all(longer[name] > short[name] for name in short)


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        ("fsdp", {"kind": "full"}, "outside of the wrapper"),
        ("ddp", LORA, "model.policy"),
    ],
)
def test_ppo_sharded_is_refused_by_name(kind: str, method: dict[str, Any], why: str) -> None:
    """What TRL's own loop cannot run is said, never sized as another job."""
    with pytest.raises(UnsupportedError, match=why):
        sized(**PPO, method=method, sharding={"kind": kind}, hardware={"gpu": "h100", "count": 2})


def test_where_a_head_on_the_policy_is_the_critic_no_second_model_is_trained() -> None:
    """LLaMA-Factory's PPO: TRL 0.9's, which was not traced; the answer says so."""
    head: dict[str, Any] = {**PPO, "stack": "llamafactory"}
    plan = plan_of(**head)
    own = {term.name: term.bytes for term in sized(**head).static}
    tuned = sized(stack="llamafactory", without=("loss",)).static
    alone = {term.name: term.bytes for term in tuned}
    assert own["optimizer/states"] == alone["optimizer/states"]
    assert {"weights/reference", "weights/reward"} <= set(own)
    assert not api.is_traced(resolve(plan)) and api.is_traced(resolve(plan_of(**PPO)))


def test_ppo_runs_on_several_gpus_where_its_trainer_does() -> None:
    """Under DDP with a reference of its own a GPU holds what one GPU holds, and the buckets."""
    one = sized(**PPO)
    two = sized(**PPO, sharding={"kind": "ddp"}, hardware={"gpu": "h100", "count": 2})
    assert two.peak_bytes >= one.peak_bytes


def test_of_a_quantised_critic_the_rest_is_trained() -> None:
    """A 4-bit critic trains its embeddings, norms and head: far less than a whole one's states."""
    quantised: dict[str, Any] = {
        "method": {"kind": "qlora", "rank": 8, "targets": "all-linear", "prepare_kbit": False},
        "precision": {"weights": "nf4", "mixed": "bf16"},
    }
    whole = {term.name: term.bytes for term in sized(**PPO, method=LORA).static}
    packed = {term.name: term.bytes for term in sized(**PPO, **quantised).static}
    assert packed["optimizer/states"] < whole["optimizer/states"]
    assert packed["weights/reward"] < whole["weights/reward"]


@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "grpo", "distill"])
def test_preference_and_rl_tasks_are_sharded(task: str, kind: str) -> None:
    """More GPUs take less of each, and a second model is split with the first."""
    extra: dict[str, Any] = {"teacher": MODEL} if task == "distill" else {}
    two, eight = (
        sized(task=task, sharding={"kind": kind}, hardware={"gpu": "h100", "count": n}, **extra)
        for n in (2, 8)
    )
    assert eight.peak_bytes < two.peak_bytes
    names = ("weights/reference", "weights/teacher")
    others = [[t.bytes for t in e.static if t.name in names] for e in (two, eight)]
    assert len(others[0]) == (task in ("dpo", "kto", "distill"))
    assert all(3.5 * b < a < 4.5 * b for a, b in zip(*others, strict=True))


def test_dropout_that_trl_turns_off_takes_nothing() -> None:
    """DPO's trainer sets dropout to zero; SFT's leaves it on."""
    for task, same in (("dpo", True), ("sft", False)):
        with_it, without = (
            peak(task=task, stack="trl", without=("loss",), method={**LORA, "dropout": rate})
            for rate in (0.1, 0.0)
        )
        assert (with_it == without) is same, task


def test_batches_of_a_step_are_fetched_ahead() -> None:
    """The Trainer has every micro batch on the GPU before the first forward; a plain loop one."""
    few = {"micro": 2, "seq_len": 512, "accumulation": 2}
    many = {**few, "accumulation": 66}
    each = 2 * 512 * 8 * 2
    assert peak(batch=many) - peak(batch=few) == 64 * each
    plain = {"stack": "pytorch"}
    assert peak(batch=many, **plain) == peak(batch=few, **plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "model"},
        {"rollout": {"generations": 4}},
        {"teacher": "qwen2.5-1.5b"},
        {"task": "dpo", "reference": "adapter"},
        {"task": "dpo", "reference": "none"},
        {"task": "rm", "loss": "chunked"},
        {"task": "dpo", "loss": "fused"},
        {"stack": "llamafactory-v1", "loss": "fused"},
        {"stack": "llamafactory-v1", "loss": "chunked"},
        {
            "model": "llava-1.5-7b",
            "method": {"kind": "ln_tuning"},
            "precision": {"weights": "int8", "mixed": "no"},
        },
        {"kernels": "unsloth"},
        {"kernels": "liger", "model": "gpt2"},
        {"batch": {"packing": True, "padding": "right"}},
        {"sharding": {"offload": "activations"}},
        {"optimizer": {"name": "adamw", "in_backward": True}, "batch": {"accumulation": 4}},
        {"task": "grpo", "rollout": {"sampler": "server", "sampler_share": 0.5}},
    ],
    ids=str,
)
def test_what_would_change_nothing_is_refused(changes: Mapping[str, Any]) -> None:
    """An option that has no meaning for the job is a mistake, not silence."""
    with pytest.raises(FtplanError):
        sized(**changes)


EAGER = {"attention": "eager"}
LOSS = {"without": ("loss",)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"task": "rm"}),
        ({}, {"task": "classify"}),
        ({"task": "rm"}, {"task": "classify"}),
        ({}, {"task": "kto"}),
        ({}, {"task": "grpo"}),
        ({}, {"task": "embed"}),
        ({}, {"kernels": "liger"}),
        ({}, {"batch": {"micro": 2, "seq_len": 512, "padding": "none", "packing": True}}),
        ({}, {"gradient_checkpointing": {"kind": "selective"}}),
        (EAGER, {**EAGER, "gradient_checkpointing": {"kind": "selective"}}),
        (
            {"gradient_checkpointing": {"kind": "full"}},
            {"gradient_checkpointing": {"kind": "full", "every": 2}},
        ),
        (
            {"gradient_checkpointing": {"kind": "full"}},
            {"gradient_checkpointing": {"kind": "offload"}},
        ),
        ({}, {"loss": "chunked"}),
        ({"loss": "chunked"}, {"loss": {"kind": "chunked", "chunk": 128}}),
        ({"loss": "chunked", "stack": "trl"}, {"loss": "chunked"}),
        ({"loss": "chunked", "stack": "torchtune"}, {"loss": "chunked"}),
        ({"stack": "litgpt"}, {}),
    ],
    ids=str,
)
def test_every_choice_moves_some_phase(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """No choice of a plan is read and then ignored."""
    assert sized(**before).phases != sized(**after).phases


def test_kernels_never_take_more() -> None:
    """Liger's kernels keep no more than the operations they replace, with any checkpointing."""
    for method in ({"kind": "full"}, LORA):
        for kind in ("none", "full"):
            common = {"method": method, "gradient_checkpointing": {"kind": kind}}
            assert peak(kernels="liger", **common) <= peak(**common)


def test_liger_comes_with_a_fused_loss() -> None:
    """Where nothing is said of the loss, Liger's patch brings its own; TRL keeps its fused head."""
    resolved = resolve(plan_of(without=("loss",), kernels="liger")).plan
    assert resolved.loss is not None and resolved.loss.kind == "fused"
    trl = resolve(plan_of(without=("loss",), kernels="liger", stack="trl")).plan
    assert trl.loss is not None and trl.loss.kind == "chunked"


def test_checkpoints_on_the_host_never_take_more() -> None:
    """Offloaded checkpoints free their blocks' inputs: no phase grows, forward shrinks."""
    full = dict(sized(gradient_checkpointing={"kind": "full"}).phases)
    away = dict(sized(gradient_checkpointing={"kind": "offload"}).phases)
    assert all(away[name] <= full[name] for name in full)
    assert away["forward"] < full["forward"]


def test_recomputing_the_core_saves_the_scores() -> None:
    """Selective checkpointing of eager attention keeps no scores: less saved per layer."""
    eager = dict(sized(attention="eager").phases)
    core = dict(sized(attention="eager", gradient_checkpointing={"kind": "selective"}).phases)
    assert core["forward"] < eager["forward"]


def test_an_optimizer_in_backward_keeps_no_gradients() -> None:
    """Stepping as gradients arrive frees them: the step holds weights and states alone."""
    kept = sized(batch={"micro": 1, "seq_len": 16})
    freed = sized(
        batch={"micro": 1, "seq_len": 16}, optimizer={"name": "adamw", "in_backward": True}
    )
    assert freed.peak_bytes < kept.peak_bytes
    assert dict(freed.phases)["step"] < dict(kept.phases)["step"]


def test_tiles_of_logits_are_bounded() -> None:
    """TRL's fused head holds one tile however many tokens there are."""
    few = sized(stack="trl", loss="chunked", batch={"micro": 16, "seq_len": 512})
    many = sized(stack="trl", loss="chunked", batch={"micro": 32, "seq_len": 512})
    full = sized(batch={"micro": 32, "seq_len": 512})
    tiles = [
        sum(a.bytes for label, a in e.alive.items() if "tile" in label.name) for e in (few, many)
    ]
    assert tiles[0] == tiles[1]
    assert many.peak_bytes < full.peak_bytes


def test_a_divergence_in_tiles_holds_no_logits() -> None:
    """TRL's distillation meets both heads a tile at a time: less than all logits of both."""
    whole = peak(task="distill", teacher=MODEL, batch={"micro": 8, "seq_len": 512})
    tiles = peak(
        task="distill", teacher=MODEL, batch={"micro": 8, "seq_len": 512}, stack="trl",
        without=("loss",),
    )  # fmt: skip
    assert tiles < whole / 2


def test_compare_sizes_a_job_on_every_stack() -> None:
    """Every stack has a row, the smallest first, with the same integer as its own report."""
    plan = plan_of(without=("stack", "loss", "optimizer", "gradient_checkpointing"), method=LORA)
    rows = compare_stacks(plan).rows
    assert {row.stack for row in rows} == set(stack_names())
    peaks = [row.allocated_bytes for row in rows if row.allocated_bytes is not None]
    assert peaks == sorted(peaks) and len(peaks) == len(rows)
    for row in rows[:3]:
        report = api.estimate(replace(plan, stack=row.stack))
        assert report.allocated_bytes is not None
        assert report.allocated_bytes.expected == row.allocated_bytes


def test_terms_of_a_task_add_up() -> None:
    """The terms alive at the worst moment add up to it, to the byte, for every task."""
    for task in ("dpo", "kto", "orpo", "grpo", "distill", "rm", "classify", "embed"):
        teacher: dict[str, Any] = {"teacher": "qwen2.5-1.5b"} if task == "distill" else {}
        report = api.estimate(plan_of(task=task, method=LORA, **teacher))
        assert report.allocated_bytes is not None
        at_peak = sum(term.bytes for term in report.terms if term.at_peak)
        assert at_peak == report.allocated_bytes.expected, task
