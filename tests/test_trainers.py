"""Trainers' configurations as plans: golden cases, detection, refusals, positions, overlays."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import FtplanError, InputError, UnknownNameError, UnsupportedError
from ftplan.files.document import Document, parse_document
from ftplan.files.plan import plan_to_mapping
from ftplan.trainers import (
    TRAINERS,
    detect,
    finding_codes,
    finding_page,
    import_file,
    import_text,
)
from ftplan.trainers.severity import SEVERITY

CASES = sorted((Path(__file__).parent / "cases" / "trainers").glob("*.*"))
_LINE = re.compile(r"#\s*(trainer:|expect|finding|assumed)\s+(.*)")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_golden_case(path: Path) -> None:
    """A file in a trainer's own shape gives the plan that its header states, with each finding
    at its line and each default listed."""
    imported = import_file(path)
    data = plan_to_mapping(imported.plan)
    found = {(f.code, f.location.line if f.location else None) for f in imported.findings}
    checks = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        word, rest = match[1], match[2]
        checks += 1
        if word == "trainer:":
            assert imported.trainer == rest
        elif word == "expect":
            key, _, value = rest.partition(" = ")
            assert _lookup(data, imported.plan, key) == json.loads(value), key
        elif word == "finding":
            code, _, where = rest.partition(" at ")
            lines = {line for one, line in found if one == code}
            assert lines, (code, imported.findings)
            assert not where or int(where) in lines, (code, lines)
        else:
            assert rest in {one.key for one in imported.assumptions}
    assert checks >= 4, "a case without expectations proves nothing"
    assert all(one.source for one in imported.assumptions)
    assert all(one.location is not None for one in imported.findings if one.code[:3] == "IMP")


def _lookup(data: dict[str, Any], plan: Any, key: str) -> Any:
    if "." in key:
        value: Any = plan
        for step in key.split("."):
            value = getattr(value, step)
        return list(value) if isinstance(value, tuple) else value
    return data.get(key)


def test_there_is_a_case_for_every_reader() -> None:
    """Each trainer that `--from` takes has a golden case (our own plan has its own tests)."""
    seen = {import_file(path).trainer for path in CASES}
    assert seen == set(TRAINERS) - {"plan"}


REFUSED = {
    "an accelerate file": "distributed_type: FSDP\nnum_processes: 8\n",
    "a DeepSpeed file": "zero_optimization: {stage: 3}\n",
    "merges or exports": "model_name_or_path: a/b\ntemplate: t\nexport_dir: out\n",
    "is for inference": "model_name_or_path: a/b\ntemplate: t\ninfer_backend: huggingface\n",
    "evaluates a model": "tasks: [mmlu]\nmodel: {_component_: torchtune.models.llama3.llama3_8b}\n",
    "generates text": "prompt: hi\nmodel: {_component_: torchtune.models.llama3.llama3_8b}\n",
    "quantises a model": "quantizer: {_component_: torchtune.x}\nmodel: {a: 1}\n",
    "cloud file": "provider: modal\ngpu: h100\ngpu_count: 8\n",
    "config.json": "hidden_size: 4096\nmodel_type: llama\n",
    "draft model": "recipe: TrainEagle3Recipe\nrecipe_args: {a: 1}\n",
    "diffusion model": "model: {_target_: x}\nflow_matching: {a: 1}\n",
    "no trainer's settings": "model_name_or_path: a/b\n",
    "no trainer that ftplan knows": "colour: blue\n",
    "a GitHub workflow": "name: x\n'on': push\njobs: {}\n",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_training_job_is_refused_by_name(reason: str) -> None:
    """The refusal says what the file is, where, and what to give instead."""
    with pytest.raises(InputError) as caught:
        import_text(REFUSED[reason], file="some.yaml")
    assert reason in caught.value.message
    assert caught.value.location is not None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("swift infer --model a/b", "generates text"),
        ("swift deploy --model a/b", "serves"),
        ("llamafactory-cli export x.yaml", "merges"),
        ("axolotl merge-lora x.yaml", "merges"),
        ("trl vllm-serve --model a/b", "serves"),
        ("litgpt generate a/b", "generates text"),
        ("echo hello", "starts no trainer"),
    ],
)
def test_a_script_that_trains_nothing_is_refused(script: str, reason: str) -> None:
    """A command for inference, serving or merging is named as that."""
    with pytest.raises(InputError, match=reason):
        import_text(script, file="job.sh")


WRITES = """
MICRO=3
CONFIG=/somewhere/run.yml
%s
base_model: mistralai/Mistral-7B-v0.1
adapter: lora
sequence_len: 2048
micro_batch_size: ${MICRO}
lora_r: $(nproc)
EOF
axolotl train ${CONFIG}
"""


@pytest.mark.parametrize(
    "line", ["cat > ${CONFIG} << EOF", "cat <<EOF >$CONFIG", "tee $CONFIG <<EOF"]
)
def test_a_file_that_the_script_writes_is_read(line: str) -> None:
    """A here-document is the file of its name, with the script's variables and the script's
    lines; what only running would tell is left open."""
    found = import_text(WRITES % line, file="job.sh")
    assert found.plan.model.name == "mistralai/Mistral-7B-v0.1"
    assert found.plan.batch.micro == 3 and found.plan.batch.seq_len == 2048
    (unknown,) = [finding for finding in found.findings if finding.code == "IMP006"]
    assert "$(nproc)" in unknown.message and unknown.location is not None
    assert unknown.location.line == 9
    place = found.places["batch.seq_len"]
    assert (place.file, place.line) == ("job.sh", 7)


def test_a_quoted_here_document_is_taken_as_it_stands() -> None:
    """Nothing is filled in between quoted marks, as in the shell."""
    text = WRITES.replace("${MICRO}", "4") % "cat > ${CONFIG} << 'EOF'"
    with pytest.raises(InputError, match="lora_r"):
        import_text(text, file="job.sh")
    assert import_text(text.replace("$(nproc)", "8"), file="job.sh").plan.batch.micro == 4


def test_from_overrules_detection_and_unknown_names_are_refused() -> None:
    """`--from` takes the names of the readers and no others."""
    text = "model_name_or_path: a/b\nper_device_train_batch_size: 1\n"
    assert import_text(text, file="a.yaml", trainer="transformers").trainer == "transformers"
    with pytest.raises(UnknownNameError) as caught:
        import_text(text, file="a.yaml", trainer="axolotle")
    assert caught.value.suggestions[0] == "axolotl"


def test_a_named_deepspeed_file_is_read_beside_the_config(tmp_path: Path) -> None:
    """A DeepSpeed path is looked for beside the file; absolute paths are never opened."""
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"},'
        ' "reduce_bucket_size": "auto", "stage3_max_live_parameters": 1e9}}'
    )
    config = tmp_path / "job.yaml"
    config.write_text("base_model: a/b\ndeepspeed: ds.json\n")
    sharding = import_file(config).plan.sharding
    assert (sharding.kind, sharding.offload, sharding.auto_buckets) == ("zero3", "params", True)
    assert sharding.max_live_elements == 10**9
    config.write_text(f"base_model: a/b\ndeepspeed: {tmp_path / 'ds.json'}\n")
    codes = {finding.code for finding in import_file(config).findings}
    assert "IMP004" in codes


def test_a_command_reads_the_config_it_names(tmp_path: Path) -> None:
    """`axolotl train FILE --key value` is the file with the command's keys on top, and each key
    points at where it was said."""
    (tmp_path / "job.yaml").write_text("base_model: a/b\nmicro_batch_size: 2\nsequence_len: 1024\n")
    script = tmp_path / "run.sh"
    script.write_text("axolotl train job.yaml --micro-batch-size 4\n")
    imported = import_file(script)
    assert imported.plan.batch.micro == 4
    assert imported.plan.batch.seq_len == 1024
    assert imported.places["batch.micro"].file.endswith("run.sh")
    assert imported.places["batch.seq_len"].file.endswith("job.yaml")
    assert imported.places["batch.seq_len"].line == 3


def test_overlays_say_processes_and_sharding() -> None:
    """An accelerate file on top of a trainer's file gives GPUs, nodes and FSDP; any other file
    is refused as an overlay."""
    base = parse_document("base_model: a/b\nmicro_batch_size: 1\n", file="a.yaml")
    overlay = parse_document(
        "distributed_type: FSDP\nnum_processes: 16\nnum_machines: 2\n"
        "fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}\n",
        file="acc.yaml",
    )
    plan = _import(base, overlay).plan
    assert (plan.hardware.count, plan.hardware.nodes) == (8, 2)
    assert (plan.sharding.kind, plan.sharding.reshard_after_forward) == ("fsdp", False)
    with pytest.raises(InputError, match="overlay"):
        _import(base, base)


def _import(base: Document, overlay: Document) -> Any:
    from ftplan.trainers import import_document

    return import_document(base, overlays=[overlay])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("base_model: a/b\nadapter: qlora\nload_in_4bit: false\n", "CFG007"),
        ("base_model: a/b\nload_in_8bit: true\n", "CFG006"),
        ("base_model: a/b\nbf16: true\nfp16: true\n", "CFG007"),
        ("base_model: a/b\nsample_packing: true\nattn_implementation: sdpa\n", "CFG008"),
        ("base_model: a/b\npad_to_sequence_len: true\n", "CFG005"),
        ("base_model: a/b\nsequence_len: 32768\n", "CFG002"),
        ("base_model: a/b\nadapter: lora\nlora_modules_to_save: [lm_head]\n", "CFG013"),
        ("base_model: a/b\noptimizer: wonder\n", "IMP005"),
        ("base_model: a/b\nmicro_batchsize: 2\n", "IMP003"),
        ("base_model: a/b\nfp8: true\n", "IMP002"),
        (
            "base_model: a/b\ngradient_checkpointing: true\nfsdp: [full_shard]\n"
            "fsdp_config: {activation_checkpointing: true}\n",
            "CFG009",
        ),
    ],
)
def test_settings_that_waste_contradict_or_do_nothing_are_found(text: str, code: str) -> None:
    """Each finding appears for the setting that its page describes."""
    assert code in {finding.code for finding in import_text(text, file="a.yaml").findings}


def test_a_clean_file_has_no_warning() -> None:
    """A good configuration gets notes on what it cannot say, and no warning."""
    text = (
        "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_target_linear: true\nsequence_len: 1024\n"
        "micro_batch_size: 1\nbf16: true\ngradient_checkpointing: true\n"
    )
    findings = import_text(text, file="a.yaml").findings
    assert {finding.severity for finding in findings} <= {"info"}


def test_a_wrong_type_is_refused_at_its_key() -> None:
    """A text where a number belongs is refused with line and column."""
    with pytest.raises(InputError) as caught:
        import_text("base_model: a/b\nmicro_batch_size: two\n", file="a.yaml")
    location = caught.value.location
    assert location is not None
    assert (location.line, location.column) == (2, 1)


def test_a_variable_that_only_running_tells_is_a_finding() -> None:
    """An unset shell variable leaves the fact open and is named; it is never guessed."""
    imported = import_text(
        "swift sft --model $MODEL --max_length 512 --tuner_type lora", file="a.sh"
    )
    assert imported.plan.model.name is None
    assert {"IMP001", "IMP006"} <= {finding.code for finding in imported.findings}
    assert "model.name" in imported.missing


def test_several_visible_gpus_and_one_process_are_a_pipeline() -> None:
    """ms-swift without NPROC_PER_NODE lays the layers over the visible GPUs."""
    text = "CUDA_VISIBLE_DEVICES=0,1,2 swift sft --model a/b --max_length 512"
    plan = import_text(text, file="a.sh").plan
    assert (plan.hardware.count, plan.sharding.pp, plan.sharding.kind) == (3, 3, "none")


def test_json_is_read_like_yaml() -> None:
    """The same keys in JSON give the same plan."""
    yaml = "model_name_or_path: a/b\nper_device_train_batch_size: 3\nuse_peft: true\n"
    text = '{"model_name_or_path": "a/b", "per_device_train_batch_size": 3, "use_peft": true}'
    assert import_text(text, file="a.json").plan == import_text(yaml, file="a.yaml").plan


def test_our_own_plan_is_recognised() -> None:
    """A plan file is told apart from the trainers' files and read as it stands."""
    document = parse_document(
        "version: 1\nmodel: llama-3.1-8b\nmethod: {kind: lora}\n", file="p.yaml"
    )
    assert detect(document) == "plan"
    assert import_text(document.text, file="p.yaml").plan.model.name == "llama-3.1-8b"


