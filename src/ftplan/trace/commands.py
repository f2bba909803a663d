"""Trainers run by their own command on a file of their own, on fake tensors.

Here nothing is told to a trainer but what its users write: its parser reads the file, its loader
loads and patches the model, it puts adapters in, its collator makes the batches and its loop runs
two steps. What stands in for something: a checkpoint's tensors are empty ones of the shapes that
``config.json`` gives, kernels of a GPU do what :mod:`cuda` and :mod:`quantized` say, and the data
are words without meaning, as many as fill the sequences.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.dataclass import dataclass
from ftplan.trace import automodel, build, core, cuda, llamafactory_v1, trainers
from ftplan.trace.job import Job, plan_from, resolve
from ftplan.trace.quantized import emulated, quantize
from ftplan.trace.shard import distributed
from ftplan.trace.triton import importable, stand_in

__all__ = ["COMMANDS", "Command", "command_versions", "run_command"]

_QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How a trainer is started, and what it reads beside the file."""

    package: str
    """Name of its distribution."""
    beside: tuple[str, ...]
    """Distributions whose versions matter, beside transformers, peft and accelerate."""
    write: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    """Write the data; the keys that a file must have and that move no memory."""
    run: Callable[[Mapping[str, Any], Path], None]
    """Start it with the file's keys."""
    on_host: tuple[tuple[str, str], ...] = ()
    """Functions, by module and name, that prepare data: they run without the modes."""
    yes: tuple[tuple[str, str], ...] = ()
    """Questions for a GPU or a kernel package, by module and name, that a GPU answers with yes."""
    asks_device: tuple[tuple[str, str], ...] = ()
    """Functions, by module and name, that launch their kernels for tensors on a GPU alone."""
    idle: tuple[tuple[str, str], ...] = ()
    """Functions that count on the host what has been moved there: they count nothing."""
    triton: bool = False
    """It imports kernels, which are launched into the void."""
    absent: tuple[str, ...] = ()
    """Packages that it imports and never calls in these jobs, where they are not installed."""
    loop: tuple[str, str] = ("transformers:Trainer", "train")
    """Its training loop, by class and method."""
    world: Callable[[Mapping[str, Any]], int] = lambda _settings: 1
    """Ranks that the file's job has; of more than one, weights are sharded by FSDP2."""
    steps: Callable[[_Run, Any, Callable[..., Any]], None] | None = None
    """Two steps of the loop, watched; None: transformers' (:func:`_trainer_steps`)."""


class _Ended(Exception):
    """The steps are over: what a command does after them is no part of a trace."""


# --- data and model folders -----------------------------------------------------------------------


def words(count: int, word: str = "w3") -> str:
    """A text of so many tokens."""
    return " ".join([word] * count)


