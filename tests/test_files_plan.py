"""Plan files: strict, located refusals, and nothing lost on the way out and in again."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan import spec
from ftplan.errors import InputError, UnknownNameError, UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import dump_plan, looks_like_plan, parse_plan, place_error, plan_to_mapping
from ftplan.files.starter import STARTERS
from ftplan.files.typed import adapter, build
from ftplan.report import Assumption
from ftplan.spec import Batch, Checkpointing, Hardware, Method, Model, OptimizerChoice, Plan

HEAD = "version: 1\nmodel: llama-3.1-8b\n"


def plan(text: str) -> Plan:
    return parse_plan(parse_document(text, file="plan.yaml"))


def refusal(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        plan(text)
    return caught.value


def test_the_contract_s_plan() -> None:
    """The plan of the documentation reads, with every quantity in its unit."""
    found = plan(
        """\
version: 1
model: llama-3.1-8b
stack: transformers
task: sft
method: {kind: lora, rank: 16, targets: [q_proj, v_proj], dropout: 0.0, adapter_dtype: fp32}
precision: {weights: bf16, mixed: "no"}
batch: {micro: 2, seq_len: 2048, accumulation: 4}
optimizer: adamw_torch_fused
gradient_checkpointing: true
attention: sdpa
loss: full
hardware: {gpu: a100-80gb, count: 1, nodes: 1, host_ram: 512GiB}
sharding: {kind: none}
budget: {headroom: 5%}
"""
    )
    assert found.hardware.host_ram == 512 * 2**30
    assert found.budget.headroom == 0.05
    assert found.method is not None
    assert found.method.targets == ("q_proj", "v_proj")
    assert found.gradient_checkpointing == Checkpointing(kind="full")


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("model: {params: 13e9}", lambda p: p.model == Model(params=13_000_000_000)),
        ("model: {params: 13B}", lambda p: p.model.params == 13_000_000_000),
        ("model: {params: 13_000_000_000}", lambda p: p.model.params == 13_000_000_000),
        ("model: {config: a/config.json}", lambda p: p.model == Model(config="a/config.json")),
        ("model: null", lambda p: p.model == Model()),
        ("model: x\nmethod: lora", lambda p: p.method == Method(kind="lora")),
        ("model: x\nmethod: none", lambda p: p.method is None),
        ("model: x\nprecision: {mixed: no}", lambda p: p.precision.mixed == "no"),
        ("model: x\nloss: chunked", lambda p: p.loss.kind == "chunked"),
        ("model: x\nsharding: fsdp", lambda p: p.sharding.kind == "fsdp"),
        ("model: x\ngradient_checkpointing: no", lambda p: p.gradient_checkpointing.kind == "none"),
        ("model: x\nbudget: {headroom: 0}", lambda p: p.budget.headroom == 0),
        ("model: x\nhardware:\nbatch:", lambda p: p.batch == Batch()),
        (
            "model: x\nmethod: {kind: lora, targets: all-linear}",
            lambda p: p.method.targets == "all-linear",
        ),
        (
            "model: x\noptimizer: {name: sgd, momentum: 0.9}",
            lambda p: p.optimizer == OptimizerChoice(name="sgd", momentum=0.9),
        ),
        (
            "model: {params: 10e9}\nmethod: {kind: partial, trainable: 10%}",
            lambda p: p.method.trainable == 10**9,
        ),
    ],
)
def test_short_forms(text: str, check: typing.Callable[[Plan], bool]) -> None:
    """Each short form means the long one."""
    assert check(plan(f"version: 1\n{text}\n"))


@pytest.mark.parametrize(
    ("text", "place", "message", "remedy"),
    [
        ("- 1\n", "1:1", "this is a list", "version: 1"),
        ("just text\n", "1:1", "this is the text", "version: 1"),
        ("model: x\n", "1:1", "no 'version'", "version: 1"),
        ("version: 1\n", "1:1", "no 'model'", "model: llama"),
        ("version: 1\nmodle: x\n", "2:1", "no 'model'", "model:"),
        ("version: 2\nmodel: x\n", "1:1", "version cannot be the number 2", "write 1"),
        ("version: '1'\nmodel: x\n", "1:1", "the text '1'", "write 1"),
        (HEAD + "methd: lora\n", "3:1", "unknown key 'methd'", "did you mean method?"),
        (HEAD + "batch: {micr: 1}\n", "3:9", "unknown key 'micr' in batch", "micro"),
        (HEAD + "method: loar\n", "3:1", "the text 'loar'", "did you mean lora?"),
        (HEAD + "method: {rank: 8}\n", "3:1", "method has no 'kind'", "add kind"),
        (HEAD + "batch: {micro: '2'}\n", "3:9", "the text '2'", "write micro: 2"),
        (HEAD + "batch: {micro: true}\n", "3:9", "the boolean true", "a number"),
        (HEAD + "batch: {micro: -2}\n", "3:9", "cannot be -2", "from 1"),
        (HEAD + "batch: {micro: 0}\n", "3:9", "cannot be 0", "from 1"),
        (HEAD + "batch: {micro: 2.5}\n", "3:9", "whole number", "write micro: 2"),
        (HEAD + "batch: {micro: .nan}\n", "3:9", "cannot be nan", "from 1"),
        (HEAD + f"batch: {{micro: {'9' * 400}}}\n", "3:9", "so large", "from 1"),
        (HEAD + "batch: {seq_len: 1e30}\n", "3:9", "cannot be 1e+30", "from 1"),
        (HEAD + "batch: 4\n", "3:1", "batch is a mapping", "micro"),
        (HEAD + "hardware: {host_ram: 512}\n", "3:12", "has no unit", "GiB"),
        (HEAD + "hardware: {host_ram: 5 parsecs}\n", "3:12", "unknown unit", "GiB"),
        (HEAD + "hardware: {gpu: 100}\n", "3:12", "is a text", 'gpu: "100"'),
        (HEAD + "budget: {headroom: 5}\n", "3:10", "no percent sign", "5%"),
        (HEAD + "budget: {headroom: 100%}\n", "3:10", "nothing to use", "5%"),
        (HEAD + "method: {kind: lora, targets: 3}\n", "3:22", "is a list", "[3]"),
        (HEAD + "method: {kind: lora, targets: [3]}\n", "3:32", "is a text", '"3"'),
        (HEAD + "method: {kind: lora, targets: '['}\n", "3:22", "regular expression", "list"),
        (HEAD + "optimizer: 3\n", "3:1", "a name or a mapping", "adamw"),
        (HEAD + "attention: no\n", "3:1", "cannot be false", "eager"),
        (HEAD + "kernels: false\n", "3:1", "cannot be false", "none"),
        (HEAD + "sharding: {kind: fsdp, version: 3}\n", "3:24", "the number 3", "1, 2"),
        (HEAD + "stack: ''\n", "3:1", "is empty", "leave it out"),
        (HEAD + "batch:\n  micro: 1\n  micro: 2\n", "5:3", "given twice", "keep one"),
        ("version: 1\nmodel: 7\n", "2:1", "model is a name or a mapping", "params"),
        ("version: 1\nmodel: [x]\n", "2:1", "model is a name or a mapping", "params"),
        ("version: 1\nmodel: {name: x, params: 1e9}\n", "2:18", "given 2 times", "keep one"),
        ("version: 1\nmodel: {params: -1}\n", "2:9", "not a count", "13e9"),
        ("version: 1\nmodel: {params: 0}\n", "2:9", "whole positive", "13e9"),
        (HEAD + "method: {kind: partial, trainable: 10%}\n", "3:25", "a share", "last_layers"),
    ],
)
def test_refusals(text: str, place: str, message: str, remedy: str) -> None:
    """Every mistake is refused at its key, with the line itself and what to write instead."""
    error = refusal(text)
    assert message in error.message
    assert str(error.location) == f"plan.yaml:{place}"
    assert error.source_line.strip()
    assert remedy in error.remedy


def test_starters() -> None:
    """The starter plan is a plan, and shows every section that a plan has but the rare ones."""
    found = plan(STARTERS["plan"])
    assert found.model.name == "llama-3.1-8b"
    rare = {"kernels", "loss", "reference", "rollout", "teacher"}
    given = set(parse_document(STARTERS["plan"], file="f").data)
    assert {f.name for f in dataclasses.fields(Plan)} - given == rare


def test_detection() -> None:
    """A plan is told from a trainer's config by the version beside the model."""
    assert looks_like_plan(parse_document(HEAD, file="f"))
    assert not looks_like_plan(parse_document("base_model: x\n", file="f"))


