"""No key of a plan is read and then ignored: it changes the answer, or it is named or refused.

Every key of :mod:`ftplan.spec` is tried on plans of every kind. New keys are found by walking the
dataclasses; one whose values cannot be told from its type has to be given some in ``VALUES``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import FtplanError, InputError, UnsupportedError
from ftplan.front import api
from ftplan.front.jobs import read_job
from ftplan.front.resolve import resolve
from ftplan.front.unused import TRAINING_TASKS
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Lengths,
    Loss,
    Method,
    Model,
    OptimizerChoice,
    Plan,
    Precision,
    Rollout,
    Sharding,
)

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip

SHAPED = Model(config="config.json")
ONE = Hardware(gpu="a100-80gb")
FOUR = Hardware(gpu="a100-80gb", count=4)
BATCH = Batch(micro=2, seq_len=512)
FULL = Method(kind="full")
LORA = Method(kind="lora", rank=8)


def training(**given: Any) -> Plan:
    defaults = {"model": SHAPED, "method": FULL, "hardware": ONE, "batch": BATCH}
    return Plan(**{**defaults, **given})


COUNT = Model(params=10**9)
BASES: dict[str, Plan] = {
    "serving": Plan(model=SHAPED, hardware=ONE, batch=BATCH),
    "serving-on-two": Plan(model=SHAPED, hardware=FOUR, batch=BATCH, sharding=Sharding(tp=2)),
    "serving-a-training-plan": training(task="serve", method=LORA),
    "full-no-card": training(hardware=Hardware()),
    "full-settled": training(
        batch=Batch(micro=8, seq_len=2048, lengths=Lengths(mean=900.0, deviation=500.0)),
        gradient_checkpointing=Checkpointing(kind="none"),
        loss=Loss(kind="chunked"),
    ),
    "packed": training(batch=replace(BATCH, packing=True), loss=Loss(kind="fused")),
    "partial": training(
        method=Method(kind="partial", last_layers=1), precision=Precision(weights="fp32")
    ),
    "lora": training(method=LORA),
    "qlora": training(method=Method(kind="qlora", rank=8)),
    "ia3": training(method=Method(kind="ia3")),
    "prompt": training(method=Method(kind="prompt_tuning")),
    "dpo": training(task="dpo", stack="trl", method=LORA),
    "grpo": training(
        task="grpo",
        stack="trl",
        method=LORA,
        hardware=FOUR,
        rollout=Rollout(generations=4),
        gradient_checkpointing=Checkpointing(kind="full"),
    ),
    "distill": training(task="distill", stack="trl", teacher="qwen2.5-0.5b"),
    "classify": training(task="classify"),
    "embed": training(task="embed"),
    "ddp": training(hardware=FOUR),
    "fsdp": training(
        hardware=FOUR, sharding=Sharding(kind="fsdp"), batch=replace(BATCH, accumulation=2)
    ),
    "fsdp-one-root": training(
        hardware=FOUR,
        method=LORA,
        batch=Batch(micro=1, seq_len=512),
        sharding=Sharding(kind="fsdp", apart=()),
    ),
    "fsdp1": training(
        hardware=FOUR,
        sharding=Sharding(kind="fsdp", version=1),
        method=LORA,
        batch=Batch(micro=8, seq_len=2048),
        gradient_checkpointing=Checkpointing(kind="full"),
        loss=Loss(kind="chunked"),
    ),
    "zero1": training(hardware=FOUR, sharding=Sharding(kind="zero1")),
    "zero2-lora": training(hardware=FOUR, sharding=Sharding(kind="zero2"), method=LORA),
    # below a billion weights ZeRO-3 lets none go, however few it may have
    "zero3": training(
        model=Model(name="llama-3.2-3b"),
        hardware=FOUR,
        sharding=Sharding(kind="zero3", max_live_elements=4 * 10**8),
    ),
    "tp": training(hardware=FOUR, sharding=Sharding(tp=2)),
    "pp": training(
        hardware=FOUR, sharding=Sharding(pp=2), batch=replace(BATCH, micro=1, accumulation=4)
    ),
    "nodes": training(
        hardware=replace(FOUR, nodes=2), sharding=Sharding(kind="fsdp", dp_replicate=2, cp=2)
    ),
    "sum": Plan(model=COUNT, hardware=ONE),
    "sum-full": training(model=COUNT),
    "sum-partial": training(model=COUNT, method=Method(kind="partial", trainable=10**8)),
    "sum-zero": training(
        model=COUNT,
        hardware=FOUR,
        sharding=Sharding(kind="zero2"),
        optimizer=OptimizerChoice(name="sgd"),
    ),
}
"""A plan of every kind: what is trained, for which task, spread how, and sums without a shape."""

VALUES: dict[str, tuple[Any, ...]] = {
    "stack": ("pytorch", "trl"),
    "teacher": ("qwen2.5-0.5b", "qwen2.5-1.5b"),
    "method.rank": (4,),
    "method.alpha": (64,),
    "method.targets": (("q_proj",), "attention"),
    "method.dropout": (0.1,),
    "method.adapter_dtype": ("bf16", "fp32"),
    "method.modules_to_save": (("embed_tokens",),),
    "method.rank_pattern": ({"q_proj": 32},),
    "method.layers_to_transform": ((0,),),
    "method.target_parameters": (("experts.down_proj",),),
    "method.compute_dtype": ("fp32", "bf16"),
    "method.last_layers": (2,),
    "method.trainable": (10**6,),
    "method.virtual_tokens": (7,),
    "method.options": ({"init_weights": "bat"}, {"feedforward_modules": ("up_proj",)}),
    "method.bottleneck": (16,),
    "precision.weights": ("fp32", "nf4"),
    "precision.kv_cache": ("fp8",),
    "batch.micro": (3, 4),
    "batch.seq_len": (256,),
    "batch.prompt_len": (64,),
    "batch.accumulation": (4,),
    "batch.lengths.mean": (100.0, 1800.0),
    "batch.lengths.deviation": (30.0,),
    "batch.lengths.shortest": (1000,),
    "batch.eval_micro": (64,),
    "batch.images": (2,),
    "batch.image_size": ((448, 448),),
    "optimizer.name": ("adamw_bnb_8bit", "adafactor", "sgd"),
    "optimizer.momentum": (0.9,),
    "optimizer.state_dtype": ("bf16", "fp32"),
    "optimizer.rank": (4,),
    "gradient_checkpointing.every": (2,),
    "loss.chunk": (32,),
    "hardware.gpu": ("t4-16gb",),
    "hardware.count": (8,),
    "hardware.nodes": (4,),
    "hardware.host_ram": (1,),
    "hardware.reserved": (10**9,),
    "hardware.disk": (1,),
    "sharding.param_dtype": ("fp32", "bf16"),
    "sharding.reduce_dtype": ("fp32", "bf16"),
    "sharding.reshard_after_forward": (False,),
    "sharding.apart": (("embeddings",), ("embeddings", "head")),
    "sharding.tp": (2, 4),
    "sharding.pp": (2, 4),
    "sharding.virtual_stages": (2,),
    "sharding.cp": (2, 4),
    "sharding.ep": (2,),
    "sharding.etp": (2,),
    "sharding.dp_replicate": (2, 4),
    "sharding.bucket_elements": (1000,),
    "sharding.sub_group_elements": (1000,),
    "sharding.bucket_bytes": (1000,),
    "sharding.prefetch_elements": (10,),
    "sharding.max_live_elements": (10,),
    "sharding.persistence_elements": (10, 10**6),
    "rollout.generations": (3,),
    "rollout.prompt_tokens": (32,),
    "rollout.completion_tokens": (32,),
    "rollout.sampler_share": (0.5,),
    "budget.headroom": (0.1,),
}

NOT_KEYS = ("version", "model.name", "model.config", "model.params")
"""What the plan is about, in which version of the format."""


def walked(owner: type = Plan, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the format, dotted, with its type."""
    hints = typing.get_type_hints(owner)
    for one in dataclasses.fields(owner):
        hint = hints[one.name]
        inner = [t for t in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(t)]
        if inner:
            yield from walked(typing.cast(type, inner[0]), f"{before}{one.name}.")
        else:
            yield f"{before}{one.name}", hint


