"""The command line: exit code, stdout and stderr together, for good and for every bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import PLAN, Terminal

import ftplan
from ftplan.cli.app import COMMANDS, help_text

SOURCE = Path(ftplan.__file__).parent.parent


@pytest.fixture
def ftplan_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "GITHUB_STEP_SUMMARY", "FTPLAN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(capsys)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return Path("plan.yaml")


# --- the frame ----------------------------------------------------------------------------------


def test_version(ftplan_: Terminal) -> None:
    """The version is one line on stdout."""
    said = ftplan_("--version")
    assert (said.code, said.out, said.err) == (0, f"ftplan {ftplan.__version__}\n", "")


def test_overview(ftplan_: Terminal) -> None:
    """Without arguments, and with --help, every command is listed with one line of help."""
    bare, asked = ftplan_(), ftplan_("--help")
    assert bare.code == asked.code == 0
    assert bare.out == asked.out
    for command in COMMANDS:
        assert f"  {command.name}" in bare.out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_help(ftplan_: Terminal, command: object) -> None:
    """Every command's help is plain text within 80 columns and says what it does."""
    name = getattr(command, "name", "")
    said = ftplan_(name, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"Usage: ftplan {name}")
    assert "\x1b" not in said.out
    page = help_text(name)
    assert all(len(line) <= 80 for line in page.splitlines())
    summary = " ".join(page.split("\n\n")[1].split())
    assert summary.endswith((".", "?")), summary


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("memory", "--nonsense"), "No such option: --nonsense"),
        (("memory", "--rank", "x", "--params", "1e9"), "--rank"),
        (("memory", "--rank", "0", "--params", "1e9"), "--rank"),
        (("memory", "--micro-batch", "9" * 30, "--params", "1e9"), "--micro-batch"),
        (("memory", "--method", "loar", "--params", "1e9"), "'loar' is not one of"),
        (("check",), "Missing argument"),
        (("schema", "nothing"), "'nothing' is not one of"),
    ],
)
def test_wrong_command_lines(ftplan_: Terminal, arguments: tuple[str, ...], error: str) -> None:
    """A wrong command line is one error on stderr that names the help page, and exit 2."""
    said = ftplan_(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert error in said.err
    assert "--help" in said.err


def test_our_own_faults_are_exit_2(
    ftplan_: Terminal, monkeypatch: pytest.MonkeyPatch, plan: Path
) -> None:
    """An exception that nobody expected never reads as "does not fit"."""
    from ftplan.front import api

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by mistake")

    monkeypatch.setattr(api, "estimate", broken)
    said = ftplan_("memory", plan)
    assert (said.code, said.out) == (2, "")
    assert "internal error: ZeroDivisionError" in said.err
    assert "FTPLAN_DEBUG=1" in said.err
    monkeypatch.setenv("FTPLAN_DEBUG", "1")
    assert "Traceback" in ftplan_("memory", plan).err
    monkeypatch.delenv("FTPLAN_DEBUG")
    checked = ftplan_("check", plan, "--format", "json")
    assert checked.code == 2
    assert checked.data["results"][0]["findings"][0]["code"] == "FIT010"


# --- memory -------------------------------------------------------------------------------------


def test_the_first_command(ftplan_: Terminal) -> None:
    """13e9 parameters at fp16: 26 GB of weights, 31.2 GB in all, a line per way to finetune."""
    said = ftplan_("memory", "--params", "13e9", "--dtype", "fp16")
    assert (said.code, said.err) == (0, "")
    assert "26 GB of weights, 31.2 GB in all (x 1.2)" in said.out
    assert "full, Adam" in said.out
    assert "104 GB" in said.out
    assert "QLoRA" in said.out


@pytest.mark.parametrize("count", ["13e9", "13B", "13_000_000_000", "13000000000"])
def test_counts(ftplan_: Terminal, count: str) -> None:
    """Every spelling of a count gives the textbook's bytes."""
    data = ftplan_("memory", "--params", count, "--dtype", "fp16", "--format", "json").data
    assert data["schema_version"] == 1
    assert data["allocated_bytes"]["expected"] == 31_200_000_000
    assert {t["name"].split("/")[0]: t["bytes"] for t in data["terms"]} == {
        "weights": 26_000_000_000,
        "overhead": 5_200_000_000,
    }


def test_textbook_training(ftplan_: Terminal) -> None:
    """Adam is three values a trainable parameter: 78 GB for 13e9 at 2 bytes, 6 GB for 1e9."""
    full = ftplan_(
        "memory", "--params", "13e9", "--dtype", "fp16", "--method", "full", "-f", "json"
    ).data
    part = ftplan_(
        "memory", "--params", "13e9", "--dtype", "fp16", "--trainable", "1e9", "-f", "json"
    ).data

    def extra(data: dict[str, list[dict[str, int | str]]]) -> int:
        groups = ("gradients/", "optimizer/")
        return sum(int(t["bytes"]) for t in data["terms"] if str(t["name"]).startswith(groups))

    assert extra(full) == 78_000_000_000
    assert extra(part) == 6_000_000_000


@pytest.mark.parametrize(
    ("flags", "gigabytes"),
    [
        (("--optimizer", "sgd"), 52),
        (("--optimizer", "sgd_momentum"), 78),
        (("--optimizer", "adamw_bnb_8bit"), 78),
        (("--gpus", "8", "--sharding", "zero1"), 58.5),
        (("--gpus", "8", "--sharding", "zero2"), 35.75),
        (("--gpus", "8", "--sharding", "fsdp"), 13),
        (("--tp", "2"), 52),
        (("--offload", "optimizer"), 52),
    ],
)
def test_flags_that_act_on_a_sum(
    ftplan_: Terminal, flags: tuple[str, ...], gigabytes: float
) -> None:
    """What an optimizer keeps, and how ZeRO divides a sum, is in it: 13e9 at 2 bytes, trained."""
    data = ftplan_(
        "memory", "--params", "13e9", "--dtype", "fp16", "--method", "full", *flags, "-f", "json"
    ).data
    assert data["allocated_bytes"]["expected"] == gigabytes * 10**9
    assert data["findings"][0]["severity"] == "info"


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--micro-batch", "4"), "batch.micro"),
        (("--seq-len", "4096"), "batch.seq_len"),
        (("--gradient-checkpointing",), "gradient_checkpointing"),
        (("--attention", "flash"), "attention"),
        (("--loss", "fused"), "loss"),
        (("--mixed-precision", "bf16"), "precision.mixed"),
        (("--cp", "2"), "sharding.cp"),
    ],
)
def test_flags_that_a_sum_has_no_use_for(
    ftplan_: Terminal, flags: tuple[str, ...], key: str
) -> None:
    """A flag that needs a shape is named where there is none, never dropped in silence."""
    data = ftplan_("memory", "--params", "1e9", "--method", "full", *flags, "-f", "json").data
    [finding] = [f for f in data["findings"] if f["code"] == "MEM001"]
    assert finding["severity"] == "warning"
    assert key in finding["message"]


