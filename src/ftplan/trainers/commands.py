"""Which trainer a command starts, with which launcher, flags and configuration files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from pathlib import PurePosixPath
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location
from ftplan.files.document import Document
from ftplan.trainers.shell import (
    Command,
    CommandDocument,
    Word,
    Written,
    parse_flags,
    parse_script,
    scalar,
)

__all__ = ["ENV", "LAUNCH", "Job", "Resolve", "find_job", "looks_like_script"]

ENV = "$env"
"""Key under which a command's environment variables stand in its document."""
LAUNCH = "$launch"
"""Key under which the launcher's own flags stand (`accelerate launch`, `torchrun`)."""

_ENV_NAMES = (
    "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES",
    "WORLD_SIZE", "MAX_PIXELS", "IMAGE_MAX_TOKEN_NUM", "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM",
    "FPS_MAX_FRAMES", "MODELSCOPE_CACHE", "ACCELERATE_USE_FSDP", "FORCE_TORCHRUN", "GPUS_PER_NODE",
    "SLURM_GPUS_PER_NODE", "SLURM_NNODES",
)  # fmt: skip


@dataclass(slots=True)
class Job:
    """One command that would train."""

    trainer: str
    """Name of the reader."""
    document: CommandDocument
    """Flags, environment and launcher flags."""
    program: str
    """What is run, for people (`swift sft`)."""
    task: str | None = None
    """What the program's own name says is done (`dpo`)."""
    configs: list[Word] = field(default_factory=list)
    """Configuration files the command names, lowest first."""
    files: dict[str, Written] = field(default_factory=dict)
    """Files that the script writes itself, by name."""
    others: int = 0
    """How many more training commands the script holds."""


def looks_like_script(text: str, file: str) -> bool:
    """Whether a text is a shell script or command line, and not YAML or JSON."""
    name = PurePosixPath(file).name.lower()
    if name.endswith((".sh", ".bash", ".slurm", ".sbatch", ".zsh", ".job", ".cmd", ".command")):
        return True
    if name.endswith((".yaml", ".yml", ".json")):
        return False
    if text.startswith("#!"):
        return True
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return bool(
        re.match(
            r"(?:[A-Z_0-9]+=\S*\s+)*(?:\w[\w./-]*)\s+(?:\S+\s+)*?-{1,2}\w|(?:[A-Za-z_]\w*)=\S",
            first,
        )
    ) or bool(re.match(_TOOLS, first))


_TOOLS = re.compile(
    r"(?:[A-Z_0-9]+=\S*\s+)*(?:swift|megatron|trl|axolotl|llamafactory-cli|lmf|tune|litgpt|automodel|"
    r"accelerate|torchrun|deepspeed|python3?|uv|nohup|srun)\s"
)


def find_job(text: str, *, file: str) -> Job:
    """The first training command of a script.

    Raises :class:`InputError` for a script that trains nothing, with the reason: what it runs
    instead (`swift infer` generates text), or that no known trainer is called.
    """
    jobs: list[Job] = []
    refusals: list[tuple[Word, str]] = []
    script = parse_script(text, file=file)
    for command in script.commands:
        job = _identify(command, text, file, refusals)
        if job is not None:
            jobs.append(job)
    if jobs:
        named = [job for job in jobs if job.document.data or job.configs]
        jobs = named or jobs
        jobs[0].others = len(jobs) - 1
        jobs[0].files = script.files
        return jobs[0]
    if refusals:
        word, why = refusals[0]
        raise InputError(
            why,
            location=Location(file=file, line=word.line, column=word.column),
            remedy="give the command that trains",
        )
    raise InputError(
        "this script starts no trainer that ftplan knows",
        location=Location(file=file, line=1, column=1),
        remedy="known are swift, megatron, trl, axolotl, llamafactory-cli, tune, litgpt, "
        "automodel, "
        "and python scripts with transformers' or TRL's flags",
    )


# --- launchers -----------------------------------------------------------------------------------

