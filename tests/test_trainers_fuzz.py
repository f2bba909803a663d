"""Readers given anything: a plan or a refusal, never a crash, and nothing that is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import FtplanError
from ftplan.files.document import Document
from ftplan.trainers import TRAINERS, import_document, import_text
from ftplan.trainers.draft import key_data
from ftplan.trainers.shell import parse_flags, parse_script

quick = settings(max_examples=200, deadline=None)

CASES = Path(__file__).parent / "cases" / "trainers"
SCRIPTS = [path.read_text(encoding="utf-8") for path in sorted(CASES.glob("*.sh"))]
NAMES = sorted({
    "base_model", "adapter", "load_in_4bit", "lora_r", "lora_target_modules", "rl", "fsdp",
    "fsdp_config", "deepspeed", "model_name_or_path", "finetuning_type", "stage", "cutoff_len",
    "quantization_bit", "per_device_train_batch_size", "gradient_accumulation_steps", "model",
    "optimizer", "loss", "dtype", "batch_size", "tokenizer", "checkpointer", "train", "precision",
    "devices", "quantize", "training", "lora", "step_scheduler", "peft", "distributed", "recipe",
    "tuner_type", "rlhf_type", "max_length", "packing", "optim", "gradient_checkpointing", "bf16",
    "gradient_checkpointing_kwargs", "trl", "plugins", "unfrozen_parameters", "sample_packing",
    "kernel_config", "peft_config", "dist_config", "quant_config", "attn_implementation",
    "beta", "num_generations", "teacher_model", "$env", "$launch", "$words", "_component_",
})  # fmt: skip
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.floats() | st.text(max_size=8)
    | st.sampled_from(("auto", "lora", "qlora", "full", "dpo", "bfloat16", "${model}", "zero3")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@quick
@given(
    data=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=10),
    trainer=st.sampled_from([name for name in TRAINERS if name != "plan"]) | st.none(),
)
def test_any_mapping_is_a_plan_or_a_refusal(data: dict[str, Any], trainer: str | None) -> None:
    """Whatever stands under whatever key, a reader answers or refuses."""
    document = Document(data=data, file="any.yaml", text="")
    try:
        imported = import_document(document, trainer=trainer)
    except FtplanError:
        return
    assert imported.plan.stack


@quick
@given(
    script=st.sampled_from(SCRIPTS),
    cut=st.integers(0, 2000),
    insert=st.text(alphabet="$(){}'\"`\\|&;<># \n-=ab1[]@*", max_size=12),
)
def test_any_script_is_a_plan_or_a_refusal(script: str, cut: int, insert: str) -> None:
    """A job script with anything put into it is read or refused; nothing of it is run."""
    place = cut % len(script)
    text = script[:place] + insert + script[place:]
    try:
        import_text(text, file="job.sh")
    except FtplanError:
        return


@quick
@given(text=st.text(max_size=300))
def test_any_text_is_a_plan_or_a_refusal(text: str) -> None:
    """Free text, with and without a suffix, never crashes a reader."""
    for file in ("a.yaml", "job", "run.sh"):
        try:
            import_text(text, file=file)
        except FtplanError:
            continue


@quick
@given(
    words=st.lists(
        st.from_regex(r"[A-Za-z0-9_./:#-]{1,12}", fullmatch=True), min_size=1, max_size=8
    )
)
def test_words_of_a_command_are_kept_as_written(words: list[str]) -> None:
    """Plain words, quoted or not, over several lines or one, are the same words."""
    plain = [word for word in words if not word.startswith("#")] or ["x"]
    one = parse_script(" ".join(plain), file="a").commands
    many = parse_script(" \\\n  ".join(plain), file="a").commands
    quoted = parse_script(" ".join(f"'{word}'" for word in plain), file="a").commands
    if one:
        texts = [[word.text for word in found[0].words] for found in (one, many)]
        assert texts[0] == texts[1]
        assert parse_flags(one[0].words)[0] == parse_flags(many[0].words)[0]
    assert [word.text for word in quoted[0].words][-1] == plain[-1]


def test_variables_arrays_and_arithmetic_are_worked_out() -> None:
    """What a script sets itself is followed; what only running tells stays open."""
    text = (
        "N=4\nM=2\nARGS=(--a $N --b 'x y')\nexport K=\"$N$M\"\n"
        'swift sft "${ARGS[@]}" --c $((N * M)) --d $(expr 16 / $N / $M) --e ${Z:-7} --f $K \\\n'
        "  --g $(hostname) --h ${N}k # --no\n"
    )
    command = parse_script(text, file="a").commands[-1]
    data, _, _ = parse_flags(command.words[2:])
    opened = data.pop("g")
    assert type(opened).__name__ == "Unresolved"
    assert data == {"a": 4, "b": "x y", "c": 8, "d": 2, "e": 7, "f": 42, "h": "4k"}


def test_key_lists_name_each_pattern_once_and_give_a_reason() -> None:
    """A key is neutral or not modelled, never both under the same pattern, and every unmodelled
    one says what it does."""
    lists = key_data()["trainers"]
    assert set(lists) >= set(TRAINERS) - {"plan", "transformers"}
    for name, entry in lists.items():
        both = set(entry["neutral"]) & set(entry["not_modelled"])
        assert not both, (name, both)
        assert all(entry["not_modelled"].values()), name
