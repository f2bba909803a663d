"""torchtitan's own Trainer on fake tensors: one rank's steps, from a user's own command line.

Its configuration, model classes, parallelize function, activation checkpointing, loss, optimizers
and ``train_step`` are the package's own. What stands in for something: the card, the data, a
process group of so many ranks that moves nothing, and the kernel that ``torch.compile`` makes of
``flex_attention``, with the buffers that inductor of torch 2.13 allocates
(torch/_inductor/kernel/flex/flex_attention.py).
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.trace import core, cuda
from ftplan.trace.ledger import Ledger
from ftplan.trace.shard import local
from ftplan.trace.triton import importable

__all__ = ["Job", "run"]

Job = Mapping[str, Any]
"""A line of the bench: a user's command and the model's flavor, and the plan that means them."""

STEPS = 2


class _Card:
    """In place of ``torch.cuda``: what the trainer asks the card, and no memory behind it."""

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, _device: Any = None) -> str:
        return "NVIDIA A100"

    def get_device_properties(self, _device: Any) -> Any:
        return SimpleNamespace(total_memory=80 << 30)

    def memory_stats(self, _device: Any) -> dict[str, int]:
        return {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None


@contextlib.contextmanager
def _package() -> Iterator[Any]:
    """torchtitan as it is imported on a machine whose accelerator is what fake tensors are on."""
    import torch._utils

    with (
        importable(),
        cuda.patched(torch._utils, "_get_available_device_type", lambda: "cpu"),
        cuda.patched(torch._utils, "_get_device_module", lambda _type: _Card()),
    ):
        trainer = importlib.import_module("torchtitan.trainer")
        importlib.import_module("torchtitan.config.manager")
    yield trainer


# --- flex attention -------------------------------------------------------------------------------


@torch.library.custom_op("ftplan::flex_attention", mutates_args=())
def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Output and log-sum-exp: an operation of its own, which selective checkpointing can keep."""
    raise NotImplementedError


@_flex.register_fake
def _(query: Any, key: Any, value: Any) -> list[Any]:
    batch, heads, length, _ = query.shape
    out = torch.empty(batch, length, heads, value.shape[-1], dtype=query.dtype)
    return [out.transpose(1, 2), torch.empty(batch, heads, length, dtype=torch.float32)]