_PREFIXES = {
    "nohup", "sudo", "exec", "time", "env", "eval", "stdbuf", "setsid", "bash", "sh", "command",
}  # fmt: skip
_PYTHON = re.compile(r"(?:.*/)?python[0-9.]*\Z")
_SWITCHES = {
    "multi_gpu", "use_deepspeed", "use_fsdp", "cpu", "standalone", "m", "module", "no_python",
    "quiet", "debug", "use_env", "tpu", "same_network", "fsdp_offload_params_",
}  # fmt: skip


@dataclass(slots=True)
class _Stripped:
    words: list[Word]
    launch: list[Word] = field(default_factory=list)
    launcher: str = ""
    module: bool = False


def _strip(words: list[Word]) -> _Stripped:
    """Words of the program itself, and those of the launcher in front of it."""
    found = _Stripped(list(words))
    for _ in range(12):
        if not found.words:
            break
        head = found.words[0].text
        name = PurePosixPath(head).name
        second = found.words[1].text if len(found.words) > 1 else ""
        if name in _PREFIXES or head == "then":
            found.words = found.words[1:]
            while found.words and (
                re.match(r"[A-Za-z_]\w*=", found.words[0].text)
                or found.words[0].text in ("-c", "-x")
            ):
                found.words = found.words[1:]
        elif name in ("uv", "poetry", "pdm", "pixi", "conda", "hatch") and second == "run":
            found.words = _after_options(found.words[2:])[1]
        elif name in (
            "srun",
            "mpirun",
            "numactl",
            "taskset",
            "ip",
            "timeout",
            "singularity",
            "docker",
        ):
            _, rest = _until_program(found.words[1:])
            found.words = rest
        elif name == "accelerate" and second in ("launch", "accelerate.commands.launch"):
            found.launch, found.words = _until_script(found.words[2:], found)
            found.launcher = "accelerate"
        elif name == "torchrun" or (name == "deepspeed" and len(found.words) > 1):
            found.launch, found.words = _until_script(found.words[1:], found)
            found.launcher = name
        elif _PYTHON.match(head) and second == "-m" and len(found.words) > 2:
            module = found.words[2].text
            if module in ("torch.distributed.run", "torch.distributed.launch"):
                found.launch, found.words = _until_script(found.words[3:], found)
                found.launcher = "torchrun"
            elif module in ("accelerate.commands.launch",):
                found.launch, found.words = _until_script(found.words[3:], found)
                found.launcher = "accelerate"
            else:
                found.words, found.module = found.words[2:], True
                break
        elif _PYTHON.match(head):
            found.words = found.words[1:]
            while found.words and found.words[0].text in ("-u", "-O", "-X", "-W"):
                found.words = found.words[1:]
        else:
            break
    return found


def _after_options(words: list[Word]) -> tuple[list[Word], list[Word]]:
    index = 0
    while index < len(words) and words[index].text.startswith("-"):
        index += 1 if "=" in words[index].text or words[index].text in ("--active",) else 2
    return words[:index], words[index:]


def _until_program(words: list[Word]) -> tuple[list[Word], list[Word]]:
    """Up to the first word that is a program known to start something."""
    for index, word in enumerate(words):
        name = PurePosixPath(word.text).name
        if (
            _PYTHON.match(word.text)
            or name
            in ("torchrun", "accelerate", "deepspeed", "bash", "swift", "trl", "axolotl", "tune")
            or name in ("litgpt", "automodel", "llamafactory-cli", "megatron")
            or name.endswith(".py")
        ):
            return words[:index], words[index:]
    return words, []


def _until_script(words: list[Word], found: _Stripped) -> tuple[list[Word], list[Word]]:
    """A launcher's own options end at the script or at ``-m module``."""
    index = 0
    while index < len(words):
        text = words[index].text
        if text in ("-m", "--module") and index + 1 < len(words):
            found.module = True
            return words[:index], words[index + 1 :]
        if not text.startswith("-"):
            if words[index].unresolved:
                index += 1
                continue
            return words[:index], words[index:]
        name = text.lstrip("-").split("=")[0].replace("-", "_")
        takes = "=" not in text and name not in _SWITCHES
        following = words[index + 1].text if index + 1 < len(words) else "-"
        script = following.endswith(".py") or following in ("-m", "--module")
        if takes and not script and not following.startswith("-"):
            index += 1
        index += 1
    return words, []