def test_states_by_rows_and_columns_need_a_shape(ftplan_: Terminal) -> None:
    """Adafactor's states cannot be told from a count, and the refusal says what would help."""
    said = ftplan_("memory", "--params", "1e9", "--method", "full", "--optimizer", "adafactor")
    assert said.code == 2
    assert "adafactor" in said.err and "--model" in said.err


def test_the_report_s_fields(ftplan_: Terminal, plan: Path) -> None:
    """The JSON has the contract's fields, integers for bytes, and terms that add up."""
    data = ftplan_("memory", plan, "--format", "json").data
    assert list(data)[:3] == ["schema_version", "tool_version", "verdict"]
    assert set(data) >= {
        "model", "job", "allocated_bytes", "reserved_bytes", "device_bytes", "host_bytes", "gpu",
        "peak_phase", "phases", "terms", "findings", "assumptions", "remedies",
    }  # fmt: skip
    at_peak = sum(t["bytes"] for t in data["terms"] if t["at_peak"])
    assert at_peak == data["allocated_bytes"]["expected"]
    for counter in ("allocated_bytes", "reserved_bytes", "device_bytes"):
        low, expected, high = (data[counter][k] for k in ("low", "expected", "high"))
        assert low <= expected <= high
        assert all(type(n) is int for n in (low, expected, high))


