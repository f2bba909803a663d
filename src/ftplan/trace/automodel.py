"""NeMo AutoModel on a recipe of its own: its data, its process group, and two steps of its loop.

``TrainFinetuneRecipeForNextTokenPrediction`` builds the model on the meta device, shards it there
and loads it afterwards: what stands in for loading gives the rank's own parts empty tensors. The
compiled kernels (RMSNorm in fp32, the linear cross entropy of a chunk) allocate what Inductor's
graphs do: their outputs and what the backward is handed.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.trace import build, core, cuda, trainers
from ftplan.trace.llamafactory_v1 import hosted
from ftplan.trace.shard import local

__all__ = ["RECIPE", "fit", "run", "write"]

RECIPE = "nemo_automodel.recipes.llm.train_ft:TrainFinetuneRecipeForNextTokenPrediction"


# --- what the recipe reads ------------------------------------------------------------------------


_HEADER = (278895051, 1, 0, 4)
"""Of a shard of tokens: its magic number, version, count and bytes a token."""


def write(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A shard of tokens in nanogpt's format, of which every sample takes ``seq_len``."""
    count = 256 * int(settings["dataset"]["seq_len"])
    magic, version, _, width = _HEADER
    words = array("i", [magic, version, count, width, *[0] * 252, *[3] * count])
    (folder / settings["dataset"]["file_pattern"]).write_bytes(words.tobytes())
    return {"checkpoint": {"enabled": False, "checkpoint_dir": "out"}}


def run(settings: Mapping[str, Any], folder: Path) -> None:
    """``automodel FILE``, in the process of one rank."""
    import yaml

    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), "utf-8")
    home = importlib.import_module(RECIPE.partition(":")[0])
    loader = importlib.import_module("nemo_automodel.components.config.loader")
    with _stand_ins():
        recipe = home.TrainFinetuneRecipeForNextTokenPrediction(loader.load_yaml_config(path))
        recipe.setup()
        recipe.run_train_validation_loop()


# --- what stands in -------------------------------------------------------------------------------


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """A GPU's kernels, a checkpoint's loading and the process group, while the block runs."""
    from nemo_automodel._transformers import auto_model, infrastructure
    from nemo_automodel.components.checkpoint import checkpointing
    from nemo_automodel.components.loss import chunked_ce
    from nemo_automodel.components.models.common import utils as models
    from nemo_automodel.components.training import utils as training
    from nemo_automodel.shared import tied_weights

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(cuda.patched(torch.cuda, "current_device", lambda: 0))
        enter(cuda.patched(torch.cuda, "is_bf16_supported", lambda *_: True))
        enter(cuda.patched(nn.Module, "to", _moved(nn.Module.to)))
        enter(cuda.patched(torch.cuda, "reset_peak_memory_stats", lambda *_: None))
        enter(cuda.patched(tied_weights, "_same_tensor_storage", _same_storage))
        enter(cuda.patched(training, "_use_fused_grad_norm", lambda *_: True))
        enter(cuda.patched(training, "multi_tensor_sumsq", _sum_of_squares))
        enter(cuda.patched(models, "_float32_rms_norm_fwd", _Float32RMSNorm.apply))
        enter(cuda.patched(torch, "compile", _as_it_is))
        enter(cuda.patched(chunked_ce, "_linear_cross_entropy", _LinearCE.apply))
        enter(cuda.patched(auto_model, "_init_model", _on_meta(auto_model._init_model)))
        for name in _BEFORE_LOADING:
            enter(cuda.patched(infrastructure, name, _on_meta(getattr(infrastructure, name))))
        kind = checkpointing.Checkpointer
        enter(cuda.patched(kind, "initialize_model_weights", staticmethod(_materialize)))
        enter(cuda.patched(kind, "load_model", lambda *_args, **_kwargs: None))
        enter(cuda.patched(checkpointing, "_new_gloo_process_group", lambda *_, **__: None))
        yield


def _same_storage(left: Any, right: Any) -> bool:
    """Whether two are one tensor: fake storages have no addresses to compare."""
    both = [local(tensor) for tensor in (left, right)]
    if left is right or "meta" in {tensor.device.type for tensor in both}:
        return left is right
    first, second = (tensor.untyped_storage() for tensor in both)
    return bool(first._cdata == second._cdata)


def _sum_of_squares(_gradients: Any) -> Any:
    """One kernel a dtype, whose scalar is all that it makes."""
    return torch.zeros((), dtype=torch.float64)


_BEFORE_LOADING = (
    "_apply_peft_and_lower_precision", "prepare_frozen_parameters_for_sharding", "_shard_ep_fsdp",
)  # fmt: skip
"""Steps of ``apply_model_infrastructure`` that a model may go through on the meta device."""


def _on_meta(function: Any) -> Any:
    """What runs on the meta device runs there with real meta tensors, where it does."""

    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        built = isinstance(model, nn.Module)
        empty = nn.Module.register_parameter.__name__ == "register_empty_parameter"
        meta = next(model.parameters()).device.type == "meta" if built else empty
        with _disable_current_modes() if meta else contextlib.nullcontext():
            return function(model, *args, **kwargs)

    return called


def _moved(original: Any) -> Any:
    """``Module.to``: what is asked to go to the GPU, by its number, is there."""

    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module if args and isinstance(args[0], int) else original(module, *args, **kwargs)

    return to