# --- programs ------------------------------------------------------------------------------------

_SWIFT_REFUSED = {
    "infer": "generates text", "deploy": "serves a model", "export": "converts or merges a model",
    "eval": "evaluates a model", "app": "opens a web page", "web-ui": "opens a web page",
    "rollout": "serves a model for rollouts", "sample": "samples from a model",
    "merge-lora": "merges an adapter", "ui": "opens a web page",
}  # fmt: skip
_LF_REFUSED = {
    "export": "merges or quantises a model", "chat": "talks to a model", "api": "serves a model",
    "eval": "evaluates a model", "webchat": "opens a web page", "webui": "opens a web page",
    "env": "prints the environment", "version": "prints the version", "help": "prints help",
}  # fmt: skip
_TRL_REFUSED = {
    "vllm-serve": "serves a model", "env": "prints the environment", "chat": "talks to a model",
    "skills": "installs skills",
}  # fmt: skip
_AXOLOTL_REFUSED = {
    "inference": "generates text", "merge-lora": "merges an adapter",
    "evaluate": "evaluates a model", "preprocess": "prepares the data",
    "fetch": "downloads examples", "vllm-serve": "serves a model",
    "merge-sharded-fsdp-weights": "merges weights", "quantize": "quantises a model",
    "lm-eval": "evaluates a model", "delinearize-llama4": "converts a model",
}  # fmt: skip
_LITGPT_REFUSED = {
    "download": "downloads a model", "chat": "talks to a model", "generate": "generates text",
    "serve": "serves a model", "evaluate": "evaluates a model", "merge_lora": "merges an adapter",
    "convert_to_litgpt": "converts a model", "convert_from_litgpt": "converts a model",
    "convert_pretrained_checkpoint": "converts a model",
}  # fmt: skip
_TRL_SCRIPTS = {
    "sft": "sft", "dpo": "dpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo", "ppo": "ppo",
    "rloo": "rloo", "cpo": "cpo", "simpo": "simpo", "gkd": "gkd", "xpo": "online_dpo",
    "nash_md": "online_dpo", "online_dpo": "online_dpo", "reward": "rm", "reward_modeling": "rm",
    "dpo_online": "online_dpo", "prm": "rm", "bco": "kto", "distillation": "gkd", "gold": "gkd",
}  # fmt: skip