def test_formats_agree(ftplan_: Terminal, plan: Path) -> None:
    """YAML says what JSON says; table and Markdown show the same peak."""
    from ftplan.files.document import parse_document
    from ftplan.units import GIB

    data = ftplan_("memory", plan, "--format", "json").data
    in_yaml = ftplan_("memory", plan, "--format", "yaml").out
    assert parse_document(in_yaml, file="f").data == data
    peak = f"{data['device_bytes']['expected'] / GIB:.2f} GiB"
    assert peak in ftplan_("memory", plan).out
    assert peak in ftplan_("memory", plan, "--format", "markdown").out


def test_explain_flag(ftplan_: Terminal, plan: Path) -> None:
    """--explain prints the formula and the source of every term."""
    data = ftplan_("memory", plan, "--format", "json").data
    page = " ".join(ftplan_("memory", plan, "--explain").out.split())
    for term in data["terms"]:
        assert term["name"] in page
        assert " ".join(term["formula"].split()) in page


def test_a_model_without_flash_attention_is_sized_without_it(ftplan_: Terminal) -> None:
    """transformers would not load it so: the answer is the one with SDPA, and says so."""
    job = ("memory", "--model", "t5-small", "--method", "full", "--format", "json")
    asked = ftplan_(*job, "--attention", "flash").data
    assert [each["code"] for each in asked["findings"]] == ["MEM007"]
    assert asked["allocated_bytes"] == ftplan_(*job, "--attention", "sdpa").data["allocated_bytes"]


@pytest.mark.parametrize("command", ["memory", "check", "fit"])
def test_explain_says_where_each_assumption_was_read(
    ftplan_: Terminal, plan: Path, command: str
) -> None:
    """Sources of what was filled in come with --explain alone."""
    report = ftplan_("memory", plan, "--format", "json").data
    filled = {each["key"]: each["source"] for each in report["assumptions"]}
    source = " ".join(filled["attention"].split())
    short, full = (
        " ".join(ftplan_(command, plan, *more).out.split()) for more in ((), ("--explain",))
    )
    assert source not in short
    assert "attention = " in full and source in full


@pytest.mark.parametrize(
    ("flags", "error", "remedy"),
    [
        (("--params", "1e9", "--model", "gpt2"), "both name the model", "one of"),
        (("--params", "1e9", "--rank", "8"), "--rank belongs to an adapter", "--method lora"),
        (("--params", "1e9", "--method", "full", "--rank", "8"), "has none", "lora"),
        (("--params", "1e9", "--method", "full", "--last-layers", "2"), "contradicts", ""),
        (("--params", "1e9", "--method", "lora", "--last-layers", "2"), "partial", "leave"),
        (("--params", "1e9", "--trainable", "1e8", "--last-layers", "2"), "both say", "--params"),
        (("--params", "1e9", "--optimizer", "sgd"), "acts on training", "--method"),
        (("--params", "1e9", "--task", "dpo"), "no method says how", "--method"),
        (("--params", "1e9", "--task", "serve", "--method", "full"), "contradicts it", ""),
        (("--params", "1GB"), "unknown suffix", "K, M, B or T"),
        (("--params", "-1"), "not a count", "13e9"),
        (("--params", "0"), "whole positive", "13e9"),
        (("--params", "1e9", "--headroom", "5"), "no percent sign", "5%"),
        (("--params", "1e9", "--host-ram", "512"), "no unit", "GiB"),
        (("--model", "llama-3.1-8b", "--method", "partial", "--trainable", "10%"), "share", "K"),
        (("--params", "1e9", "--gpus", "3", "--nodes", "2"), "spread evenly", "multiple"),
        (("--model", "llama-3.1-8bb"), "unknown model", "llama-3.1-8b"),
        (("--params", "1e9", "--gpu", "a1000"), "unknown", "ftplan gpus"),
        ((), "no model given", "--params"),
        (("--from", "axolotl"), "say how FILE is read", ""),
    ],
)
def test_flags_that_contradict_or_cannot_act(
    ftplan_: Terminal, flags: tuple[str, ...], error: str, remedy: str
) -> None:
    """A flag acts or is refused with the reason; none is parsed and ignored."""
    said = ftplan_("memory", *flags)
    assert (said.code, said.out) == (2, "")
    assert error in said.err
    assert remedy in said.err