def _model_folder(home: Path, name: str, config: Mapping[str, Any]) -> None:
    """What a hub id leads to: a config, and a tokenizer with a token for each word."""
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    written = {**config, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    written.setdefault("architectures", [_architecture(config)])
    (folder / "config.json").write_text(json.dumps(written), "utf-8")
    trainers.tokenizer().save_pretrained(str(folder))


def _tokenizer(_cls: Any, path: Any, *_args: Any, **given: Any) -> Any:
    """In place of ``AutoTokenizer.from_pretrained``, which knows better what a model type has."""
    made = trainers.tokenizer()
    made.name_or_path, made.padding_side = str(path), given.get("padding_side", "right")
    return made


def _architecture(config: Mapping[str, Any]) -> str:
    import transformers

    kind = build.model_config(dict(config))
    found = transformers.AutoModelForCausalLM._model_mapping[type(kind)]
    return str(found.__name__)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


# --- loading --------------------------------------------------------------------------------------


class _Run:
    """What the stand-ins of one run share."""

    def __init__(self, ledger: trainers.TrainerLedger, job: Job, folder: str) -> None:
        self.ledger, self.job, self.folder = ledger, job, folder
        self.result: core.TraceResult | None = None
        self.padded = False


def _loaded(run: _Run) -> Callable[..., Any]:
    """In place of ``from_pretrained``: the class's own model with empty weights, then quantised."""

    def from_pretrained(cls: Any, _path: Any, *args: Any, **given: Any) -> Any:
        config = given["config"]
        named = given.get("dtype", given.get("torch_dtype"))
        dtype = config.dtype if named in ("auto", None) else named
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dtype = dtype or torch.float32
        asked = given.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        flash = "flash" in str(asked)
        with _disable_current_modes(), torch.device("meta"):
            config._attn_implementation_internal = None
            made = cls._from_config(
                config, dtype=dtype, attn_implementation="sdpa" if flash else asked
            )
            build.keep_in_fp32(made, dtype)
        if flash:
            for module in made.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation_internal = asked
        if run.job.world == 1:  # else it is sharded first
            build.materialize(made)
        made.eval()
        settings = given.get("quantization_config") or getattr(config, "quantization_config", None)
        if settings is not None:
            run.job = _quantised(run.job, settings)
            quantize(made, run.job)
            made.hf_quantizer = trainers.Quantizer()
            made.quantization_method = "bitsandbytes"
            made.config.quantization_config = settings
        return made

    return from_pretrained


def _quantised(job: Job, settings: Any) -> Job:
    """The job with bitsandbytes' settings."""
    if settings.load_in_8bit:
        return replace(job, weights="int8", compute_dtype="bfloat16")
    compute = str(settings.bnb_4bit_compute_dtype).removeprefix("torch.")
    return replace(
        job, weights=settings.bnb_4bit_quant_type, compute_dtype=compute,
        double_quant=bool(settings.bnb_4bit_use_double_quant),
    )  # fmt: skip


# --- training -------------------------------------------------------------------------------------


def _watched(
    run: _Run, inner: Callable[..., Any], steps: Callable[[_Run, Any, Callable[..., Any]], None]
) -> Callable[..., Any]:
    """In place of a trainer's loop: two of its steps; then the command has ended."""

    def loop(trainer: Any, *_args: Any, **_kwargs: Any) -> Any:
        steps(run, trainer, inner)
        raise _Ended

    return loop


def _trainer_steps(run: _Run, trainer: Any, inner: Callable[..., Any]) -> None:
    """Of ``Trainer.train``."""
    arguments = trainer.args
    arguments.max_steps = trainers.BATCHES
    arguments.save_strategy, arguments.eval_strategy = "no", "no"
    arguments.disable_tqdm, arguments.logging_steps = True, 1000
    job = replace(
        run.job,
        micro=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
    )
    name = getattr(arguments.optim, "value", arguments.optim)
    job = _with_optimizer(job, name)
    watched = trainers.Run(
        job, trainer.model, getattr(trainer, "ref_model", None), {}, 1, run.ledger, run.folder
    )
    watched.trainer = trainer
    count = job.accumulation * trainers.BATCHES
    with _disable_current_modes():
        watched.batches = list(itertools.islice(trainer.get_train_dataloader(), count))
        run.padded = any(map(_hides, watched.batches))
    trainer.optimizer = build.build_optimizer(job, trainer.model)
    trainer.train = functools.partial(inner, trainer)
    _finish(run, trainer.model, lambda: trainers.train(watched))


def _v1_steps(run: _Run, trainer: Any, inner: Callable[..., Any]) -> None:
    """Of LLaMA-Factory's ``BaseTrainer.fit``, whose AdamW is PyTorch's as it comes: foreach."""
    job = _with_optimizer(run.job, "adamw_torch")
    _finish(run, trainer.model, lambda: llamafactory_v1.fit(trainer, job, run.ledger, inner))


def _automodel_steps(run: _Run, recipe: Any, inner: Callable[..., Any]) -> None:
    """Of a recipe of AutoModel, whose Adam is PyTorch's: foreach on a GPU, unless it is fused."""
    fused = recipe.optimizer[0].defaults.get("fused")
    job = _with_optimizer(run.job, "adamw_torch_fused" if fused else "adamw_torch")
    _finish(run, recipe.model_parts[0], lambda: automodel.fit(recipe, job, run.ledger, inner))


def _finish(run: _Run, model: Any, train: Callable[[], int]) -> None:
    trainable = core._count(model, trained=True)
    end = train()
    run.result = core._result(model, run.ledger, end, core._count(model), trainable)


def _with_optimizer(job: Job, name: str) -> Job:
    mapping = {"model": "x", "method": {"kind": "full"}, "optimizer": name}
    chosen = resolve(plan_from(mapping))
    return replace(job, optimizer=chosen.optimizer, implementation=chosen.implementation)


def _hides(batch: Any) -> bool:
    """Whether a mask of the batch hides anything."""
    masks = [value for key, value in batch.items() if "attention_mask" in key]
    return any(mask is not None and not bool(mask.bool().all()) for mask in masks)


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


def _as_on_a_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors that say they are on a GPU, and refuse views as real ones do."""
    view = torch.Tensor.view

    def viewed(tensor: Any, *shape: Any) -> Any:
        try:
            return view(tensor, *shape)
        except ValueError as error:  # a fake tensor's
            raise RuntimeError from error

    def called(*args: Any, **kwargs: Any) -> Any:
        with (
            cuda.patched(torch.Tensor, "is_cuda", True),
            cuda.patched(torch.Tensor, "view", viewed),
        ):
            return function(*args, **kwargs)

    return called


def _checkpoint(original: Any) -> Any:
    """The random state that a checkpoint stows is host memory, and nothing here is random."""

    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "preserve_rng_state": False})

    return checkpoint


def run_command(
    name: str, settings: Mapping[str, Any], config: Mapping[str, Any], *, seq_len: int, model: str,
    layers: int | None = None,
) -> core.TraceResult:  # fmt: skip
    """Two steps of a trainer on its own file's ``settings``; the peak of the second.

    ``model``: the hub id that the file names; ``config``: what it leads to, cut to ``layers``.
    """
    import transformers.modeling_utils
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface, PreTrainedModel

    command = COMMANDS[name]
    os.environ |= _QUIET
    torch.set_num_threads(1)
    ledger = trainers.TrainerLedger(seq_len, 1)
    job = replace(resolve(plan_from({"model": "x", "method": {"kind": "full"}})), seq_len=seq_len)
    world = command.world(settings)
    job = replace(job, stack=name, world=world, sharding="fsdp" if world > 1 else "none")
    ledger.sharded = world > 1
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(core._quiet())
        folder = Path(enter(tempfile.TemporaryDirectory()))
        enter(contextlib.chdir(folder))
        if command.triton:
            enter(importable())
        for package in command.absent:
            enter(_standing_in(package))
        cut = build.cut_depth(dict(config), layers) if layers is not None else dict(config)
        _model_folder(folder, model, cut)
        given = {**command.write(settings, folder), **settings}
        run = _Run(ledger, job, str(folder / "out"))
        for module, function in command.on_host:
            home = _home(module)
            enter(cuda.patched(home, function, _without_modes(getattr(home, function))))
        for module, function in command.asks_device:
            home = _home(module)
            enter(cuda.patched(home, function, _as_on_a_gpu(getattr(home, function))))
        for module, function in command.idle:
            enter(cuda.patched(_home(module), function, lambda *_args, **_kwargs: {}))
        for module, function in command.yes:
            home = _home(module)
            enter(cuda.patched(home, function, lambda *_args, **_kwargs: True))
        enter(distributed(job, ledger))
        gc.freeze()
        stack.callback(gc.unfreeze)
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(ledger)
        enter(cuda.as_on_cuda(ledger, job.capability))
        AttentionInterface.register("flash_attention_2", cuda.flash_attention(ledger))
        ledger.scalar_answer = lambda tensor, phase: cuda._scalar(tensor, phase, padded=run.padded)
        enter(emulated(replace(job, weights="nf4"), ledger))
        enter(cuda.patched(torch.nn.Module, "_apply", build.apply_to_tensors))
        enter(cuda.patched(torch.Tensor, "__deepcopy__", build.copy_tensor))
        for home in (torch.utils.checkpoint, transformers.modeling_utils):
            enter(cuda.patched(home, "checkpoint", _checkpoint(home.checkpoint)))
        enter(cuda.patched(PreTrainedModel, "from_pretrained", classmethod(_loaded(run))))
        enter(cuda.patched(transformers.AutoTokenizer, "from_pretrained", classmethod(_tokenizer)))
        home, method = _home(command.loop[0]), command.loop[1]
        steps = command.steps or _trainer_steps
        enter(cuda.patched(home, method, _watched(run, getattr(home, method), steps)))
        try:
            command.run(given, folder)
        except Exception:
            if run.result is None:  # else it is what the command does once its steps are over
                raise
    assert run.result is not None, f"{name} ended without training"
    return run.result


def _home(name: str) -> Any:
    """A module, or a class of it (``module:Class``)."""
    module, _, kind = name.partition(":")
    home = importlib.import_module(module)
    return getattr(home, kind) if kind else home


@contextlib.contextmanager
def _standing_in(package: str) -> Iterator[None]:
    """A package that is not installed and that nobody calls; it stays, as importers keep it."""
    try:
        importlib.import_module(package)
    except ImportError:
        sys.modules[package] = stand_in(package)
    yield


def command_versions(name: str) -> dict[str, str]:
    """Versions of what was run."""
    found = {}
    command = COMMANDS[name]
    for package in (command.package, *command.beside):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**core.versions(), **found}


# --- LLaMA-Factory --------------------------------------------------------------------------------


def _llamafactory_data(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A data set of each stage's kind, every sample as long as ``cutoff_len`` or cut to it."""
    length = int(settings.get("cutoff_len", 2048))
    stage = settings.get("stage", "sft")
    count, answer = 64, length  # longer than fits: every sample is cut to cutoff_len
    info: dict[str, Any] = {"file_name": "rows.json"}
    row: dict[str, Any] = {"instruction": words(2), "input": "", "output": words(answer, "w4")}
    if stage in ("dpo", "rm"):
        row = {"instruction": words(2), "chosen": words(answer, "w4"), "rejected": words(answer)}
        info |= {"ranking": True}
        info["columns"] = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    elif stage == "kto":
        row |= {"kto_tag": True}
        info["columns"] = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
    elif stage == "pt":
        row = {"text": words(length)}
        info["columns"] = {"prompt": "text"}
    rows = [dict(row) for _ in range(count)]
    if stage == "kto":
        for number in range(0, count, 2):
            rows[number]["kto_tag"] = False
    _write_json(folder / "data" / "rows.json", rows)
    _write_json(folder / "data" / "dataset_info.json", {"rows": info})
    return {
        "do_train": True, "dataset": "rows", "dataset_dir": "data", "template": "empty",
        "output_dir": "out", "report_to": "none", "max_steps": trainers.BATCHES,
        "preprocessing_num_workers": None,
    }  # fmt: skip


def _llamafactory(settings: Mapping[str, Any], folder: Path) -> None:
    from llamafactory.train.tuner import run_exp

    run_exp(dict(settings))


# --- ms-swift -------------------------------------------------------------------------------------


def _swift_data(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Conversations that are longer than fits, cut on the right."""
    length = int(_flag(settings["command"], "max_length"))
    kind = _flag(settings["command"], "rlhf_type")
    rows = []
    for number in range(64):
        answer = words(2 * length, ("w4", "w3")[number % 2])  # kto pairs each with the next one's
        question = {"role": "user", "content": words(2)}
        row: dict[str, Any] = {"messages": [question, {"role": "assistant", "content": answer}]}
        if kind in ("dpo", "orpo", "cpo", "simpo", "rm"):
            row["rejected_response"] = words(2 * length, ("w3", "w4")[number % 2])
        rows.append({**row, "label": number % 2 == 0} if kind == "kto" else row)
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    (folder / "rows.jsonl").write_text(lines, "utf-8")
    return {
        "dataset": "rows.jsonl", "truncation_strategy": "right", "output_dir": "out",
        "save_strategy": "no", "report_to": "none", "max_steps": trainers.BATCHES,
        "split_dataset_ratio": 0, "dataset_num_proc": 1, "dataloader_num_workers": 0,
        "add_version": False, "check_model": False, "load_from_cache_file": False,
    }  # fmt: skip


def _flag(command: str, name: str) -> str:
    parts = shlex.split(command)
    return parts[parts.index(f"--{name}") + 1] if f"--{name}" in parts else ""


def _swift(settings: Mapping[str, Any], folder: Path) -> None:
    from swift.pipelines import pretrain_main, rlhf_main, sft_main

    _, verb, *flags = shlex.split(settings["command"])
    for name, value in settings.items():
        if name != "command":
            flags += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    {"sft": sft_main, "pt": pretrain_main, "rlhf": rlhf_main}[verb](flags)


# --- axolotl --------------------------------------------------------------------------------------


def _axolotl_rows(task: str | None, length: int) -> tuple[list[dict[str, Any]], Any]:
    """Rows of a task's kind, and what axolotl calls it; longer ones than fit it leaves out."""
    prompt, answers = words(2), (words(length - 3, "w4"), words(length - 3))
    if task is None:
        return [{"text": words(64 * length)}], "completion"
    if task == "kto":
        answered = [
            {"prompt": prompt, "completion": answers[number % 2], "label": number % 2 == 0}
            for number in range(64)
        ]
        return answered, {
            "field_prompt": "prompt", "field_completion": "completion", "field_label": "label",
            "prompt_format": "{prompt}", "completion_format": " {completion}",
        }  # fmt: skip
    if task == "orpo":
        names, turns = ("chosen", "rejected"), [{"content": prompt, "role": "user"}]
        said = [[*turns, {"content": answer, "role": "assistant"}] for answer in answers]
        return [dict(zip(names, said, strict=True))] * 64, "chat_template.argilla"
    if task == "rm":
        whole = {"system": "", "input": prompt, "chosen": words(length, "w4")}
        return [{**whole, "rejected": words(length)}] * 64, "bradley_terry.chat_template"
    pair = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    return [pair] * 64, {
        "field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected",
        "prompt_format": "{prompt}", "chosen_format": " {chosen}", "rejected_format": " {rejected}",
    }  # fmt: skip


def _axolotl_data(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Texts that are cut into samples of ``sequence_len``; pairs for preferences."""
    task = "rm" if settings.get("reward_model") else settings.get("rl")
    rows, kind = _axolotl_rows(task, int(settings["sequence_len"]))
    _write_json(folder / "rows.json", rows)
    return {
        "datasets": [{"path": "rows.json", "ds_type": "json", "type": kind}],
        "dataset_prepared_path": "prepared", "output_dir": "out", "val_set_size": 0,
        "max_steps": trainers.BATCHES, "save_strategy": "no", "learning_rate": 1e-4,
        "dataset_num_proc": 1, "num_epochs": 1,
    }  # fmt: skip


def _axolotl(settings: Mapping[str, Any], folder: Path) -> None:
    import yaml
    from axolotl.cli import config
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train

    (folder / "job.yaml").write_text(yaml.safe_dump(dict(settings)), "utf-8")
    card = {"bf16": True, "fp8": False, "tf32": False, "n_gpu": 1, "n_node": 1}
    known = ({**card, "compute_capability": "sm_80"}, {"torch_version": str(torch.__version__)})
    with cuda.patched(config, "gpu_capabilities", lambda: known):
        cfg = config.load_cfg(str(folder / "job.yaml"))
    with _dequantising():
        do_train(cfg, TrainerCliArgs())


@contextlib.contextmanager
def _dequantising() -> Iterator[None]:
    """axolotl calls bitsandbytes' kernels by their addresses: its own tensors, and no launch."""
    from axolotl.kernels import quantize as home

    kernels = dict.fromkeys(home._NF4_DEQUANT_KERNELS, lambda *_: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda.patched(home, "_NF4_DEQUANT_KERNELS", kernels))
        for name in ("cdequantize_blockwise_fp32", "_ptr", "_stream"):
            stack.enter_context(cuda.patched(home, name, lambda *_: None))
        yield


def _stages(*names: str) -> Sequence[tuple[str, str]]:
    return [(f"llamafactory.train.{name}.workflow", "get_dataset") for name in names]


COMMANDS: dict[str, Command] = {
    "llamafactory": Command(
        package="llamafactory",
        beside=("trl", "bitsandbytes", "liger_kernel"),
        write=_llamafactory_data,
        run=_llamafactory,
        on_host=tuple(_stages("pt", "sft", "rm", "dpo", "kto")),
        yes=(
            ("transformers.training_args", "is_torch_bf16_gpu_available"),
            ("llamafactory.hparams.parser", "is_torch_bf16_gpu_available"),
            ("transformers.utils", "is_flash_attn_2_available"),
        ),
        absent=("torchaudio",),
    ),
    "llamafactory-v1": Command(
        package="llamafactory",
        beside=("bitsandbytes", "liger_kernel"),
        write=llamafactory_v1.write,
        run=llamafactory_v1.run,
        on_host=(("llamafactory.v1.core.base_trainer:BaseTrainer", "_create_batch_generator"),),
        loop=("llamafactory.v1.core.base_trainer:BaseTrainer", "fit"),
        steps=_v1_steps,
    ),
    "nemo-automodel": Command(
        package="nemo_automodel",
        beside=("bitsandbytes", "cut_cross_entropy"),
        write=automodel.write,
        run=automodel.run,
        on_host=(
            ("nemo_automodel.recipes.llm.train_ft", "create_distributed_setup_from_config"),
            ("torch.distributed.device_mesh:DeviceMesh", "__getitem__"),
            ("torch.distributed.device_mesh:DeviceMesh", "_flatten"),
            ("nemo_automodel.recipes.llm.train_ft", "_count_label_tokens"),
            ("nemo_automodel.recipes.llm.train_ft", "count_tail_padding"),
            ("nemo_automodel.components._peft.lora_mlp", "_is_silu"),
        ),
        idle=(
            ("nemo_automodel.components.training.rng", "_get_rng_state"),
            ("nemo_automodel.components.training.rng", "_restore_rng_state"),
            (automodel.RECIPE, "log_train_metrics"),
            (automodel.RECIPE, "_update_progress_bar"),
        ),
        yes=(
            ("nemo_automodel.components._peft.lora_mlp", "_use_triton"),
            ("cut_cross_entropy.cce_backward", "is_triton_greater_or_equal_3_2_0"),
        ),
        triton=True,
        world=lambda settings: int(settings.get("nproc_per_node", 1)),
        loop=(automodel.RECIPE, "run_train_validation_loop"),
        steps=_automodel_steps,
    ),
    "ms-swift": Command(
        package="ms_swift",
        beside=("trl", "bitsandbytes", "liger_kernel"),
        write=_swift_data,
        run=_swift,
        on_host=(("swift.pipelines.train.sft:SwiftSft", "_prepare_dataset"),),
        yes=(("transformers.training_args", "is_torch_bf16_gpu_available"),),
        idle=(("swift.trainers.mixin", "compute_acc"),),
    ),
    "axolotl": Command(
        package="axolotl",
        beside=("trl", "bitsandbytes", "liger_kernel"),
        write=_axolotl_data,
        run=_axolotl,
        on_host=(
            ("axolotl.common.datasets", "load_datasets"),
            ("axolotl.common.datasets", "load_preference_datasets"),
        ),
        yes=(
            ("transformers.training_args", "is_torch_bf16_gpu_available"),
            ("axolotl.utils.config", "is_torch_bf16_gpu_available"),
            ("axolotl.utils.trainer", "is_torch_bf16_gpu_available"),
        ),
        asks_device=(
            ("axolotl.monkeypatch.trainer.utils", "entropy_from_logits"),
            ("axolotl.monkeypatch.trainer.utils", "selective_log_softmax"),
        ),
        triton=True,
    ),
}
"""By the name of the trainer."""