def _identify(
    command: Command, text: str, file: str, refusals: list[tuple[Word, str]]
) -> Job | None:
    stripped = _strip(command.words)
    if not stripped.words:
        return None
    head = stripped.words[0]
    name = PurePosixPath(head.text).name
    rest = stripped.words[1:]
    verb = rest[0].text if rest else ""

    def job(trainer: str, program: str, words: list[Word], task: str | None = None) -> Job:
        return _job(trainer, program, words, task, stripped, command, text, file)

    def refuse(program: str, why: str) -> None:
        refusals.append((head, f"`{program}` {why}, it does not train"))

    if name in ("swift", "megatron") and not head.text.endswith(".py"):
        if verb in ("sft", "pt", "rlhf"):
            return job("ms-swift", f"{name} {verb}", rest[1:], verb)
        if verb in _SWIFT_REFUSED:
            refuse(f"{name} {verb}", _SWIFT_REFUSED[verb])
        return None
    match = re.search(r"swift/cli/(_megatron/)?(\w+)\.py\Z", head.text)
    if match or re.fullmatch(r"swift\.cli\.(_megatron\.)?(\w+)", head.text):
        verb = PurePosixPath(head.text).stem.rsplit(".", 1)[-1]
        program = "megatron" if "_megatron" in head.text else "swift"
        if verb in ("sft", "pt", "rlhf"):
            return job("ms-swift", f"{program} {verb}", rest, verb)
        refuse(head.text, _SWIFT_REFUSED.get(verb, "is no training command"))
        return None
    if name in ("llamafactory-cli", "lmf", "llamafactory"):
        if verb == "train" or verb.endswith((".yaml", ".yml", ".json")):
            return job(
                "llamafactory", "llamafactory-cli train", rest[1:] if verb == "train" else rest
            )
        if verb == "sft" or verb in ("dpo", "rm"):
            return job("llamafactory", f"llamafactory-cli {verb}", rest[1:], verb)
        if verb in _LF_REFUSED:
            refuse(f"{name} {verb}", _LF_REFUSED[verb])
        return None
    if name == "trl":
        key = verb.replace("-", "_")
        if key in _TRL_SCRIPTS:
            return job("trl", f"trl {verb}", rest[1:], _TRL_SCRIPTS[key])
        if verb in _TRL_REFUSED:
            refuse(f"trl {verb}", _TRL_REFUSED[verb])
        return None
    if name == "axolotl" or head.text.startswith("axolotl.cli."):
        verb = verb if name == "axolotl" else head.text.removeprefix("axolotl.cli.")
        words = rest[1:] if name == "axolotl" else rest
        if verb == "train":
            return job("axolotl", "axolotl train", words)
        if verb in _AXOLOTL_REFUSED or verb.replace("_", "-") in _AXOLOTL_REFUSED:
            refuse(f"axolotl {verb}", _AXOLOTL_REFUSED[verb.replace("_", "-")])
        return None
    if name == "tune":
        if verb == "run":
            launch, words = _tune(rest[1:])
            stripped.launch, stripped.launcher = launch, "torchrun"
            recipe = words[0].text if words else ""
            return job("torchtune", f"tune run {recipe}", words[1:], recipe)
        if verb in ("download", "ls", "cp", "validate", "cat"):
            refuse(f"tune {verb}", "prepares files")
        return None
    if name == "litgpt":
        if verb.startswith("finetune") or verb == "pretrain":
            words = rest[1:]
            if (
                verb == "finetune"
                and words
                and words[0].text in ("lora", "full", "adapter", "adapter_v2")
            ):
                verb = f"finetune_{words[0].text}"
                words = words[1:]
            return job("litgpt", f"litgpt {verb}", words, verb)
        if verb in _LITGPT_REFUSED:
            refuse(f"litgpt {verb}", _LITGPT_REFUSED[verb])
        return None
    if name == "automodel":
        words = rest
        while (
            words
            and not words[0].text.endswith((".yaml", ".yml"))
            and not words[0].text.startswith("-")
        ):
            words = words[1:]
        return job("nemo", "automodel", words)
    if name == "ftplan":
        return None
    if name.endswith(".py") or stripped.module:
        return _script(stripped, command, text, file)
    return None


def _script(stripped: _Stripped, command: Command, text: str, file: str) -> Job | None:
    """A python script, told by its flags: transformers', TRL's or LLaMA-Factory's."""
    head, rest = stripped.words[0], stripped.words[1:]
    data, _, loose = parse_flags(rest)
    stem = PurePosixPath(head.text).stem.rsplit(".", 1)[-1].lower()
    config = isinstance(data.get("config"), str) or any(_config(word) for word in loose)
    if "finetuning_type" in data or ("stage" in data and "cutoff_len" in data):
        return _job("llamafactory", head.text, rest, None, stripped, command, text, file)
    if "model" in data and ("tuner_type" in data or "train_type" in data):
        task = stem if stem in ("sft", "pt", "rlhf") else "sft"
        return _job("ms-swift", f"swift {task}", rest, task, stripped, command, text, file)
    if stem == "unsloth-cli" or ("max_seq_length" in data and "r" in data and "model_name" in data):
        return _job("unsloth", head.text, rest, None, stripped, command, text, file)
    named = "model_name_or_path" in data or "model_name" in data
    sized = any(
        key in data
        for key in (
            "per_device_train_batch_size",
            "num_train_epochs",
            "learning_rate",
            "output_dir",
        )
    )
    script = _TRL_SCRIPTS.get(stem.removeprefix("run_")) or _TRL_SCRIPTS.get(
        stem.removesuffix("_vlm")
    )
    if script is None and stem == "finetune" and "automodel" in head.text.lower():
        return _job("nemo", head.text, rest, None, stripped, command, text, file)
    if script is not None and (named or config):
        return _job("trl", head.text, rest, script, stripped, command, text, file)
    if not named or not sized:
        if config and stem.startswith("finetune") and stripped.launcher == "torchrun":
            return _job("nemo", head.text, rest, None, stripped, command, text, file)
        if config and not any(
            word in stem for word in ("eval", "infer", "generate", "test", "serve")
        ):
            # what the script is, its configuration tells
            return _job("config", head.text, rest, None, stripped, command, text, file)
        return None
    clues: tuple[str, ...] = (
        "use_peft",
        "dataset_name",
        "max_length",
        "packing",
        "lora_target_modules",
    )
    if any(key in data for key in ("model_max_length", "data_path", "q_lora", "block_size")):
        clues = ("use_peft",)
    trainer = "trl" if any(clue in data for clue in clues) and not stem.startswith("run_") else ""
    return _job(trainer or "transformers", head.text, rest, None, stripped, command, text, file)