def test_overrides_are_assumptions(ftplan_: Terminal, plan: Path) -> None:
    """A flag wins over the file, and the answer says what it replaced."""
    data = ftplan_("memory", plan, "--micro-batch", "4", "--format", "json").data
    assert data["job"]["batch"]["micro"] == 4
    [override] = [a for a in data["assumptions"] if a["key"] == "batch.micro"]
    assert override["value"] == 4
    assert "overrides the file, which says 1" in override["source"]


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (("--dtype", "nf4", "--method", "qlora"), "precision.weights", "nf4"),
        (("--method", "qlora"), "method.kind", "qlora"),
        (("--rank", "64"), "method.rank", 64),
        (("--targets", "q_proj,v_proj"), "method.targets", ["q_proj", "v_proj"]),
        (("--targets", "attention"), "method.targets", "attention"),
        (("--targets", r".*\.q_proj"), "method.targets", r".*\.q_proj"),
        (("--modules-to-save", "lm_head"), "method.modules_to_save", ["lm_head"]),
        (("--adapter-dtype", "bf16"), "method.adapter_dtype", "bf16"),
        (("--mixed-precision", "bf16"), "precision.mixed", "bf16"),
        (("--optimizer", "sgd"), "optimizer.name", "sgd"),
        (("--seq-len", "512"), "batch.seq_len", 512),
        (("--grad-accum", "8"), "batch.accumulation", 8),
        (("--no-gradient-checkpointing",), "gradient_checkpointing.kind", "none"),
        (("--attention", "eager"), "attention", "eager"),
        (("--loss", "chunked"), "loss.kind", "chunked"),
        (("--kernels", "liger"), "kernels", "liger"),
        (("--stack", "trl"), "stack", "trl"),
        (("--gpu", "h100-80gb"), "hardware.gpu", "h100-80gb"),
        (("--gpus", "8"), "hardware.count", 8),
        (("--gpus", "8", "--nodes", "2"), "hardware.count", 4),
        (("--host-ram", "64GiB"), "hardware.host_ram", 2**36),
        (("--headroom", "5%"), "budget.headroom", 0.05),
        (("--gpus", "2", "--sharding", "fsdp"), "sharding.kind", "fsdp"),
        (("--gpus", "2", "--tp", "2"), "sharding.tp", 2),
        (("--method", "partial", "--last-layers", "2"), "method.last_layers", 2),
    ],
)
def test_every_flag_acts(plan: Path, flags: tuple[str, ...], key: str, value: object) -> None:
    """Each flag changes its key of the plan."""
    import dataclasses
    import typing

    from ftplan.cli.app import build_app
    from ftplan.cli.flags import JobFlags, apply_flags
    from ftplan.files.plan import read_plan

    found: list[JobFlags] = []
    app = build_app("memory")
    import typer

    root = typing.cast(typing.Any, typer.main.get_command(app))
    command = root.commands["memory"]
    command.callback = lambda **values: found.append(
        JobFlags(**{f.name: values[f.name] for f in dataclasses.fields(JobFlags)})
    )
    root(["memory", str(plan), *flags], standalone_mode=False)
    changed, overrides = apply_flags(read_plan(plan), found[0])
    seen: object = changed
    for step in key.split("."):
        seen = getattr(seen, step)
    assert (list(seen) if isinstance(seen, tuple) else seen) == value
    assert any(key in a.key or a.key in key for a in overrides)


def test_targets_all_flags_are_covered() -> None:
    """The test above names every flag of the contract's list but the model's."""
    import dataclasses

    from ftplan.cli.flags import JobFlags

    names = {f.name for f in dataclasses.fields(JobFlags)}
    assert names >= {
        "params", "model", "config", "dtype", "method", "trainable", "last_layers", "rank",
        "targets", "adapter_dtype", "mixed_precision", "optimizer", "micro_batch", "seq_len",
        "grad_accum", "gradient_checkpointing", "attention", "loss", "kernels", "stack", "task",
        "gpu", "gpus", "sharding", "offload", "tp", "pp", "cp", "ep", "dp_replicate", "headroom",
    }  # fmt: skip


