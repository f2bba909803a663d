"""ms-swift's own Megatron trainers over a traced model: which forwards there are, and the loss.

``forward_step`` and ``loss_func`` of swift/megatron/trainers are the package's; so is the schedule
(megatron/core/pipeline_parallel/schedules.py) that calls them. What stands in: the data (packed
rows of known lengths, of which half are chosen), and what is asked of a device to make them.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["head", "load", "step", "trainer"]

_TRAINERS = {
    "sft": ("trainer", "MegatronTrainer"),
    "classify": ("trainer", "MegatronTrainer"),
    "dpo": ("dpo_trainer", "MegatronDPOTrainer"),
    "kto": ("kto_trainer", "MegatronKTOTrainer"),
    "rm": ("reward_trainer", "MegatronRewardTrainer"),
}
_SAMPLES = 4
"""In a packed row: two pairs."""


class _Lengths(list[int]):
    """Where the samples of a row begin, known without asking a device."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return _Lengths(found) if isinstance(place, slice) else found

    def __floordiv__(self, by: int) -> _Lengths:
        return _Lengths(value // by for value in self)

    def __add__(self, other: Any) -> Any:
        return other + 0


def load() -> None:
    """Import the trainers, before anything is patched; of mcore-bridge they need names alone."""
    for name in ("mcore_bridge", "mcore_bridge.utils", "mcore_bridge.tuners"):
        sys.modules[name].__getattr__ = _named  # type: ignore[method-assign]
    for module, _ in _TRAINERS.values():
        importlib.import_module(f"swift.megatron.trainers.{module}")


def _named(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def head(model: Any, task: str, *, adapted: bool) -> None:
    """A head of scores in the place of the vocabulary's, as mcore-bridge puts it there.

    An adapter's job keeps it twice: as it was, and the copy that is trained.
    """
    if task not in ("rm", "classify") or not model.post_process:
        return
    te: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    maps = importlib.import_module("megatron.core.tensor_parallel.mappings")

    class Scores(te.TELinear):
        def forward(self, hidden: Any, *_given: Any, **_more: Any) -> Any:
            made, bias = super().forward(hidden)
            if self.config.sequence_parallel:
                made = maps.gather_from_sequence_parallel_region(
                    made, tensor_parallel_output_grad=False
                )
            return made, bias

    config = model.config
    wanted = {
        "config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False,
        "parallel_mode": "duplicated", "skip_weight_param_allocation": False,
    }  # fmt: skip
    count = 1 if task == "rm" else 2
    model.output_layer = Scores(config.hidden_size, count, **wanted)
    if adapted:
        model.original_output_layer = model.output_layer
        model.original_output_layer.requires_grad_(False)
        model.output_layer = Scores(config.hidden_size, count, **wanted)


def trainer(job: Mapping[str, Any], model: Any, reference: Any) -> Any:
    """The trainer of a task without its start: what its forward and its loss ask of it."""
    plan = job["plan"]
    task, sharding = plan["task"], plan["sharding"]
    module, name = _TRAINERS[task]
    found = importlib.import_module(f"swift.megatron.trainers.{module}")
    kind = getattr(found, name)
    made = kind.__new__(kind)
    made.args = SimpleNamespace(
        padding_free=True, context_parallel_size=1, tuner_type=plan["method"]["kind"],
        sequence_parallel=bool(sharding.get("sequence_parallel")),
        task_type="seq_cls" if task in ("rm", "classify") else "causal_lm",
        num_labels=2, problem_type="single_label_classification",
        enable_dft_loss=False, enable_channel_loss=False, center_rewards_coefficient=0.01,
        rpo_alpha=0.1, beta=0.1, reference_free=False, label_smoothing=0.0,
        f_divergence_type="reverse_kl", loss_type=["sigmoid"] if task == "dpo" else "kto",
        calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0,
        mcore_ref_adapter=None, ref_adapters=None,
    )  # fmt: skip
    made.ref_models = [reference]
    made.unwrapped_models = [model]
    made.peft_models = [SimpleNamespace(disable_adapter=lambda: _disabled(model))]
    for attribute in ("DPO", "KTO"):
        dummy = getattr(found, f"Dummy{attribute}Trainer", None)
        if dummy is not None:
            setattr(made, f"dummy_{attribute.lower()}_trainer", dummy(made.args))
    made.get_batch = lambda iterator, _vp_stage=None: next(iterator)
    return made


@contextlib.contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """PeftModel.disable_adapter."""
    layers = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _row(tokens: int, labels: Any) -> dict[str, Any]:
    packed = importlib.import_module("megatron.core.packed_seq_params").PackedSeqParams
    ids, places = (torch.empty(1, tokens, dtype=torch.int64) for _ in range(2))
    each = tokens // _SAMPLES
    starts = _Lengths(each * sample for sample in range(_SAMPLES + 1))
    given = packed(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=tokens,
        max_seqlen_kv=tokens,
    )  # fmt: skip
    given.seq_lens = torch.empty(_SAMPLES, dtype=torch.int64)
    return {
        "input_ids": ids, "position_ids": places, "attention_mask": None, "labels": labels,
        "packed_seq_params": given,
    }  # fmt: skip


def _batches(job: Mapping[str, Any]) -> Iterator[Any]:
    plan = job["plan"]
    task, tokens = plan["task"], plan["batch"]["micro"] * plan["batch"]["seq_len"]
    for _ in range(plan["batch"]["accumulation"]):
        if task == "kto":  # a row has the completions and the mismatched ones
            each = [_row(tokens // 2, torch.empty(1, tokens // 2, dtype=torch.int64))
                    for _ in range(2)]  # fmt: skip
            each[0]["label"] = [True, False] * (_SAMPLES // 2)
            yield each
        elif task == "rm":
            row = _row(tokens, None)
            del row["labels"]
            yield row
        else:
            count = _SAMPLES if task == "classify" else tokens
            yield _row(tokens, torch.empty(1, count, dtype=torch.int64))


def _new_tensor(self: Any, values: Any, dtype: Any = None) -> Any:
    """``new_tensor`` of so many values; a mask of samples is the places of half of them."""
    if dtype is torch.bool:
        return self.new_empty(len(values) // 2, dtype=torch.int64)
    return self.new_empty(len(values), dtype=dtype)


def step(job: Mapping[str, Any], model: Any, by: Any) -> None:
    """One step: the schedule of as many pipeline stages as there are, over the micro batches."""
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    plan = job["plan"]
    tokens = plan["batch"]["micro"] * plan["batch"]["seq_len"]
    before, torch.Tensor.new_tensor = torch.Tensor.new_tensor, _new_tensor
    try:
        schedules.get_forward_backward_func()(
            forward_step_func=by.forward_step, data_iterator=_batches(job), model=[model],
            num_microbatches=plan["batch"]["accumulation"],
            seq_length=tokens, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
    finally:
        torch.Tensor.new_tensor = before