def test_every_code_has_a_page_with_all_headings() -> None:
    """`ftplan explain CODE` has a title, what, why, a fix and a source for each code used."""
    assert set(finding_codes()) == set(SEVERITY)
    for code in finding_codes():
        page = finding_page(code.lower())
        assert all((page.title, page.what, page.why, page.fix, page.source)), code
    with pytest.raises(UnknownNameError):
        finding_page("IMP999")


def test_a_sharding_file_that_is_not_there_says_its_kind_by_its_name(tmp_path: Path) -> None:
    """A script without the accelerate or DeepSpeed file beside it is not taken for plain DDP."""
    command = "accelerate launch --config_file a/{name} swift/cli/sft.py --model Qwen/Qwen2.5-7B"
    for name, kind, version, offload in (
        ("fsdp2.json", "fsdp", 2, None), ("fsdp_offload.json", "fsdp", 1, "params"),
        ("ds_zero3_offload.yaml", "zero3", None, "params"), ("zero2.json", "zero2", None, None),
    ):  # fmt: skip
        script = tmp_path / "train.sh"
        script.write_text(command.format(name=name) + " --max_length 512\n", encoding="utf-8")
        read = import_file(script)
        sharding = read.plan.sharding
        assert (sharding.kind, sharding.version, sharding.offload) == (kind, version, offload), name
        assert {"IMP004", "IMP010"} <= {finding.code for finding in read.findings}


