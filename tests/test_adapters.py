"""Adapters against peft: what is trained, tensor by tensor, for small configs of many families.

The case files were written by tools/adapter_cases.py from peft on the real classes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftplan.dtypes import find_format
from ftplan.errors import UnsupportedError
from ftplan.memory.adapters.lycoris import factorization
from ftplan.memory.adapters.rotations import nearest_divisor
from ftplan.memory.env import Environment
from ftplan.memory.estimate import estimate
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.optimizer import OptimizerSpec, State, Step
from ftplan.memory.prepare import counted_parameters, prepare

CASES = sorted((Path(__file__).parent / "cases/adapters").glob("*.json"))
LOADED = {path.stem: json.loads(path.read_text()) for path in CASES}
ROWS = [(name, index) for name, case in LOADED.items() for index in range(len(case["methods"]))]
ADAM = OptimizerSpec(
    name="adamw",
    states=(
        State(name="exp_avg", dtype="param", shape="full"),
        State(name="exp_avg_sq", dtype="param", shape="full"),
    ),
    step=Step(),
    step_counter_on_gpu=True,
)
UNRANKED = ("ia3", "ln_tuning", "oft", "boft", "prompt_tuning", "prefix_tuning", "p_tuning")


def job_of(config: dict[str, Any], method: dict[str, Any], **changed: Any) -> Job:
    """A plain bf16 job with this adapter."""
    given = dict(method)
    kind = given.pop("kind")
    targets = given.pop("targets", None)
    for name in ("targets", "modules_to_save", "layers_to_transform", "target_parameters"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    spec = AdapterSpec(
        kind=kind,
        rank=given.pop("rank", 0 if kind in UNRANKED else 16),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        dtype=given.pop("dtype", "fp32"),
        use_dora=given.pop("use_dora", False) or kind == "dora",
        virtual_tokens=given.pop("virtual_tokens", 20),
        **given,
    )
    settings: dict[str, Any] = {
        "weights": find_format("bf16"), "base_dtype": "bf16", "compute_dtype": "bf16",
        "environment": Environment(), "micro": 2, "seq_len": 64, "accumulation": 1,
        "optimizer": ADAM, **changed,
    }  # fmt: skip
    return Job(config=config, task="sft", method="adapter", adapter=spec, **settings)


def shapes_of(job: Job) -> dict[str, int]:
    """How many trained tensors of each shape, sides in order of size."""
    found: Counter[str] = Counter()
    for parameter, times, _ in counted_parameters(prepare(job)):
        if parameter.trainable:
            found["x".join(map(str, sorted(parameter.shape)))] += times
    return dict(found)


def test_corpus_is_there() -> None:
    """The cases are as many as were written: an empty glob proves nothing."""
    assert len(CASES) >= 15
    assert len(ROWS) >= 230
    assert {m["method"]["kind"] for c in LOADED.values() for m in c["methods"]} >= {
        "lora", "dora", "vera", "loha", "lokr", "oft", "boft", "ia3", "ln_tuning",
        "prompt_tuning", "prefix_tuning", "p_tuning", "adalora", "miss", "c3a", "fourierft", "hra",
        "randlora", "road", "shira", "vblora", "delora", "pvera", "hira", "trainable_tokens",
        "beft", "gralora", "glora", "peanut", "psoft",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index"), ROWS)
def test_what_is_trained_is_what_peft_trains(name: str, index: int) -> None:
    """An adapter trains as many tensors of each shape as peft, or is refused where peft refuses."""
    case = LOADED[name]
    row = case["methods"][index]
    job = job_of(case["config"], row["method"])
    if "refused" in row:
        with pytest.raises(UnsupportedError):
            prepare(job)
        return
    assert shapes_of(job) == row["shapes"]


@pytest.mark.parametrize(("name", "index"), ROWS)
def test_every_adapter_runs(name: str, index: int) -> None:
    """What peft accepts has a forward and a backward here, and a peak above its static bytes."""
    case = LOADED[name]
    row = case["methods"][index]
    if "refused" in row:
        pytest.skip("peft refuses it")
    job = job_of(case["config"], row["method"])
    result = estimate(job)
    assert result.trainable_params == row["trained"]
    assert result.peak_bytes > result.static_bytes


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL: dict[str, Any] = LOADED["mixtral"]["config"]


def trained(config: dict[str, Any], method: dict[str, Any], **changed: Any) -> int:
    """Parameters that are trained."""
    return estimate(job_of(config, method, **changed)).trainable_params


@pytest.mark.parametrize(("kind", "places"), [("houlsby", 2), ("pfeiffer", 1)])
def test_bottlenecks_are_those_of_the_adapters_library(kind: str, places: int) -> None:
    """A bottleneck is two matrices and two biases; a sixteenth of the width unless given."""
    for width in (0, 24):
        inner = width or 128 // 16
        one = 2 * 128 * inner + inner + 128
        method = {"kind": kind, **({"bottleneck": width} if width else {})}
        assert trained(LLAMA, method) == 4 * places * one


def test_bottlenecks_stand_after_a_mixture() -> None:
    """A block whose feed-forward part is experts gets its bottleneck after all of them."""
    one = 2 * 128 * 8 + 8 + 128
    assert trained(MIXTRAL, {"kind": "pfeiffer"}) == 3 * one
    assert trained(MIXTRAL, {"kind": "houlsby"}) == 6 * one


def test_bitfit_trains_every_bias_and_adds_nothing() -> None:
    """Biases are trained where they stand; a model without any is refused."""
    config = LOADED["opt"]["config"]
    per_layer = 4 * 128 + 512 + 128 + 2 * 128
    assert trained(config, {"kind": "bitfit"}) == 3 * per_layer + 128
    with pytest.raises(UnsupportedError):
        prepare(job_of(LLAMA, {"kind": "bitfit"}))


def test_adapter_dtype_is_the_storage_of_what_is_added() -> None:
    """bf16 adapters take half the bytes of fp32 ones, and nothing else changes its dtype."""
    for kind in ("lora", "dora", "ia3", "vera", "loha", "lokr", "oft", "boft"):
        method = {"kind": kind, "targets": ["q_proj", "v_proj"]}
        if kind == "ia3":
            method["targets"] = ["k_proj", "down_proj"]
        for dtype in ("fp32", "bf16"):
            network = prepare(job_of(LLAMA, {**method, "dtype": dtype}))
            for parameter, _, _ in counted_parameters(network):
                if parameter.trainable:
                    assert parameter.dtype == dtype
                elif not parameter.added:
                    assert parameter.dtype == "bf16"


def test_saved_modules_stay_twice() -> None:
    """modules_to_save trains a copy in the base's dtype and keeps the frozen original."""
    method = {"kind": "lora", "rank": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    plain = estimate(job_of(LLAMA, {**method, "modules_to_save": []}))
    saved = estimate(job_of(LLAMA, method))
    numbers = 256 * 128
    assert saved.trainable_params - plain.trainable_params == numbers
    assert saved.total_params == plain.total_params
    weights = {term.name: term.bytes for term in saved.static}
    before = {term.name: term.bytes for term in plain.static}
    assert weights["weights/frozen"] == before["weights/frozen"]
    assert weights["adapters/parameters"] - before["adapters/parameters"] == numbers * 2


def test_layers_with_different_adapters_are_built_apart() -> None:
    """Only layers that a rule tells apart get a kind of their own."""
    same = prepare(job_of(LLAMA, {"kind": "lora", "targets": ["q_proj"]}))
    assert len(same.stages[0].stack.kinds) == 1
    some = {"kind": "lora", "targets": ["q_proj"], "layers_to_transform": [1, 3]}
    apart = prepare(job_of(LLAMA, some))
    assert apart.stages[0].stack.pattern == [0, 1, 0, 1]


@pytest.mark.parametrize("storage", ["nf4", "nf4-dq", "fp4", "bnb-int8", "gptq-int4", "awq-int4"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera"])
def test_adapters_run_on_quantised_bases(kind: str, storage: str) -> None:
    """A quantised base trains as many parameters as a plain one, in fewer bytes."""
    method = {"kind": kind, "rank": 8} if kind != "ia3" else {"kind": kind}
    plain = estimate(job_of(LLAMA, method))
    small = estimate(job_of(LLAMA, method, weights=find_format(storage)))
    assert small.trainable_params == plain.trainable_params
    assert small.static_bytes < plain.static_bytes


def test_preparation_casts_what_is_not_quantised_unless_peft_leaves_it() -> None:
    """k-bit preparation makes fp32 of norms, embeddings and fused experts; not for GPTQ."""
    method = {"kind": "lora", "targets": ["q_proj"]}
    for storage, expected in (("nf4", "fp32"), ("awq-int4", "fp32"), ("gptq-int4", "bf16")):
        job = job_of(MIXTRAL, method, weights=find_format(storage), prepare_kbit=True)
        plain = {
            parameter.dtype
            for parameter, _, _ in counted_parameters(prepare(job))
            if not parameter.added and parameter.dtype != storage
        }
        assert plain == {expected}


def test_int8_inputs_escape_a_checkpoint_without_reentry() -> None:
    """LLM.int8 holds its inputs itself: only the reentrant checkpoint forgets them."""
    method = {"kind": "lora", "targets": ["q_proj", "v_proj"]}
    peaks = {}
    for reentrant in (False, True):
        job = job_of(
            LLAMA, method, weights=find_format("bnb-int8"), checkpoint_every=1, micro=4,
            seq_len=512, environment=Environment(reentrant=reentrant),
        )  # fmt: skip
        peaks[reentrant] = dict(estimate(job).phases)["forward"]
    assert peaks[False] > peaks[True]


def test_learned_tokens_lengthen_the_sequence() -> None:
    """Prompt tuning runs the model on more tokens; a prefix is refused under checkpointing."""
    few = estimate(job_of(LLAMA, {"kind": "prompt_tuning", "virtual_tokens": 8}))
    many = estimate(job_of(LLAMA, {"kind": "prompt_tuning", "virtual_tokens": 64}))
    assert many.peak_bytes > few.peak_bytes
    with pytest.raises(UnsupportedError, match="checkpointing"):
        prepare(job_of(LLAMA, {"kind": "prefix_tuning"}, checkpoint_every=1))


@pytest.mark.parametrize(
    ("number", "factors"), [(256, (16, 16)), (128, (8, 16)), (127, (1, 127)), (896, (28, 32))]
)
def test_factors_of_lokr(number: int, factors: tuple[int, int]) -> None:
    """LoKr cuts a side into two factors as near to each other as there are."""
    assert factorization(number) == factors


@pytest.mark.parametrize(("number", "wanted", "found"), [(96, 32, 32), (128, 48, 32), (20, 32, 20)])
def test_nearest_divisor(number: int, wanted: int, found: int) -> None:
    """OFT takes the nearest block size that divides the input."""
    assert nearest_divisor(number, wanted) == found


@pytest.mark.parametrize(("name", "trained"), [("glm4v_moe", 224_064), ("kimi_k25", 92_416)])
def test_peft_looks_up_the_type_of_the_whole_model(name: str, trained: int) -> None:
    """`all-linear` of a wrapper: names of experts are converted for GLM-4.5V, whose patches then
    match by name, and for Kimi-K2.5, whose text is a DeepSeek-V3, they are not (PEFT 0.21.2)."""
    path = Path(__file__).parent / f"cases/mixtures/{name}.json"
    config = json.loads(path.read_text())["config"]
    job = job_of(config, {"kind": "lora", "rank": 8, "targets": "all-linear"})
    counted = counted_parameters(prepare(job))
    assert sum(p.numel * times for p, times, _ in counted if p.trainable) == trained


def test_a_grouped_projection_takes_no_adapter() -> None:
    """DeepSeek-V4's o_a_proj: a LoRA of it fails in PEFT's forward; the other linear layers fit."""
    path = Path(__file__).parent / "cases/mixtures/deepseek_v4.json"
    config = json.loads(path.read_text())["config"]
    with pytest.raises(UnsupportedError, match="o_a_proj"):
        estimate(job_of(config, {"kind": "lora", "rank": 8, "targets": "all-linear"}))
    fits = {"kind": "lora", "rank": 8, "targets": ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"]}
    assert estimate(job_of(config, fits)).peak_bytes > 0


def test_what_a_class_keeps_in_fp32_stays_so() -> None:
    """DeepSeek-V4's sinks and streams are fp32 in a bf16 job, and its scores with them."""
    path = Path(__file__).parent / "cases/mixtures/deepseek_v4.json"
    job = job_of(json.loads(path.read_text())["config"], {"kind": "lora", "targets": ["q_a_proj"]})
    block = prepare(job).stages[0].stack.kinds[0]
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    assert dtypes["self_attn.sinks"] == dtypes["attn_hc.fn"] == "fp32"
    assert dtypes["self_attn.q_b_proj.weight"] == "bf16"
