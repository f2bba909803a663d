"""Plans written as trainers' files and read again: the same plan, or a refusal that says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Loss,
    Method,
    Model,
    OptimizerChoice,
    Plan,
    Precision,
    Sharding,
)
from ftplan.trainers import EXPORTS, export_plan, import_document

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)

MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "mistralai/Mistral-7B-v0.1")
TARGETS = (
    "all-linear",
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


@st.composite
def methods(draw: st.DrawFn) -> tuple[Method, Precision]:
    kind: Any = draw(st.sampled_from(("full", "lora", "qlora", "dora", "partial")))
    mixed = draw(maybe(st.sampled_from(("no", "bf16", "fp16"))))
    if kind in ("full", "partial"):
        layers = draw(st.integers(1, 8)) if kind == "partial" else None
        weights = draw(maybe(st.sampled_from(("bf16", "fp32"))))
        return Method(kind=kind, last_layers=layers), Precision(weights=weights, mixed=mixed)
    method = Method(
        kind=kind,
        rank=draw(maybe(st.integers(1, 256))),
        alpha=draw(maybe(st.integers(1, 512))),
        dropout=draw(maybe(st.sampled_from((0.0, 0.05, 0.1)))),
        targets=draw(maybe(st.sampled_from(TARGETS))),
        modules_to_save=draw(maybe(st.just(("embed_tokens", "lm_head")))),
        use_dora=True if kind == "dora" else None,
        double_quant=draw(maybe(st.booleans())) if kind == "qlora" else None,
        adapter_dtype=draw(maybe(st.sampled_from(("fp32", "bf16")))),
        prepare_kbit=draw(maybe(st.booleans())) if kind == "qlora" else None,
    )
    stored = ("nf4", "fp4", "int8") if kind == "qlora" else ("bf16", "fp16", "fp32")
    return method, Precision(weights=draw(st.sampled_from(stored)), mixed=mixed)


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    kind = draw(maybe(st.sampled_from(("fsdp", "zero1", "zero2", "zero3"))))
    if kind == "fsdp":
        return Sharding(
            kind="fsdp",
            version=2,
            wrap="block",
            reshard_after_forward=draw(st.booleans()),
            offload=draw(st.sampled_from((None, "params"))),
        )
    if kind is not None and kind.startswith("zero"):
        three = kind == "zero3"
        offload: Any = draw(
            st.sampled_from((None, "optimizer", "params") if three else (None, "optimizer"))
        )
        auto = draw(maybe(st.just(True)))
        buckets = None if auto else draw(maybe(st.integers(10**6, 10**9)))
        return Sharding(kind=kind, offload=offload, auto_buckets=auto, bucket_elements=buckets)
    return Sharding(kind=kind)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    method, precision = draw(methods())
    checkpointing = draw(
        maybe(
            st.builds(
                Checkpointing,
                kind=st.sampled_from(("none", "full", "selective", "offload")),
                every=st.sampled_from((1, 1, 2)),
                reentrant=st.none(),
            )
        )
    )
    if checkpointing is not None and checkpointing.kind in ("none", "offload"):
        checkpointing = dataclasses.replace(checkpointing, every=1)
    task: Any = draw(st.sampled_from(("sft", "pt", "dpo", "kto", "orpo", "rm")))
    return Plan(
        model=Model(name=draw(st.sampled_from(MODELS))),
        task=task,
        method=method,
        precision=precision,
        batch=Batch(
            micro=draw(st.integers(1, 64)),
            seq_len=draw(st.integers(16, 131072)),
            accumulation=draw(maybe(st.integers(1, 64))),
            packing=draw(maybe(st.booleans())) if task == "sft" else None,
        ),
        optimizer=draw(
            maybe(
                st.builds(
                    OptimizerChoice,
                    name=st.sampled_from(
                        (
                            "adamw_torch",
                            "adamw_torch_fused",
                            "adamw_bnb_8bit",
                            "paged_adamw_8bit",
                            "paged_adamw_32bit",
                            "adafactor",
                            "lion_32bit",
                            "muon",
                        )
                    ),
                )
            )
        ),
        gradient_checkpointing=checkpointing,
        attention=draw(maybe(st.sampled_from(("eager", "sdpa", "flash")))),
        loss=None
        if task == "rm"
        else draw(maybe(st.builds(Loss, kind=st.sampled_from(("full", "fused", "chunked"))))),
        kernels=draw(maybe(st.sampled_from(("none", "liger")))),
        sharding=draw(shardings()),
        hardware=Hardware(),
    )


def given_values(plan: Plan, *, sharding: bool) -> dict[str, Any]:
    """Every plan key that was given, without what no trainer's own file says."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name in ("version", "stack", "hardware", "budget") or value is None:
            continue
        if field.name == "sharding" and not sharding:
            continue
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                item = getattr(value, inner.name)
                if item is not None:
                    values[f"{field.name}.{inner.name}"] = item
        else:
            values[field.name] = value
    return values


