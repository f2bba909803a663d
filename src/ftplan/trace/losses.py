"""Losses that are not the model's own: in chunks, and of pairs with a reference.

Written after trl 1.10 (trainer/sft_trainer.py, trainer/dpo_trainer.py, trainer/utils.py): which
tensors exist, in which dtype, in which order. Trainer's own loss needs nothing here.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ftplan.errors import UnsupportedError
from ftplan.trace.job import Job

__all__ = ["compiled_cross_entropy", "loss_of"]


class _Compiled(torch.autograd.Function):
    """A cross entropy that inductor compiled: one pass each way, and no softmax is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Any, labels: Any) -> Any:
        rows = [torch.empty(logits.shape[0], 1, dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(logits, labels, *rows)
        return torch.empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _grad: Any) -> Any:
        logits, *_ = ctx.saved_tensors
        return torch.empty_like(logits), None


def compiled_cross_entropy(logits: Any, labels: Any, **_options: Any) -> Any:
    """In place of ``torch.compile(cross_entropy)``, which no fake tensor can run.

    It saves what the compiled one saves: its inputs, the largest logit and the log of the sum of
    each row (seen with ``backend="aot_eager_decomp_partition"``, torch 2.13).
    """
    return _Compiled.apply(logits, labels)


def loss_of(job: Job, model: Any, forward: Callable[..., Any], reference: Any) -> Any:
    """A function from a batch to the model's outputs with ``loss``, for the job's task."""
    if job.task == "dpo":
        return _pairs(job, model, forward, reference)
    if job.task == "rm":
        return _rewards(forward)
    if job.task == "kto":
        return _unpaired(job, model, forward, reference)
    if job.task == "orpo":
        return _odds(forward)
    if job.task in ("ppo", "grpo", "distill", "embed"):
        raise UnsupportedError(
            f"tracing the task {job.task!r}", remedy="trace sft, dpo, kto, orpo or rm"
        )
    if job.loss == "full":
        return forward
    if job.loss == "fused":
        raise UnsupportedError(
            "tracing fused loss kernels, which run on a GPU only", remedy="trace loss: chunked"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedError("tracing a chunked loss of an encoder-decoder")
    _chunk_head(base, job.chunk)
    return forward


def _rewards(forward: Callable[..., Any]) -> Any:
    """TRL's reward trainer: chosen and rejected in one batch, the loss outside the model."""

    def loss(input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        chosen, rejected = torch.chunk(outputs["logits"].squeeze(-1), chunks=2)
        return {"loss": -F.logsigmoid(chosen - rejected).mean(), "logits": outputs["logits"]}

    return loss


def _chunk_head(base: Any, size: int) -> None:
    """Let the model return the loss of its last hidden states, a chunk of tokens at a time."""
    head = base.get_output_embeddings()

    def forward(input_ids: Any = None, attention_mask: Any = None, labels: Any = None,
                **rest: Any) -> Any:  # fmt: skip
        rest.pop("use_cache", None)
        outputs = base.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **rest
        )
        states = outputs.last_hidden_state
        width = states.size(-1)
        hidden = states[..., :-1, :].reshape(-1, width)
        wanted = labels[..., 1:].reshape(-1)
        valid = wanted != -100
        order = valid.to(torch.int8).argsort(descending=True, stable=True)
        hidden, wanted = hidden[order], wanted[order]
        total = hidden.new_zeros((), dtype=torch.float32)
        correct, entropy = torch.zeros_like(total), torch.zeros_like(total)
        for start in range(0, hidden.shape[0], size):
            loss, right, disorder = checkpoint(
                _one_chunk, hidden[start : start + size], head.weight, head.bias,
                wanted[start : start + size], use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            total = total + loss
            correct = correct + right
            entropy = entropy + disorder
        return {"loss": total / valid.sum()}

    base.forward = forward


def _one_chunk(hidden: Any, weight: Any, bias: Any, wanted: Any) -> Any:
    """Loss, right answers and entropy of one chunk, in fp32."""
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits = logits + bias.float()
    log_probs = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_probs, wanted, ignore_index=-100, reduction="sum")
    valid = wanted != -100
    correct = ((logits.argmax(dim=-1) == wanted) & valid).sum().float()
    entropy = (-(log_probs.exp() * log_probs).sum(dim=-1) * valid).sum()
    return loss, correct, entropy


class _Gather(torch.autograd.Function):
    """``torch.gather``, whose gradient is added in place: on tensor subclasses, which fake
    tensors are, PyTorch makes a second copy there (FunctionsManual.cpp, ``gather_backward``)."""

    @staticmethod
    def forward(ctx: Any, values: Any, index: Any) -> Any:
        ctx.save_for_backward(values, index)
        return torch.gather(values, -1, index)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        values, index = ctx.saved_tensors
        whole = torch.zeros_like(values)
        return whole.scatter_add_(-1, index, grad), None


def _gather(values: Any, index: Any) -> Any:
    return _Gather.apply(values, index)


def _picked(logits: Any, index: Any) -> Any:
    """Log-probabilities of the labels, a sequence at a time, shape of ``index``."""
    index = index.unsqueeze(-1)
    if logits.dtype == torch.float32:
        selected = _gather(logits, index)
        sums = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return (selected - sums.unsqueeze(-1)).squeeze(-1)
    rows = []
    for row, labels in zip(logits, index, strict=True):
        log_probs = F.log_softmax(row, dim=-1)
        rows.append(_gather(log_probs, labels))
    return torch.stack(rows).squeeze(-1)


def _taken(job: Job, logits: Any, index: Any) -> Any:
    """As the stack takes them: LLaMA-Factory in fp32 and all at once (0.9.5, get_batch_logps)."""
    if job.stack != "llamafactory":
        return _picked(logits, index)
    return _gather(logits.to(torch.float32).log_softmax(-1), index.unsqueeze(-1)).squeeze(-1)


def _pairs(job: Job, model: Any, forward: Callable[..., Any], reference: Any) -> Any:
    """DPO: chosen and rejected in one forward, then the reference's without a graph."""

    def scores(outputs: Any, ids: Any) -> Any:
        if job.stack == "llamafactory":
            outputs["logits"] = outputs["logits"].to(torch.float32)
        picked = _taken(job, outputs["logits"][..., :-1, :], ids[..., 1:])
        return picked.sum(dim=1).chunk(2, dim=0)

    def loss(input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        chosen, rejected = scores(outputs, input_ids)
        margin = chosen - rejected
        if job.reference != "precomputed":
            with torch.no_grad(), _unchecked(model), _adapters_off(model, reference):
                told = (reference or forward)(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False
                )
                ref_chosen, ref_rejected = scores(told, input_ids)
            margin = margin - (ref_chosen - ref_rejected)
        return {"loss": -F.logsigmoid(0.1 * margin).mean(), "logits": outputs["logits"]}

    return loss


def _unpaired(job: Job, model: Any, forward: Callable[..., Any], reference: Any) -> Any:
    """KTO: one completion a sample, then the reference's forward without a graph."""

    def score(outputs: Any, ids: Any) -> Any:
        return _picked(outputs["logits"][..., :-1, :], ids[..., 1:]).sum(dim=1)

    def loss(input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        margin = score(outputs, input_ids)
        if job.reference != "precomputed":
            with torch.no_grad(), _unchecked(model), _adapters_off(model, reference):
                told = (reference or forward)(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False
                )
                wanted = score(told, input_ids)
            margin = margin - wanted
        return {"loss": (1 - F.sigmoid(0.1 * margin)).mean(), "logits": outputs["logits"]}

    return loss


def _odds(forward: Callable[..., Any]) -> Any:
    """ORPO: a cross entropy of the chosen half and the log-odds of both, no reference."""

    def loss(input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = outputs["logits"]
        half = logits.shape[0] // 2
        chosen = logits[:half][..., :-1, :].contiguous()
        wanted = labels[:half][..., 1:].contiguous()
        entropy = F.cross_entropy(chosen.view(-1, chosen.shape[-1]), wanted.view(-1))
        del chosen
        picked = _picked(logits[..., :-1, :], input_ids[..., 1:]).mean(-1)
        good, bad = picked[:half], picked[half:]
        odds = (good - bad) - (torch.log1p(-torch.exp(good)) - torch.log1p(-torch.exp(bad)))
        return {"loss": entropy - 0.1 * F.logsigmoid(odds).mean(), "logits": logits}

    return loss


@contextlib.contextmanager
def _unchecked(model: Any) -> Any:
    """Checkpointing off, as TRL has it for the reference's forward."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False
    yield
    for module in on:
        module.gradient_checkpointing = True


def _adapters_off(model: Any, reference: Any) -> Any:
    if reference is None and hasattr(model, "disable_adapter"):
        return model.disable_adapter()
    return contextlib.nullcontext()
