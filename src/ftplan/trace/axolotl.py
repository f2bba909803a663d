"""axolotl on a file of its own: its data, its entry point, and what it launches by itself."""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ftplan.trace import cuda, losses, trainers
from ftplan.trace.trainers import words
from ftplan.trace.triton import stand_in

__all__ = ["run", "write"]


def _rows(task: str | None, length: int) -> tuple[list[dict[str, Any]], Any]:
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


def write(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Texts that are cut into samples of ``sequence_len``; pairs for preferences."""
    task = "rm" if settings.get("reward_model") else settings.get("rl")
    rows, kind = _rows(task, int(settings["sequence_len"]))
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    return {
        "datasets": [{"path": "rows.json", "ds_type": "json", "type": kind}],
        "dataset_prepared_path": "prepared", "output_dir": "out", "val_set_size": 0,
        "max_steps": trainers.BATCHES, "save_strategy": "no", "learning_rate": 1e-4,
        "dataset_num_proc": 1, "num_epochs": 1,
    }  # fmt: skip


def run(settings: Mapping[str, Any], folder: Path) -> None:
    """``axolotl train FILE``, on an A100."""
    import yaml
    from axolotl.cli import config
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train

    (folder / "job.yaml").write_text(yaml.safe_dump(dict(settings)), "utf-8")
    card = {"bf16": True, "fp8": False, "tf32": False, "n_gpu": 1, "n_node": 1}
    known = ({**card, "compute_capability": "sm_80"}, {"torch_version": str(torch.__version__)})
    with cuda.patched(config, "gpu_capabilities", lambda: known):
        cfg = config.load_cfg(str(folder / "job.yaml"))
    with _dequantising(), _compiled_loss(), _cut_loss():
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


def _uncompiled(function: Any = None, **_options: Any) -> Any:
    """``torch.compile``, of a function or as a decorator with options."""
    return function if function is not None else lambda decorated: decorated


@contextlib.contextmanager
def _compiled_loss() -> Iterator[None]:
    """axolotl's chunked cross entropy is compiled: its stand-in saves what that saves."""
    from axolotl.monkeypatch.loss import chunked

    kind = chunked.CEWithChunkedOutputLoss
    method = staticmethod(losses.compiled_cross_entropy)
    with (
        cuda.patched(kind, "compute_cross_entropy", method),
        cuda.patched(torch, "compile", _uncompiled),
    ):
        yield


@contextlib.contextmanager
def _cut_loss() -> Iterator[None]:
    """axolotl's fork of cut cross entropy, where it is installed: its launches do nothing.

    It picks the blocks of its kernels by the card's speed, and wants addresses that are aligned.
    """
    tuning = stand_in("cut_cross_entropy.tl_autotune")
    for kernel in ("cce_forward", "cce_backward", "indexed_dot"):
        setattr(tuning, f"{kernel}_autotune", lambda: lambda function: function)
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("cut_cross_entropy") is not None:
            sys.modules.setdefault("cut_cross_entropy.tl_autotune", tuning)
            utils = importlib.import_module("cut_cross_entropy.tl_utils")
            home = importlib.import_module("cut_cross_entropy.linear_cross_entropy")
            name = "cce_linear_cross_entropy"
            enter = stack.enter_context
            enter(cuda.patched(utils, "is_package_greater_or_equal", lambda *_: True))
            enter(cuda.patched(torch.cuda, "is_bf16_supported", lambda *_: True))
            enter(cuda.patched(home, name, _aligned(getattr(home, name))))
        yield


def _aligned(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors whose addresses are multiples of everything."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with cuda.patched(torch.Tensor, "data_ptr", lambda _tensor: 0):
            return function(*args, **kwargs)

    return called