# --- files of every bad kind --------------------------------------------------------------------

BAD = {
    "empty": (b"", "empty"),
    "binary": (b"\x00\x01\x02", "binary"),
    "not-utf8": (b"a: \xff\xfe", "not UTF-8"),
    "list": (b"- 1\n- 2\n", "mapping"),
    "text": (b"hello\n", "mapping"),
    "tab": (b"version: 1\nmodel:\n\tname: x\n", "tab"),
    "twice": (PLAN.encode() + b"model: gpt2\n", "given twice"),
    "unknown-key": (PLAN.encode() + b"bacth: {micro: 1}\n", "did you mean batch"),
    "wrong-type": (PLAN.encode().replace(b"micro: 1", b"micro: two"), "is a number"),
    "negative": (PLAN.encode().replace(b"micro: 1", b"micro: -1"), "cannot be -1"),
    "huge": (PLAN.encode().replace(b"micro: 1", b"micro: 1e40"), "cannot be 1e+40"),
    "no-unit": (PLAN.encode().replace(b"a100-80gb", b"a100-80gb, host_ram: 5"), "no unit"),
    "unknown-model": (PLAN.encode().replace(b"8b", b"9z"), "unknown model"),
    "unknown-gpu": (PLAN.encode().replace(b"a100-80gb", b"a1000"), "unknown GPU"),
    "missing-config": (b"version: 1\nmodel: {config: nowhere.json}\n", "nowhere.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(ftplan_: Terminal, tmp_path: Path, kind: str) -> None:
    """Every bad kind of file is exit 2 with the file's name, the reason and nothing on stdout;
    check says the same as a finding."""
    raw, message = BAD[kind]
    path = tmp_path / f"{kind}.yaml"
    path.write_bytes(raw)
    said = ftplan_("memory", path)
    assert (said.code, said.out) == (2, ""), said
    assert message in said.err
    assert "internal error" not in said.err
    assert kind in said.err
    checked = ftplan_("check", path, "--format", "json")
    assert checked.code == 2
    [result] = checked.data["results"]
    assert result["verdict"] == "unknown"
    assert message in json.dumps(result["findings"])


def test_missing_file(ftplan_: Terminal, plan: Path) -> None:
    """A file that is not there is named, with the one that was probably meant."""
    said = ftplan_("memory", "plam.yaml")
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "error: plam.yaml: there is no such file\n  help: did you mean plan.yaml?\n"
    )


def test_configs_are_data(ftplan_: Terminal, tmp_path: Path) -> None:
    """A config that names code is refused by its model_type; the code is never touched."""
    trap = tmp_path / "modeling_trap.py"
    trap.write_text("raise SystemExit('executed')\n")
    config = {"model_type": "trap", "auto_map": {"AutoModel": "modeling_trap.Trap"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = ftplan_("memory", "--config", tmp_path / "config.json")
    assert said.code == 2
    assert "trap" in said.err
    assert "internal error" not in said.err


# --- output -------------------------------------------------------------------------------------


def test_output_file(ftplan_: Terminal, plan: Path) -> None:
    """--output writes exactly what stdout would have had, and stdout stays empty."""
    shown = ftplan_("memory", plan, "--format", "json")
    written = ftplan_("memory", plan, "--format", "json", "--output", "out.json")
    assert (written.code, written.out) == (0, "")
    assert Path("out.json").read_text() == shown.out


def test_output_is_whole_or_not_at_all(ftplan_: Terminal, plan: Path) -> None:
    """A refused job leaves an earlier answer untouched; an unwritable place is an error."""
    Path("out.json").write_text("before")
    assert ftplan_("memory", "nowhere.yaml", "-o", "out.json").code == 2
    assert Path("out.json").read_text() == "before"
    said = ftplan_("memory", plan, "-o", "no/such/folder/out.json")
    assert said.code == 2
    assert "cannot write the file" in said.err
    assert {p.name for p in Path().iterdir()} == {"plan.yaml", "out.json"}


def test_output_keeps_links_and_devices(ftplan_: Terminal, plan: Path) -> None:
    """A link still points at the file that was written; a device or - is written to."""
    Path("real.json").write_text("before")
    Path("link.json").symlink_to("real.json")
    assert ftplan_("memory", plan, "-f", "json", "-o", "link.json").code == 0
    assert Path("link.json").is_symlink()
    assert json.loads(Path("real.json").read_text())["schema_version"] == 1
    assert ftplan_("memory", plan, "-o", os.devnull).code == 0
    assert ftplan_("memory", plan, "-f", "json", "-o", "-").data["schema_version"] == 1


def test_colour(ftplan_: Terminal, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour in a pipe; FORCE_COLOR gives it; NO_COLOR wins over it; a file never has it."""
    assert "\x1b[" not in ftplan_("memory", plan).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in ftplan_("memory", plan).out
    ftplan_("memory", plan, "-o", "out.txt")
    assert "\x1b[" not in Path("out.txt").read_text()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in ftplan_("memory", plan).out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_width(
    ftplan_: Terminal, plan: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """The table stays within the screen."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (("memory", plan), ("memory", plan, "--explain"), ("check", plan)):
        lines = ftplan_(*arguments).out.splitlines()
        assert max(len(line) for line in lines) <= columns


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE)}


def test_standard_input(plan: Path) -> None:
    """A plan may come from a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "ftplan", "memory", "-", "--format", "json"],
        input=PLAN, capture_output=True, text=True, env=_environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"]["name"] == "llama-3.1-8b"


def test_broken_pipe(plan: Path) -> None:
    """A reader that goes away early is no error message."""
    command = f"{sys.executable} -m ftplan models | head -1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


# --- files and catalogues -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plan", "failures"])
def test_init(ftplan_: Terminal, tmp_path: Path, kind: str) -> None:
    """The starter is a file that works, and an existing file is not overwritten."""
    path = tmp_path / "start.yaml"
    said = ftplan_("init", kind, "-o", path)
    assert (said.code, said.out) == (0, "")
    assert path.read_text().startswith("# yaml-language-server: $schema=")
    again = ftplan_("init", kind, "-o", path)
    assert again.code == 2
    assert "--force" in again.err
    assert ftplan_("init", kind, "-o", path, "--force").code == 0
    verb = {"plan": "memory", "failures": "advise"}[kind]
    assert ftplan_(verb, path).code == 0


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_answer_has_its_formats(command: object) -> None:
    """Every command but the HTML page takes --format, and every one that answers takes -o."""
    name = getattr(command, "name", "")
    page = help_text(name)
    assert "--format" in page or name == "report"
    assert "-o, --output" in page


def test_init_and_schema_formats(ftplan_: Terminal) -> None:
    """The starter and the schemas are the same data in JSON and YAML."""
    from ftplan.files.document import parse_document

    for arguments in (("init", "plan"), ("init", "failures"), ("schema", "plan")):
        data = ftplan_(*arguments, "--format", "json").data
        assert parse_document(ftplan_(*arguments, "-f", "yaml").out, file="f").data == data


@pytest.mark.parametrize("what", ["models", "gpus", "optimizers"])
def test_catalogues(ftplan_: Terminal, what: str) -> None:
    """Every row of a catalogue has a name and a source; an unknown query suggests."""
    rows = ftplan_(what, "--format", "json").data[what]
    assert len(rows) > 20
    assert all(row["name"] and row["source"] for row in rows)
    assert rows[0]["name"] in ftplan_(what, rows[0]["name"]).out
    assert ftplan_(what, rows[0]["name"], "--format", "markdown").out.startswith("| name |")
    said = ftplan_(what, "nothing-like-this")
    assert (said.code, said.out) == (2, "")


@pytest.mark.parametrize("name", ["activations", "weights/frozen", "nf4", "FIT013", "axolotl"])
def test_explain(ftplan_: Terminal, name: str) -> None:
    """A page has why and source under fixed headings."""
    page = ftplan_("explain", name).out
    assert "\nWhy\n" in page
    assert "\nSource\n" in page
    assert "## Why" in ftplan_("explain", name, "--format", "markdown").out
    assert ftplan_("explain", name, "--format", "json").data["source"]


def test_explain_unknown(ftplan_: Terminal) -> None:
    """An unknown page suggests near ones; without a name, all are listed."""
    said = ftplan_("explain", "activationz")
    assert (said.code, said.out) == (2, "")
    assert "activations" in said.err
    assert "activations" in ftplan_("explain").out


def test_every_page_of_ours_is_complete() -> None:
    """Hand-written pages say why and where from, under names that do not collide."""
    from ftplan.catalog.pages import all_pages

    pages = all_pages()
    names = [name for page in pages for name in (page.name, *page.aliases)]
    assert len(names) == len(set(names))
    assert all(page.title and page.why and page.source for page in pages)


def test_diff(ftplan_: Terminal, plan: Path) -> None:
    """A difference names the key that changed and the terms that moved, to the byte."""
    Path("other.yaml").write_text(PLAN.replace("micro: 1", "micro: 2"))
    change = ftplan_("diff", plan, "other.yaml", "--format", "json").data
    assert change["plan"] == [{"key": "batch.micro", "before": 1, "after": 2}]
    [allocated] = [t for t in change["totals"] if t["name"] == "allocated"]
    assert sum(t["delta"] for t in change["terms"]) == allocated["delta"] > 0
    assert "batch.micro" in ftplan_("diff", plan, "other.yaml").out
    assert "nothing changed" in ftplan_("diff", plan, plan).out


AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3.1-8B
adapter: lora
lora_r: 32
lora_target_linear: true
micro_batch_size: 2
sequence_len: 4096
optimizer: adamw_torch_fused
bf16: true
gradient_checkpointing: true
"""


def test_import(ftplan_: Terminal, plan: Path) -> None:
    """A trainer's config becomes a plan that reads; what it leaves open is null and a finding."""
    from ftplan.files.document import parse_document

    Path("axolotl.yaml").write_text(AXOLOTL)
    said = ftplan_("import", "axolotl.yaml")
    assert said.code == 0
    data = parse_document(said.out, file="f").data
    assert data["method"]["rank"] == 32
    assert data["hardware"]["gpu"] is None
    assert "IMP001" in said.err
    assert "--gpu" in said.err
    flagged = ftplan_("import", "axolotl.yaml", "--gpu", "a100-80gb", "--gpus", "1")
    assert "IMP001" not in flagged.err
    assert "line 3" in ftplan_("import", "axolotl.yaml", "-f", "table").out


def test_export_and_import_again(ftplan_: Terminal, plan: Path) -> None:
    """A plan written for a trainer and read again is the same job."""
    assert ftplan_("export", plan, "--to", "axolotl", "-o", "axolotl.yaml").code == 0
    first = ftplan_("memory", plan, "--stack", "axolotl", "-f", "json").data
    second = ftplan_("memory", "axolotl.yaml", "--gpu", "a100-80gb", "-f", "json").data
    assert first["model"]["trainable_params"] == second["model"]["trainable_params"]
    said = ftplan_("export", plan, "--to", "nothing")
    assert (said.code, said.out) == (2, "")


def test_report_page(ftplan_: Terminal, plan: Path) -> None:
    """One page holds the decision and the sizing, and needs nothing from elsewhere."""
    ftplan_("init", "failures", "-o", "failures.yaml")
    said = ftplan_("report", "failures.yaml", plan, "-o", "report.html")
    assert (said.code, said.out) == (0, "")
    page = Path("report.html").read_text()
    assert "The decision" in page
    assert "llama-3.1-8b" in page
    for outside in ("<script", "<link", "src=", "@import", "url("):
        assert outside not in page


# --- generated files ----------------------------------------------------------------------------

TOOLS = SOURCE.parent / "tools"


@pytest.mark.parametrize("tool", ["gen_cli_docs.py", "gen_schemas.py"])
def test_generated_files_are_current(tool: str) -> None:
    """docs/cli.md and docs/schema are what the code says; the message is the command to run."""
    if not (TOOLS / tool).is_file():
        pytest.skip("the tools are not in an installed package")
    done = subprocess.run(
        [sys.executable, str(TOOLS / tool), "--check"],
        capture_output=True, text=True, env=_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