def _materialize(model: Any, *_args: Any, **_kwargs: Any) -> None:
    """Empty tensors for what is on the meta device: of a shard, for the rank's own part."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and local(old) is not old:
                made.setdefault(id(old), _own_part(old))
                module._parameters[name] = made[id(old)]
    if not made:
        build.materialize(model)
        return
    for module in model.modules():
        for name, old in module._buffers.items():
            if old is not None and old.device.type == "meta":
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
        if hasattr(module, "_get_fsdp_state") and module._get_fsdp_state()._fsdp_param_group:
            for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                parameter.reset_sharded_param()


def _own_part(old: Any) -> Any:
    part = local(old)
    new = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype)
    return nn.Parameter(type(old.data)(new, old._spec, requires_grad=False), old.requires_grad)


class _Float32RMSNorm(torch.autograd.Function):
    """``float32_rms_norm``: an opaque op forward, a fused reduction of each row backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, _eps: float) -> Any:
        ctx.save_for_backward(x, weight)
        made = _normed(x.float(), weight.float())
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        _rows = torch.empty(x.shape[:-1], dtype=torch.float32)
        made = torch.empty_like(x) if wants_x else None
        return made, torch.empty_like(weight) if wants_weight else None, None


def _normed(x: Any, _weight: Any) -> Any:
    """``_fused_rms_norm``: its output, and a number a row that nobody takes."""
    made = torch.empty_like(x)
    _rows = torch.empty(x.shape[:-1], dtype=torch.float32)
    return made


class _LinearCE(torch.autograd.Function):
    """``_linear_cross_entropy`` of a chunk, compiled: logits in the head's dtype, and statistics.

    Inductor materialises neither fp32 logits nor their logarithms, and its backward writes their
    gradient over the logits, which are donated to it (torch/_inductor/scheduler.py 2.13,
    ``SchedulerDonatedBuffer``).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, _ignore: int, _dtype: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, weight)
        statistics = [torch.empty(labels.shape, dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(hidden, weight, labels, logits, *statistics)
        return torch.empty(labels.shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _grad: Any) -> Any:
        hidden, weight, _labels, logits, *_ = ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        return (
            torch.mm(logits, weight) if wants_hidden else None,
            torch.mm(logits.t(), hidden) if wants_weight else None,
            None, None, None,
        )  # fmt: skip


def _as_it_is(function: Any = None, **_options: Any) -> Any:
    """In place of ``torch.compile``: what is compiled has a stand-in above."""
    return function if function is not None else _as_it_is


# --- its loop -------------------------------------------------------------------------------------


def fit(recipe: Any, job: Any, ledger: trainers.TrainerLedger, inner: Any) -> int:
    """Two steps of ``run_train_validation_loop``; the clock at the end of the last forward."""
    scheduler = recipe.step_scheduler
    with _disable_current_modes():
        steps = list(itertools.islice(iter(scheduler), trainers.BATCHES))
    model = recipe.model_parts[0]
    vars(recipe).update(  # what it tracks for its checkpoints is set once
        step_scheduler=_Steps(scheduler, [[hosted(b, ledger) for b in s] for s in steps]),
        optimizer=[build.build_optimizer(job, model)],
    )
    core._mark_model(ledger, model)
    ledger.watch_modules(model)
    clock = _Phases(recipe, ledger, len(steps[0]))
    ledger.scalar_answer = _answer(ledger.scalar_answer)

    def backward(loss: Any) -> None:
        clock.backward(loss)

    with cuda.patched(torch.Tensor, "backward", backward):
        inner(recipe)
    ledger.enter("end", clock.step + 1)
    return clock.forward_end


def _answer(usual: Any) -> Any:
    """There are labels, and the norm of the gradients is finite."""

    def answer(tensor: Any, phase: str) -> Any:
        return usual(tensor, phase) if tensor.dtype.is_floating_point else 1

    return answer


class _Phases:
    """Marks in the ledger which phase of which step is running."""

    def __init__(self, recipe: Any, ledger: Any, micro_batches: int) -> None:
        self._ledger, self._forward = ledger, recipe._forward_backward_step
        self._micro, self._begun, self.forward_end = micro_batches, 0, 0
        recipe._forward_backward_step = self.forward_backward

    @property
    def step(self) -> int:
        """The optimizer step, from 1."""
        return (self._begun - 1) // self._micro + 1

    def forward_backward(self, *args: Any, **kwargs: Any) -> None:
        """A micro batch begins, and ends with its backward."""
        self._begun += 1
        self._ledger.enter("forward", self.step)
        self._forward(*args, **kwargs)
        self._ledger.enter("step", self.step)

    def backward(self, loss: Any) -> None:
        """``loss.backward()``."""
        gc.collect()
        self.forward_end = self._ledger.clock - 1
        self._ledger.enter("backward", self.step)
        core._backward(loss)


class _Steps:
    """The recipe's scheduler, with the micro batches that it made before."""

    def __init__(self, scheduler: Any, steps: Sequence[Any]) -> None:
        self._scheduler, self._steps = scheduler, steps
        self.epochs = [0]
        self.is_val_step = self.is_ckpt_step = self.is_remote_logging_step = False
        self.sigterm_flag = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._steps)