def test_stack_profiles_cite_every_value() -> None:
    """Each value of each stack profile stands with the place where it was read."""
    from ftplan.catalog.stacks import find_stack, stack_names, stack_page

    assert set(stack_names()) == {
        "pytorch", "transformers", "trl", "axolotl", "llamafactory", "torchtune", "litgpt",
        "unsloth", "deepspeed", "ms-swift", "nemo", "megatron", "transformers-4.46",
        "trl-1.10", "trl-0.20", "ms-swift-2", "llamafactory-v1", "llamafactory-0.9.3",
        "transformers-4.45", "trl-0.13", "trl-0.11", "torchtitan", "torchtitan-2024",
        "litgpt-0.4", "litgpt-0.3", "litgpt-2023", "torchtune-0.6", "torchtune-0.4",
        "torchtune-0.1",
    }  # fmt: skip
    for name in stack_names():
        stack, rows = stack_page(name)
        assert len(rows) == len(stack.sources)
        assert all(row.source for row in rows)
        assert stack.versions
    assert find_stack("TRL").loss_kind(method="lora", task="sft") == "chunked"
    assert find_stack("litgpt").loss_kind(method="full", task="sft") == "full"
    assert find_stack("torchtune").chunk_tokens(4096) == 512
    with pytest.raises(UnknownNameError):
        find_stack("trll")
    with pytest.raises(UnsupportedError):
        find_stack("mlx")