class _FlexAttention(torch.autograd.Function):
    """The compiled kernel saves q, k, v, out and log-sum-exp; the way back needs a delta too."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, ledger: Ledger) -> Any:
        out, logsumexp = _flex(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, _out, logsumexp = ctx.saved_tensors
        with ctx.ledger.named_op("flex_attention_backward"):
            delta = torch.empty_like(logsumexp)
            grads = tuple(torch.empty_like(t) for t in (query, value, key))
            del delta
        return grads[0], grads[2], grads[1], None


def _compiled_flex(ledger: Ledger) -> Callable[..., Any]:
    def flex_attention(query: Any, key: Any, value: Any, **_rest: Any) -> Any:
        return _FlexAttention.apply(query, key, value, ledger), None

    return flex_attention


def _block_mask(_mod: Any, batch: int, _heads: Any, length: int, *_rest: Any, **given: Any) -> Any:
    """What the compiled ``create_block_mask`` returns: counts and places of blocks, both ways."""
    from torch.nn.attention.flex_attention import BlockMask

    size = given.get("BLOCK_SIZE", 128)
    rows, columns = (size, size) if isinstance(size, int) else size
    q_blocks, kv_blocks = -(-length // rows), -(-length // columns)

    def pair(first: int, second: int) -> list[Any]:
        shapes = (batch, 1, first), (batch, 1, first, second)
        return [torch.empty(shape, dtype=torch.int32) for shape in shapes]

    by_query = pair(q_blocks, kv_blocks) + pair(q_blocks, kv_blocks)
    by_key = pair(kv_blocks, q_blocks) + pair(kv_blocks, q_blocks)
    return BlockMask((length, length), *by_query, *by_key, (rows, columns), _mod)


class _RMSNorm(torch.autograd.Function):
    """``_fused_rms_norm``, which CUDA has: saves its input and an fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, ledger: Ledger) -> Any:
        with ledger.named_op("_fused_rms_norm"):
            out = torch.empty_like(input)
            rstd = torch.empty(*local(input).shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(input, weight, rstd)
        ctx.ledger = ledger
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        input, weight, _rstd = ctx.saved_tensors
        with ctx.ledger.named_op("_fused_rms_norm_backward"):
            return torch.empty_like(input), torch.empty_like(weight), None


def _rms_norm(original: Any, ledger: Ledger) -> Callable[..., Any]:
    def rms_norm(input: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
        if weight is None or weight.dtype != input.dtype:
            return original(input, shape, weight, eps)
        return _RMSNorm.apply(input, weight, ledger)

    return rms_norm


def _autocast(original: Any) -> Callable[..., Any]:
    """``torch.autocast`` to fp32, which CUDA does (a router's gate) and a CPU refuses."""

    @contextlib.contextmanager
    def upwards() -> Iterator[None]:
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        torch.set_autocast_dtype("cpu", torch.float32)
        torch.set_autocast_enabled("cpu", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cpu", enabled)
            torch.set_autocast_dtype("cpu", dtype)

    def autocast(device_type: str, dtype: Any = None, **rest: Any) -> Any:
        return upwards() if dtype == torch.float32 else original(device_type, dtype, **rest)

    return autocast


# --- one rank's steps -----------------------------------------------------------------------------


@contextlib.contextmanager
def _ranks(world: int, ledger: Ledger) -> Iterator[None]:
    """A process group that moves nothing; gathered units are storages that FSDP2 resizes."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    original = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        result = original(storage, size)
        ledger.resize(storage, size)
        return result

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(world)}
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    torch.autograd.set_multithreading_enabled(False)
    try:
        with cuda.patched(torch.UntypedStorage, "resize_", resize), _real_meshes():
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """Ranks are numbers, whatever tensors are there."""
    from torch.distributed.device_mesh import DeviceMesh
    from torchtitan.distributed.parallel_dims import ParallelDims

    names = {
        DeviceMesh: ("_concatenate", "_flatten", "_unflatten", "__getitem__"),
        ParallelDims: ("build_mesh", "get_mesh", "get_optional_mesh", "get_activated_mesh"),
    }
    with contextlib.ExitStack() as stack:
        for home, methods in names.items():
            for name in methods:
                function = vars(home)[name]
                plain = getattr(function, "__func__", function)
                made: Any = _without_modes(plain)
                made = made if plain is function else staticmethod(made)
                stack.enter_context(cuda.patched(home, name, made))
        yield


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


def _configured(job: Job) -> Any:
    """The job of a user's configuration function and command line, its model cut in depth."""
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config.manager import ConfigManager

    config = ConfigManager().parse_args(shlex.split(job["command"]))
    home = importlib.import_module(f"torchtitan.models.{config.model_spec.name}")
    config.model_spec = home.model_registry(job["flavor"])
    model = config.model_spec.model
    model.layers = model.layers[: job["layers"]]
    if job["plan"]["loss"] == "full":
        config.loss = CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)
    return config


class _Batches:
    """In place of a data loader: the same batch, in host memory, as often as it is asked for."""

    def __init__(self, config: Any, ledger: Ledger) -> None:
        self.shape = (config.training.local_batch_size, config.training.seq_len)
        self.ledger = ledger

    def __iter__(self) -> Iterator[Any]:
        while True:
            names = "input", "positions", "labels"
            made = {name: self._hosted() for name in names}
            labels = made.pop("labels")
            yield made, labels

    def _hosted(self) -> Any:
        with self.ledger.on_host():
            tensor = torch.empty(self.shape, dtype=torch.int64)

        def moved(*_args: Any, **_kwargs: Any) -> Any:
            new = torch.empty(self.shape, dtype=torch.int64)
            self.ledger.mark([new], "inputs")
            return new

        tensor.to = moved
        return tensor


class _Phases:
    """Marks in the ledger which phase of which step is running."""

    def __init__(self, trainer: Any, ledger: Ledger) -> None:
        self.trainer, self.ledger = trainer, ledger
        self.forward_end = 0
        self._in_loss = False
        self._step, self._loss = trainer.forward_backward_step, trainer.loss_fn
        self._update = trainer.optimizers.step
        trainer.forward_backward_step, trainer.loss_fn = self.micro_batch, self.loss
        trainer.optimizers.step = self.update

    def micro_batch(self, **given: Any) -> Any:
        gc.collect()
        self.ledger.enter("forward", self.trainer.step)
        out = self._step(**given)
        self.ledger.enter("step", self.trainer.step)
        return out

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        self._in_loss = True  # a chunked loss goes back through the head by itself
        try:
            return self._loss(*args, **kwargs)
        finally:
            self._in_loss = False

    def backward(self, loss: Any) -> None:
        if not self._in_loss:
            self.forward_end = self.ledger.clock - 1
            self.ledger.enter("backward", self.trainer.step)
        core._backward(loss)

    def update(self) -> None:
        self._update()
        tensors = (t for each in self.trainer.optimizers for t in core._state_tensors(each))
        self.ledger.mark((local(t) for t in tensors), "optimizer")


def _balanced(original: Any) -> Callable[..., Any]:
    """Every rank is sent as many rows as every other one."""
    from torch._subclasses.fake_tensor import FakeTensor

    def dispatch(self: Any, tokens: Any, scores: Any, *rest: Any) -> Any:
        rows, ranks = scores.numel(), 1 if self.ep_mesh is None else self.ep_mesh.size()
        even = [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
        with cuda.patched(FakeTensor, "tolist", lambda _tensor: list(even)):
            return original(self, tokens, scores, *rest)

    return dispatch


def _own_sums(original: Any, ledger: Ledger) -> Any:
    """A backward in Python, whose sums are new tensors."""

    def backward(ctx: Any, *grads: Any) -> Any:
        ledger.sums_in_place = False
        try:
            return original(ctx, *grads)
        finally:
            ledger.sums_in_place = True

    return staticmethod(backward)


@contextlib.contextmanager
def _stood_in(ledger: Ledger) -> Iterator[None]:
    """The compiled kernels, and what selective checkpointing keeps of them."""
    from torchtitan.components import loss, metrics
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common import attention, decoder
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher as Dispatcher

    keeps = SelectiveAC.get_save_ops
    with (
        cuda.patched(attention.FlexAttention, "_compiled_flex_attn", _compiled_flex(ledger)),
        cuda.patched(decoder, "create_attention_mask", _block_mask),
        cuda.patched(
            SelectiveAC, "get_save_ops",
            lambda self: keeps(self) | {torch.ops.ftplan.flex_attention.default},
        ),
        cuda.patched(F, "rms_norm", _rms_norm(F.rms_norm, ledger)),
        cuda.patched(torch, "autocast", _autocast(torch.autocast)),
        cuda.patched(Dispatcher, "dispatch", _balanced(Dispatcher.dispatch)),
        cuda.patched(
            loss._LossParallelCrossEntropy, "backward",
            _own_sums(loss._LossParallelCrossEntropy.backward, ledger),
        ),
        cuda.patched(torch, "_assert_async", lambda *_: None),
        cuda.patched(metrics, "device_module", _Card()),
    ):  # fmt: skip
        yield


def run(job: Job) -> core.TraceResult:
    """Two steps of rank 0; the peak of the second."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.set_num_threads(1)
    ledger = Ledger()
    ledger.sharded = True
    logging.disable(logging.INFO)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(core._quiet())
        home = enter(_package())
        enter(contextlib.chdir(enter(tempfile.TemporaryDirectory())))
        config = _configured(job)
        enter(_ranks(job["plan"]["hardware"]["count"], ledger))
        gc.freeze()
        stack.callback(gc.unfreeze)
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(ledger)
        enter(cuda.as_on_cuda(ledger, (8, 0)))
        enter(_stood_in(ledger))
        config.tokenizer = SimpleNamespace(build=lambda **_: None)
        config.dataloader = SimpleNamespace(build=lambda **_: _Batches(config, ledger))
        return _steps(home.Trainer(config), ledger)


def _steps(trainer: Any, ledger: Ledger) -> core.TraceResult:
    (model,) = trainer.model_parts
    core._mark_model(ledger, model)
    ledger.watch_modules(model)
    clock = _Phases(trainer, ledger)
    gc.collect()

    def backward(loss: Any) -> None:  # a method of tensors, which one of an object cannot be
        clock.backward(loss)

    with cuda.patched(torch.Tensor, "backward", backward):
        batches = trainer.batch_generator(trainer.dataloader)
        for step in range(1, STEPS + 1):
            trainer.step = step
            trainer.train_step(batches)
    ledger.enter("end", STEPS + 1)
    total = core._count(model)
    return core._result(model, ledger, clock.forward_end, total, total)