KEYS = {key: hint for key, hint in walked() if key not in NOT_KEYS}


def literals(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(v for part in typing.get_args(hint) for v in literals(part))
    return (True, False) if hint is bool else ()


def values_of(key: str) -> tuple[Any, ...]:
    """Values to try."""
    return VALUES.get(key) or literals(KEYS[key])


def changed(plan: Plan, filled: Plan, key: str, value: Any) -> Plan | None:
    """The plan with one key set, in a section as ``filled`` has it where the plan has none.

    None where the section cannot be had, or has this value anyhow.
    """
    head, _, rest = key.partition(".")
    return typing.cast("Plan | None", _set(plan, filled, head, rest, value))


def _set(owner: Any, filled: Any, name: str, rest: str, value: Any) -> Any:
    there, default = getattr(owner, name), getattr(filled, name, None)
    if not rest:
        return None if value in (there, default) else replace(owner, **{name: value})
    section = there if there is not None else default
    if section is None and name in EMPTY:
        section = EMPTY[name]
    if section is None:
        return None
    head, _, deeper = rest.partition(".")
    new = _set(section, default, head, deeper, value)
    return None if new is None else replace(owner, **{name: new})


EMPTY = {
    "optimizer": OptimizerChoice(name="adamw_torch_fused"),
    "gradient_checkpointing": Checkpointing(),
    "loss": Loss(),
    "rollout": Rollout(),
    "lengths": Lengths(kind="fixed"),
}
"""Sections of keys that a plan has not; what is trained (``method``) is another plan."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unused")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


OFF: tuple[Any, ...] = (None, False, 0, "none", "no")
"""Values that ask for nothing: that they do nothing need not be said."""
WORDS = {
    "sharding.pp": "pipeline",
    "sharding.cp": "context",
    "sharding.ep": "expert",
    "optimizer.in_backward": "steps in backward",
}
"""What a refusal calls a key, where it does not use its name."""
QUIET = {
    "method.alpha": "scales what is learned, in every LoRA",
    "method.use_rslora": "scales what is learned, in every LoRA",
    "sharding.use_orig_params": "FSDP1's flat parameter takes as much either way",
}
"""Keys that move no memory in any job: where they belong they are not named, elsewhere they are."""
ELSEWHERE = {
    "gradient_checkpointing.reentrant": "moves a moment that is not the worst of every task's",
    "loss.chunk": "is a tile of the head, which is not the worst moment of every task's",
    "sharding.reshard_root": "is the root's, which has next to nothing beside units of its own",
    "batch.lengths.kind": "is in what is reserved, which may be rounded to the same",
}
"""Keys that act on a moment which does not decide for every plan: they have to for one of ours."""


def answer(plan: Plan, base: Path) -> Mapping[str, Any]:
    """The report without the echo of the job and of its defaults."""
    report = api.estimate(plan, base=base, with_remedies=False)
    findings = tuple(f for f in report.findings if f.code not in ("MEM001", "MEM005"))
    return asdict(replace(report, findings=findings, assumptions=(), job={}))


def named(plan: Plan, base: Path) -> set[str]:
    """Keys that findings name as idle, and their sections."""
    resolved = resolve(plan, base=base)
    text = " ".join(f.message for f in resolved.findings if f.code == "MEM005")
    return {*re.findall(r"[a-z_.]+", re.sub(r"\([^)]*\)", "", text)), *resolved.shapeless}


def is_named(key: str, names: Collection[str]) -> bool:
    """Whether a key, the section it is in, or something within it is named."""
    return any(f"{key}.".startswith(f"{n}.") or n.startswith(f"{key}.") for n in names)


def outcome(plan: Plan, key: str, value: Any, before: Mapping[str, Any], base: Path) -> str:
    """What a key does: ``changes``, ``named``, ``refused`` by its name, or nothing: ``silent``."""
    try:
        if is_named(key, named(plan, base)):
            return "named"
        return "silent" if answer(plan, base) == before else "changes"
    except FtplanError as error:
        text = f"{error.message} {error.remedy}"
        known = (key.split(".")[0], key.rsplit(".")[-1], str(value), WORDS.get(key, key))
        return "refused" if any(word in text for word in known) else f"refused: {text}"


def ignored(name: str, base: Path) -> Iterator[str]:
    """Keys with a value that a plan of this kind swallows."""
    plan = BASES[name]
    filled, before = resolve(plan, base=base).plan, answer(plan, base)
    for key in KEYS:
        silent = []
        for value in values_of(key):
            new = None if value in OFF and key not in VALUES else changed(plan, filled, key, value)
            what = outcome(new, key, value, before, base) if new is not None else "same"
            if what == "changes":
                break
            if what.startswith(("silent", "refused:")):
                silent.append(f"{value} {what}")
        else:
            if silent and key not in QUIET and key not in ELSEWHERE:
                yield f"{key}: {', '.join(silent)}"


def changes(name: str, key: str, base: Path) -> bool:
    """Whether a key changes the answer for a plan of this kind."""
    plan = BASES[name]
    filled, before = resolve(plan, base=base).plan, answer(plan, base)
    news = ((changed(plan, filled, key, value), value) for value in values_of(key))
    return any(new and outcome(new, key, value, before, base) == "changes" for new, value in news)


@pytest.mark.parametrize("name", BASES)
def test_no_key_is_ignored(name: str, base: Path) -> None:
    """Each key of a plan changes the answer, or a finding names it, or a refusal does."""
    assert not list(ignored(name, base))


@pytest.mark.parametrize("key", ELSEWHERE)
def test_keys_that_count_elsewhere(key: str, base: Path) -> None:
    """What does not change every answer changes some: it is no excuse for a key that is dead."""
    assert any(
        changes(name, key, base) for name in ("full-settled", "lora", "fsdp1", "fsdp-one-root")
    )


@pytest.mark.parametrize("key", QUIET)
def test_quiet_keys_are_named_where_they_do_not_belong(key: str, base: Path) -> None:
    """A key that moves no memory anywhere is named by a job whose kind does not have it."""
    new = changed(BASES["full-no-card"], BASES["full-no-card"], key, 1)
    assert new is not None and key in named(new, base)


def test_what_is_named_has_no_effect(base: Path) -> None:
    """A key that is named as idle is out of the plan: the answer is the one without it."""
    sharding = Sharding(kind="zero3", wrap="model", reduce_dtype="fp32", bucket_bytes=1000)
    plain = training(hardware=FOUR, sharding=Sharding(kind="zero3"))
    plan = replace(plain, sharding=sharding, batch=replace(BATCH, prompt_len=64))
    assert answer(plan, base) == answer(plain, base)
    assert named(plan, base) == {
        "batch.prompt_len", "sharding.wrap", "sharding.reduce_dtype", "sharding.bucket_bytes",
        "nothing", "here", "depends", "on",
    }  # fmt: skip


def test_values_that_ask_for_nothing_are_not_named(base: Path) -> None:
    """`packing: false` or one of a degree in a plan that serves is no finding."""
    batch = replace(BATCH, packing=False, padding="none", accumulation=1, eval_micro=None)
    sharding = Sharding(kind="none", offload="none", tp=1, pp=1, dp_replicate=1, no_sync=False)
    plan = replace(
        BASES["serving"],
        batch=batch, sharding=sharding, kernels="none", reference="none", stack="transformers",
        precision=Precision(mixed="no"),
    )  # fmt: skip
    assert not resolve(plan, base=base).findings


def test_only_what_somebody_wrote_is_named(tmp_path: Path) -> None:
    """A trainer's own default that counts for nothing is no finding; its file's key is one."""
    text = "base_model: Qwen/Qwen2.5-0.5B\nmicro_batch_size: 1\nsequence_len: 512\n"
    text += "adapter: lora\nlora_r: 8\nlora_alpha: 16\nbf16: true\ndeepspeed: zero.json\n"
    (tmp_path / "zero.json").write_text(
        '{"zero_optimization": {"stage": 2, "overlap_comm": true}, "bf16": {"enabled": true}}'
    )
    (tmp_path / "axolotl.yml").write_text(text)
    job = read_job(tmp_path / "axolotl.yml")
    assert job.stated is not None and "method.adapter_dtype" not in job.stated
    everything = resolve(job.plan, base=job.base).findings
    said = resolve(job.plan, base=job.base, stated=job.stated).findings
    assert any("method.adapter_dtype" in f.message for f in everything if f.code == "MEM005")
    assert not [f for f in said if f.code == "MEM005"]


@pytest.mark.parametrize("task", TRAINING_TASKS)
def test_a_training_task_without_a_method_is_refused(task: Any, base: Path) -> None:
    """It is not sized as if it were served."""
    with pytest.raises(InputError, match="no method says how"):
        api.estimate(replace(BASES["serving"], task=task), base=base)


@pytest.mark.parametrize("degree", ["pp", "cp", "ep"])
def test_a_served_model_is_split_by_tp_alone(degree: str, base: Path) -> None:
    """What would split a served model and is not sized is refused: the answer would mislead."""
    degrees: dict[str, Any] = {degree: 2}
    plan = replace(BASES["serving-on-two"], sharding=Sharding(**degrees))
    with pytest.raises(UnsupportedError, match=degree):
        api.estimate(plan, base=base)


def test_an_optimizer_s_states_may_be_chosen_in_a_sum(base: Path) -> None:
    """`state_dtype: fp32` doubles what Adam keeps of bf16 weights, without a shape too."""
    plan = BASES["sum-full"]
    wide = OptimizerChoice(name="adamw_torch_fused", state_dtype="fp32")
    before, after = (
        api.estimate(one, base=base).allocated_bytes
        for one in (plan, replace(plan, optimizer=wide))
    )
    assert before and after and after.expected - before.expected == 2 * 2 * 10**9


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"task": "embed"}, "'embed'"),
        ({"method": Method(kind="vera")}, "'vera'"),
        ({"method": Method(kind="pvera")}, "'pvera'"),
    ],
)
def test_what_no_pipeline_cuts_is_refused(given: dict[str, Any], what: str, base: Path) -> None:
    """A refusal by name, where the walk would fail."""
    with pytest.raises(UnsupportedError, match=what):
        api.estimate(replace(BASES["pp"], **given), base=base)


def test_a_fused_loss_is_the_last_stage_s(base: Path) -> None:
    """Stages without a head have no loss whose chunks would need its shape."""
    plan = replace(BASES["pp"], loss=Loss(kind="fused"))
    assert answer(plan, base) != answer(BASES["pp"], base)


def test_every_key_has_values() -> None:
    """A new key is tried too: its values come from its type, or have to be given here."""
    assert len(KEYS) > 90
    assert not [key for key in KEYS if not values_of(key)]
    assert not [key for key in VALUES if key not in KEYS]