def test_place_error() -> None:
    """A name that the calculator does not know is shown where the plan says it."""
    document = parse_document(HEAD + "hardware:\n  gpu: a1000\n", file="plan.yaml")
    error = place_error(UnknownNameError("gpu", "a1000"), document)
    assert str(error.location) == "plan.yaml:4:3"
    assert error.source_line.strip() == "gpu: a1000"


def test_place_error_by_the_value_it_names() -> None:
    """A refusal that quotes a value stands where the value stands; else it names the file only."""
    document = parse_document(HEAD + "method: {kind: lora, targets: nix}\n", file="plan.yaml")
    quoted = place_error(UnsupportedError("targets 'nix' that match nothing"), document)
    assert str(quoted.location) == "plan.yaml:3:22"
    assert str(place_error(UnsupportedError("the moon"), document).location) == "plan.yaml"


def test_missing_facts_are_null() -> None:
    """What an import could not find stands in the plan as null, to be filled in."""
    text = dump_plan(
        Plan(model=Model()),
        missing=["model", "batch.seq_len", "hardware.gpu"],
        notes=["from axolotl.yml"],
        assumptions=[Assumption(key="attention", value="sdpa", source="stack default")],
    )
    data = parse_document(text, file="f").data
    assert data["batch"] == {"seq_len": None}
    assert data["hardware"] == {"gpu": None}
    assert "# from axolotl.yml" in text
    assert "# assumed: attention = sdpa (stack default)" in text
    assert plan(text) == Plan(model=Model())