@pytest.mark.parametrize("trainer", ("axolotl", "llamafactory", "trl", "torchtune", "ms-swift"))
@quick
@given(plan=plans())
def test_a_plan_survives_a_trainer_and_back(trainer: str, plan: Plan) -> None:
    """What an export writes is read again as the same values, and as the very same plan after
    one more turn; what it cannot write it refuses by name."""
    try:
        exported = export_plan(plan, to=trainer)
    except UnsupportedError as error:
        assert trainer in str(error)
        return
    overlays = []
    deepspeed = (plan.sharding.kind or "").startswith("zero")
    if deepspeed:
        overlays = [parse_document(export_plan(plan, to="deepspeed").text, file="ds.json")]
    document = parse_document(exported.text, file=f"{plan.task}.yaml")
    back = import_document(document, trainer=trainer, overlays=overlays)
    wanted = given_values(plan, sharding=True)
    got = given_values(back.plan, sharding=True)
    noted = tuple(note.split(":")[0] for note in exported.notes)
    lost = {
        key: (value, got.get(key))
        for key, value in wanted.items()
        if got.get(key) != value and not (noted and key.startswith(noted))
    }
    assert not lost, f"{lost}\n{exported.text}"
    again = parse_document(export_plan(back.plan, to=trainer).text, file=f"{plan.task}.yaml")
    assert import_document(again, trainer=trainer, overlays=overlays).plan == back.plan


@pytest.mark.parametrize("trainer", ("axolotl", "llamafactory", "trl", "torchtune", "ms-swift"))
@quick
@given(plan=plans())
def test_an_export_is_recognised(trainer: str, plan: Plan) -> None:
    """The reader that an export is written for recognises it by its content."""
    try:
        exported = export_plan(plan, to=trainer)
    except UnsupportedError:
        return
    document = parse_document(exported.text, file="config.yaml")
    assert import_document(document).trainer == trainer


@quick
@given(sharding=shardings(), per_node=st.integers(1, 8), nodes=st.integers(1, 4))
def test_accelerate_and_deepspeed_files_say_the_sharding(
    sharding: Sharding, per_node: int, nodes: int
) -> None:
    """A job's spread written as an accelerate file and read as an overlay is the same spread."""
    plan = Plan(
        model=Model(name=MODELS[0]),
        method=Method(kind="lora"),
        task="sft",
        precision=Precision(weights="bf16", mixed="bf16"),
        batch=Batch(micro=1, seq_len=1024),
        hardware=Hardware(count=per_node, nodes=nodes if nodes > 1 else None),
        sharding=sharding,
    )
    base = parse_document(
        export_plan(dataclasses.replace(plan, sharding=Sharding()), to="trl").text, file="c.yaml"
    )
    try:
        overlay = parse_document(export_plan(plan, to="accelerate").text, file="a.yaml")
    except UnsupportedError:
        assert sharding.bucket_elements is not None
        return
    back = import_document(base, overlays=[overlay]).plan
    assert back.hardware == plan.hardware
    kind = sharding.kind or ("ddp" if per_node * nodes > 1 else "none")
    assert back.sharding.kind == kind
    assert back.sharding.offload == sharding.offload
    if kind == "fsdp":
        assert back.sharding.reshard_after_forward == sharding.reshard_after_forward


def test_every_export_is_named() -> None:
    """`--to` takes the six formats of the contract, and ms-swift's."""
    contract = ("axolotl", "llamafactory", "trl", "torchtune", "accelerate", "deepspeed")
    assert (*contract, "ms-swift") == EXPORTS


FUSED = Plan(
    model=Model(name=MODELS[0]),
    method=Method(kind="lora", rank=8, targets="all-linear", fused_lora=True),
    precision=Precision(weights="bf16", mixed="bf16"),
    batch=Batch(micro=1, seq_len=512),
    kernels="liger",
)


@pytest.mark.parametrize("by", [None, "liger", "cut"])
@pytest.mark.parametrize("kernels", ["none", "liger"])
def test_axolotl_says_whose_functions_are_fused(by: Any, kernels: Any) -> None:
    """LoRA's functions and the loss without logits come back: Liger's beside its kernels and cut
    cross entropy without them, unless the plan says otherwise."""
    plan = dataclasses.replace(FUSED, kernels=kernels, loss=Loss(kind="fused", by=by))
    text = export_plan(plan, to="axolotl").text
    back = import_document(parse_document(text, file="p.yaml"), trainer="axolotl").plan
    assert back.method is not None and back.method.fused_lora is True
    usual = "liger" if kernels == "liger" else "cut"
    assert back.loss is not None and (back.loss.by or usual) == (by or usual)
    assert ("CutCrossEntropyPlugin" in text) == ((by or usual) == "cut")


@pytest.mark.parametrize("trainer", ("llamafactory", "trl", "torchtune", "ms-swift"))
def test_functions_without_a_key_are_refused(trainer: str) -> None:
    """No file but axolotl's can ask for fused LoRA or cut cross entropy, and none for foak."""
    unfused = Method(kind="lora", rank=8, targets="all-linear")
    plain = dataclasses.replace(FUSED, method=unfused)
    for plan, to in (
        (FUSED, trainer),
        (dataclasses.replace(plain, loss=Loss(kind="fused", by="cut")), trainer),
        (dataclasses.replace(plain, kernels="foak"), trainer),
        (dataclasses.replace(plain, kernels="foak"), "axolotl"),
    ):
        with pytest.raises(UnsupportedError, match=r"fused_lora|loss\.by: cut|kernels: foak"):
            export_plan(plan, to=to)