def test_nothing_but_an_ftplan_error_leaves_a_reader() -> None:
    """Values of the wrong shape in every place end in a refusal or a plan, never in a crash."""
    awkward: tuple[Any, ...] = (
        {},
        [],
        [[1]],
        {"a": {"b": 1}},
        "x",
        "${a.b}",
        -1,
        0,
        1e300,
        True,
        None,
        "1,2",
    )
    tried = 0
    for path in CASES:
        if path.suffix != ".yaml":
            continue
        data = parse_document(path.read_text(encoding="utf-8"), file=path.name).data
        for key in data:
            for value in awkward:
                changed = {**data, key: value}
                tried += 1
                try:
                    import_text(json.dumps(changed), file="c.json")
                except FtplanError:
                    continue
    assert tried > 1000


def test_a_command_whose_config_is_not_there_fills_in_no_default() -> None:
    """What the missing file may overrule is left open, the method too, and each flag is named."""
    imported = import_text(
        "torchrun --nproc_per_node 8 -m axolotl.cli.train job.yml --sequence-len 512", file="a.sh"
    )
    plan = imported.plan
    assert (plan.hardware.count, plan.batch.seq_len) == (8, 512)
    assert (plan.method, plan.batch.micro, plan.optimizer) == (None, None, None)
    assert {"method.kind", "batch.micro", "model.name"} <= set(imported.missing)
    assert not imported.assumptions