def _values(hint: Any, name: str) -> st.SearchStrategy[Any]:
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        rest = [a for a in arguments if a is not type(None)]
        return st.none() | st.one_of([_values(a, name) for a in rest])
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(arguments)
    if typing.get_origin(hint) is tuple:
        return st.lists(_values(arguments[0], name), max_size=3).map(tuple)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(_names, st.integers(1, 64), min_size=1, max_size=2)
    if dataclasses.is_dataclass(hint):
        return _instances(typing.cast(type, hint))
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(1, 10**6)
    if hint is float:
        return st.integers(0, 99).map(lambda n: n / 100)
    return _names


_names = st.sampled_from(["a", "q_proj", "all-linear", ".*[qv]_proj$", "no", "1e5", "x: y", "null"])


def _instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: _values(hints[f.name], f.name) for f in dataclasses.fields(cls)}
    if cls is Model:
        return st.one_of(
            st.builds(Model),
            st.builds(Model, name=_names),
            st.builds(Model, config=_names),
            st.builds(Model, params=st.integers(1, 10**13)),
        )
    return st.builds(cls, **fields)


@settings(deadline=None, max_examples=150)
@given(_instances(spec.Plan))
def test_round_trip(original: Plan) -> None:
    """Whatever a plan says is still said after it was written and read again."""
    text = dump_plan(original)
    assert plan(text) == original
    assert parse_document(text, file="f").data == plan_to_mapping(original)


@settings(deadline=None, max_examples=150)
@given(_instances(spec.Plan))
def test_pydantic_reads_the_same(original: Plan) -> None:
    """The classes mean to pydantic, who writes the JSON Schema, what they mean to our reader."""
    data = json.loads(json.dumps(dataclasses.asdict(original)))
    document = parse_document("x: 1\n", file="f.yaml")
    ours = build(Plan, data, document, bounds=dict.fromkeys(_numbers(), (0, 10**13)))
    assert ours == adapter(Plan).validate_python(data) == original


def _numbers() -> set[str]:
    sections = [value for value in vars(spec).values() if dataclasses.is_dataclass(value)]
    return {field.name for cls in sections for field in dataclasses.fields(cls)}


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Plan)] + ["junk"]),
        st.sampled_from(
            [1, -1, 0.5, "x", "5%", True, None, [], [1], {}, {"kind": 1}, {"name": []}]
        ),
    )
)
def test_any_mapping_is_read_or_refused(data: dict[str, Any]) -> None:
    """No combination of keys and wrong values crashes the reader."""
    document = parse_document("x: 1\n", file="f.yaml")
    document.data = {"version": 1, "model": "x"} | data
    try:
        parse_plan(document)
    except InputError as error:
        assert error.location is not None


def test_hardware_is_written_exactly() -> None:
    """Bytes that are no round number of any unit are written as bytes."""
    original = Plan(model=Model(name="x"), hardware=Hardware(host_ram=2**39, reserved=1_234_567))
    text = dump_plan(original)
    assert "host_ram: 512GiB" in text
    assert "reserved: 1234567B" in text
    assert plan(text) == original


def test_every_real_config_survives_as_a_plan() -> None:
    """Each real trainer config that imports is written as a plan that reads back the same and
    that the committed schema accepts."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared/data/trainer-configs"
    if not folder.is_dir():
        pytest.skip("the corpus of trainers' configs is not here")
    from jsonschema import Draft202012Validator

    from ftplan import trainers
    from ftplan.errors import FtplanError
    from ftplan.files.schema import schema

    validator = Draft202012Validator(schema("plan"))
    read = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            imported = trainers.import_file(path)
        except FtplanError:
            continue
        text = dump_plan(imported.plan, assumptions=imported.assumptions, missing=imported.missing)
        document = parse_document(text, file="plan.yaml")
        assert parse_plan(document) == imported.plan, path
        assert not list(validator.iter_errors(document.data)), path
        read += 1
    assert read >= 300
