"""LLaMA-Factory's v1 engine on a file of its own: its data, and two steps of its loop.

The engine has no Trainer of transformers in it: ``BaseTrainer.fit`` moves a micro batch to the
GPU where it uses it, takes the loss out of the logits itself and steps an AdamW that it made.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.trace import build, core, cuda, trainers

__all__ = ["fit", "hosted", "run", "write"]


def write(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Conversations that are longer than ``cutoff_len``, and are cut to it."""
    length = int(settings.get("cutoff_len", 2048))
    row = {"messages": [_said("user", "w3"), _said("assistant", " ".join(["w4"] * length))]}
    rows = folder / settings["train_dataset"]
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(64)), "utf-8")
    return {
        "template": "chatml", "output_dir": "out",
        "batching_workers": 0, "max_steps": trainers.BATCHES,
    }  # fmt: skip


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": text}]}


def run(settings: Mapping[str, Any], _folder: Path) -> None:
    """``llamafactory-cli sft FILE`` with ``USE_V1=1``."""
    from llamafactory.v1.trainers.sft_trainer import run_sft

    run_sft(dict(settings))


def fit(
    trainer: Any, job: Any, ledger: trainers.TrainerLedger, inner: Callable[[Any], None]
) -> int:
    """Two steps of ``BaseTrainer.fit``; the clock at the end of the last forward."""
    with _disable_current_modes():
        steps = list(itertools.islice(iter(trainer.train_batch_generator), trainers.BATCHES))
    trainer.train_batch_generator = _Steps([[hosted(b, ledger) for b in s] for s in steps])
    trainer.optimizer = build.build_optimizer(job, trainer.model)
    trainer._init_lr_scheduler()
    core._mark_model(ledger, trainer.model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.mark([p.grad], "gradients")
            )
    ledger.watch_modules(trainer.model)
    clock = _Phases(trainer, ledger)
    ledger.scalar_answer = _answer(ledger.scalar_answer)

    def backward(loss: Any) -> None:  # a method of tensors, which one of an object cannot be
        clock.backward(loss)

    with cuda.patched(torch.Tensor, "backward", backward):
        inner(trainer)
    ledger.enter("end", clock.step + 1)
    return clock.forward_end


def _answer(usual: Any) -> Callable[[Any, str], Any]:
    """The norm of the gradients is finite: else the loop leaves the optimizer's step out."""

    def answer(tensor: Any, phase: str) -> Any:
        return True if phase == "step" and tensor.dtype == torch.bool else usual(tensor, phase)

    return answer


class _Phases:
    """Marks in the ledger which phase of which step is running."""

    def __init__(self, trainer: Any, ledger: trainers.TrainerLedger) -> None:
        self._ledger, self._compute_loss = ledger, trainer.compute_loss
        self._micro: int = trainer.train_batch_generator.micro_batches
        self._begun = 0
        self.forward_end = 0
        trainer.compute_loss = self.compute_loss

    @property
    def step(self) -> int:
        """The optimizer step, from 1."""
        return (self._begun - 1) // self._micro + 1

    def compute_loss(self, batch: Any) -> Any:
        """A micro batch begins."""
        self._begun += 1
        self._ledger.enter("forward", self.step)
        return self._compute_loss(batch)

    def backward(self, loss: Any) -> None:
        """``loss.backward()``; what comes after the last one is the optimizer's step."""
        gc.collect()
        self.forward_end = self._ledger.clock - 1
        self._ledger.enter("backward", self.step)
        core._backward(loss)
        self._ledger.enter("step", self.step)


class _Steps:
    """In place of ``BatchGenerator``: the same micro batches, which it made before."""

    def __init__(self, steps: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self._steps, self.micro_batches = steps, len(steps[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._steps)

    def set_epoch(self, _epoch: int) -> None:
        """Nothing is shuffled again."""


def hosted(batch: Mapping[str, Any], ledger: trainers.TrainerLedger) -> dict[str, Any]:
    """A batch in host memory: each time that it is moved, there is a new tensor on the GPU."""

    def moved(tensor: Any) -> Callable[..., Any]:
        def to(*_args: Any, **_kwargs: Any) -> Any:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
            ledger.mark([made], "inputs")
            return made

        return to

    found = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    for tensor in found.values():
        tensor.to = moved(tensor)
    return found