def test_batch_directives_of_slurm_give_gpus_and_nodes() -> None:
    """`#SBATCH` lines say nodes and GPUs a node, and fill the variables that scripts use."""
    text = (
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --gres=gpu:4\n"
        "srun torchrun --nproc_per_node $SLURM_GPUS_ON_NODE --nnodes $SLURM_NNODES train.py "
        "--model_name_or_path a/b --per_device_train_batch_size 1 --output_dir o\n"
    )
    plan = import_text(text, file="job").plan
    assert (plan.hardware.count, plan.hardware.nodes) == (4, 2)


@pytest.mark.parametrize("name", ("findings", "stacks"))
def test_the_generated_pages_are_up_to_date(name: str) -> None:
    """docs/trainers/findings.md and stacks.md are what the data says."""
    from ftplan.trainers import pages

    path = Path(__file__).parents[1] / "docs" / "trainers" / f"{name}.md"
    write = (
        f'python -c "from ftplan.trainers.pages import {name}_markdown as m; '
        f"open('docs/trainers/{name}.md', 'w').write(m())\""
    )
    text = getattr(pages, f"{name}_markdown")()
    assert path.read_text(encoding="utf-8") == text, f"run: {write}"


def test_targets_are_named_as_the_model_names_its_modules() -> None:
    """litgpt's, torchtune's and Megatron's words for a projection become the model's own."""
    script = "litgpt finetune_lora {} --lora_key true --lora_mlp true --train.max_seq_length 9"
    falcon = import_text(script.format("tiiuae/falcon-7b"), file="a.sh").plan.method
    assert falcon is not None
    assert falcon.targets == ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
    text = (
        "megatron sft --model a/b --tuner_type lora --target_modules linear_qkv linear_fc2 "
        "--max_length 9"
    )
    swift = import_text(text, file="a.sh").plan.method
    assert swift is not None
    assert swift.targets == ("q_proj", "k_proj", "v_proj", "down_proj")


def test_the_stock_trainers_files_are_not_taken_for_trl() -> None:
    """A file for transformers' own scripts has the stock Trainer's defaults, not TRL's."""
    text = '{"model_name_or_path": "a/b", "train_file": "x", "block_size": 512, "do_train": true}'
    imported = import_text(text, file="args.json")
    assert imported.trainer == "transformers"
    assert imported.plan.loss is not None
    assert imported.plan.loss.kind == "full"
    assert imported.plan.batch.seq_len == 512


def test_no_fused_loss_is_advised_where_the_trainer_needs_logits() -> None:
    """LLaMA-Factory's v1 takes its loss out of logits; its classic trainer may fuse it."""
    from ftplan.front.api import estimate

    def advised(text: str) -> list[str]:
        plan = import_text(text, file="job.yaml").plan
        plan = replace(plan, hardware=replace(plan.hardware, gpu="rtx-4090", count=1))
        return [key for remedy in estimate(plan).remedies for key in remedy.change]

    v1 = "model: Qwen/Qwen3-8B\ntrain_dataset: a.yaml\nmicro_batch_size: 4\ncutoff_len: 4096\n"
    classic = (
        "model_name_or_path: Qwen/Qwen3-8B\nstage: sft\nfinetuning_type: full\ndataset: a\n"
        "per_device_train_batch_size: 4\ncutoff_len: 4096\n"
    )
    assert not any("loss" in key for key in advised(v1))
    assert any("loss" in key for key in advised(classic))