def _tune(words: list[Word]) -> tuple[list[Word], list[Word]]:
    """Launcher options of ``tune run`` and the words from the recipe on."""
    index = 0
    while index < len(words) and words[index].text.startswith("-"):
        takes = "=" not in words[index].text and words[index].text != "--standalone"
        index += 2 if takes else 1
    return words[:index], words[index:]


def _config(word: Word) -> bool:
    return word.text.endswith((".yaml", ".yml", ".json")) and not word.unresolved


def _job(
    trainer: str, program: str, words: list[Word], task: str | None,
    stripped: _Stripped, command: Command, text: str, file: str,
) -> Job:  # fmt: skip
    data, marks, loose = parse_flags(words)
    marks[()] = stripped.words[0]
    configs: list[Word] = []
    keep: list[str] = []
    for word in loose:
        if _config(word):
            configs.append(word)
            continue
        key, sign, value = word.text.partition("=")
        if sign and re.fullmatch(r"[~+]{0,2}[A-Za-z_][\w.\-]*", key):
            path = tuple(key.lstrip("+~").split("."))
            _nest(data, path, _typed(Word(value, word.line, word.column, word.unresolved)))
            for length in range(1, len(path) + 1):
                marks[path[:length]] = word
        elif not word.unresolved:
            keep.append(word.text)
    for key in ("config", "config_file", "cfg", "recipe_config", "c"):
        named = data.get(key)
        if isinstance(named, list) and named:
            for item in named[1:]:
                name, sign, value = str(item).partition("=")
                if sign:
                    path = tuple(name.split("."))
                    word = marks[(key,)]
                    _nest(data, path, scalar(Word(value, word.line, word.column)))
                    marks |= {path[:length]: word for length in range(1, len(path) + 1)}
            named = named[0]
        if isinstance(named, str) and (
            named.endswith((".yaml", ".yml", ".json")) or trainer == "torchtune"
        ):
            word = marks[(key,)]
            configs.append(Word(named, word.line, word.column))
            del data[key]
    if keep:
        data["$words"] = keep
    launch, launch_marks, _ = parse_flags(stripped.launch)
    if launch or stripped.launcher:
        data[LAUNCH] = {"program": stripped.launcher, **launch}
        marks[(LAUNCH,)] = stripped.words[0]
        marks |= {(LAUNCH, *path): word for path, word in launch_marks.items()}
    env = {key: word for key, word in command.env.items() if key in _ENV_NAMES}
    if env:
        data[ENV] = {key: _typed(word, text=True) for key, word in env.items()}
        marks[(ENV,)] = stripped.words[0]
        marks |= {(ENV, key): word for key, word in env.items()}
    document = CommandDocument(data=data, file=file, text=text, marks=marks)
    return Job(trainer=trainer, document=document, program=program, task=task, configs=configs)


def _nest(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for step in path[:-1]:
        inner = data.get(step)
        if not isinstance(inner, dict):
            inner = {}
            data[step] = inner
        data = inner
    data[path[-1]] = value


def _typed(word: Word, *, text: bool = False) -> Any:
    if text and not word.unresolved:
        return word.text
    return scalar(word)


Resolve = Callable[[str], Document | None]
"""Reads a file that a configuration names; None when there is none to read."""
