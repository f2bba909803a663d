"""The real trainers, run for two steps on fake tensors: their collators, losses and loops.

``trace/core.py`` runs a step as Trainer is known to run it; here Trainer and TRL's trainers run it
themselves, ``trainer.train()`` and all. What a GPU would do where a CPU does something else is
told to them as there, and Triton's kernels are launched into the void (:mod:`triton`).
A batch goes "to the device" when the loader hands it out; sampling is answered with completions of
the wanted length, everything after it (scoring, rewards, loss) is the trainer's own.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.dataclass import dataclass
from ftplan.trace import build, core, cuda, zero
from ftplan.trace.job import Job
from ftplan.trace.ledger import Ledger
from ftplan.trace.quantized import emulated, quantize
from ftplan.trace.triton import importable

__all__ = [
    "BATCHES", "TRAINERS", "Quantizer", "Run", "TrainerLedger", "run_trainer", "tokenizer", "train",
    "trainer_versions",
]  # fmt: skip

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
BATCHES = 2
"""Optimizer steps that are run: the second one counts."""


class TrainerLedger(Ledger):
    """Answers what depends on values: how many rows a mask picks.

    Of the tokens of a sequence it picks those that are no prompt; of anything else, all.
    """

    def __init__(self, seq_len: int, prompt_tokens: int) -> None:
        super().__init__()
        self.seq_len, self.prompt_tokens = seq_len, prompt_tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices: list[Any] = []
            for index in args[1]:
                masks = index is not None and index.dtype == torch.bool
                indices += self._rows(index) if masks else [index]
            args = (args[0], indices, *args[2:])
        if func is aten.nonzero.default:
            return torch.empty(self._picked(args[0]), args[0].dim(), dtype=torch.int64)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _picked(self, mask: Any) -> int:
        if mask.dim() == 1:  # of labels: the first token has none (ms-swift's logits_to_keep)
            entry = self.entry_of(mask)
            return int(mask.numel()) - (entry is not None and entry.op == "ne")
        shifted = self.seq_len - mask.shape[-1]
        if mask.dim() != 2 or shifted not in (0, 1):
            return int(mask.numel())
        return int(mask.shape[0]) * (self.seq_len - self.prompt_tokens)

    def _rows(self, mask: Any) -> list[Any]:
        """What ``nonzero`` makes of a mask: one index a dimension."""
        empty = torch.ops.aten.empty.memory_format
        shape = [self._picked(mask), mask.dim()]
        found = super().__torch_dispatch__(empty, (), (shape,), {"dtype": torch.int64})
        return list(found.unbind(1))


@dataclass(slots=True)
class Run:
    """A trainer that is about to train, and what its steps are fed."""

    job: Job
    model: Any
    other: Any
    """The reference or the teacher, where the trainer takes one."""
    arguments: Mapping[str, Any]
    """Of the trainer's own configuration, beside what the plan says."""
    prompt_tokens: int
    ledger: Ledger
    folder: str
    beside: list[Any] = field(default_factory=list)
    """PPO: the value model and the reward model."""
    trainer: Any = None
    evaluates: bool = False
    """A batch is evaluated after the last step."""
    own_loop: bool = False
    """The trainer has a loop of its own instead of Trainer's."""
    batches: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def common(self) -> dict[str, Any]:
        """TrainingArguments that every trainer gets from the plan."""
        job = self.job
        checkpointed = job.checkpointing != "none"
        kwargs = {"use_reentrant": job.reentrant, "preserve_rng_state": False}
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": job.micro,
            "gradient_accumulation_steps": job.accumulation,
            "max_steps": BATCHES,
            "use_cpu": not self.zero,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1000,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "bf16": job.mixed == "bfloat16",
            "gradient_checkpointing": checkpointed,
            "gradient_checkpointing_kwargs": kwargs if checkpointed else None,
            **({"deepspeed": zero.settings_of(job)} if self.zero else {}),
            **self.arguments,
        }

    @property
    def zero(self) -> bool:
        """DeepSpeed runs the trainer's steps."""
        return self.job.sharding.startswith("zero")

    def optimizer(self) -> Any:
        """Of what is trained, in the dtype that it is trained in."""
        model = self.trainer.model
        return build.build_optimizer(self.job, zero.cast(self.job, model) if self.zero else model)

    @property
    def count(self) -> int:
        """Samples that are needed for all steps."""
        return self.job.micro * self.job.accumulation * BATCHES

    def peft_config(self) -> Any:
        """What the plan's method asks for, where the trainer adapts the model by itself."""
        if self.job.method in ("full", "partial"):
            return None
        return build.peft_config(self.model, self.job)

    def collate(self, collator: Any, dataset: Any) -> None:
        """Batches of the trainer's own collator, on the host."""
        micro = self.job.micro
        with _disable_current_modes():
            samples = [dataset[index % len(dataset)] for index in range(self.count)]
            self.batches = [
                collator(samples[start : start + micro]) for start in range(0, self.count, micro)
            ]


def _words(count: int, word: str = "w3") -> str:
    return " ".join([word] * count)


def tokenizer() -> Any:
    """One token a word."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "w3": 3, "w4": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return made


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    from datasets import Dataset

    with _disable_current_modes():
        return Dataset.from_list([dict(row) for row in rows])


def _optimizer(run: Run, model: Any) -> tuple[Any, None]:
    return build.build_optimizer(run.job, model), None


def _trainer(run: Run) -> None:
    """``transformers.Trainer``."""
    import transformers

    job = run.job
    model = build.adapt(run.model, job, quantized_already=True)
    arguments = transformers.TrainingArguments(**run.common)
    dataset: Any = [0] * run.count
    run.trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset,
        optimizers=_optimizer(run, model),
    )  # fmt: skip
    with _disable_current_modes():
        ids = torch.full((job.micro, job.seq_len), 3)
        batch = {"input_ids": ids, "labels": ids}
        if job.padding != "none":
            batch["attention_mask"] = torch.ones_like(ids)
    run.batches = [batch] * (job.accumulation * BATCHES)


def _trl(run: Run, name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """One of TRL's trainers on a data set; its own collator makes the batches."""
    _, config, trainer = _trl_classes(name)
    fields = config.__dataclass_fields__
    length = {"max_length": run.job.seq_len} if "max_length" in fields else {}
    arguments = config(**length, **run.common, **more.pop("config", {}))
    run.trainer = trainer(
        model=run.model, args=arguments, train_dataset=_dataset(rows),
        processing_class=tokenizer(), peft_config=run.peft_config(), **more,
    )  # fmt: skip
    run.trainer.optimizer = run.optimizer()
    if not run.batches:
        run.collate(run.trainer.data_collator, run.trainer.train_dataset)


def _trl_classes(name: str) -> tuple[Any, Any, Any]:
    where = {
        "orpo": "trl.experimental.orpo",
        "gkd": "trl.experimental.gkd",
        "online_dpo": "trl.experimental.online_dpo",
    }.get(name, "trl")
    prefix = {"distillation": "Distillation", "reward": "Reward", "online_dpo": "OnlineDPO"}.get(
        name, name.upper()
    )
    module = importlib.import_module(where)
    return module, getattr(module, f"{prefix}Config"), getattr(module, f"{prefix}Trainer")


def _sft(run: Run) -> None:
    length = run.job.seq_len
    rows = [{"input_ids": [3] * length, "labels": [3] * length}] * run.count
    _trl(run, "sft", rows)


def _pairs_of(run: Run) -> list[dict[str, str]]:
    """A prompt and two answers; the trainer ends each with a token of its own."""
    answer = run.job.seq_len - run.prompt_tokens - 1
    row = {
        "prompt": _words(run.prompt_tokens),
        "chosen": " " + _words(answer, "w4"),
        "rejected": " " + _words(answer, "w3"),
    }
    return [row] * run.count


def _dpo(run: Run) -> None:
    import trl

    more = {"ref_model": run.other} if run.other is not None else {}
    told = ["ref_chosen_logps", "ref_rejected_logps"]

    def precomputed(_trainer: Any, dataset: Any, *_rest: Any) -> Any:
        with _disable_current_modes():
            for name in told:
                dataset = dataset.add_column(name, [0.0] * len(dataset))
        return dataset

    home = sys.modules[trl.DPOTrainer.__module__]
    with (
        cuda.patched(trl.DPOTrainer, "_precompute_ref_logps", precomputed),
        cuda.patched(home, "hash_module", lambda _model: ""),
    ):
        _trl(run, "dpo", _pairs_of(run), **more)


def _kto(run: Run) -> None:
    answer = run.job.seq_len - run.prompt_tokens - 1
    row = {"prompt": _words(run.prompt_tokens), "completion": " " + _words(answer, "w4")}
    rows = [{**row, "label": number % 2 == 0} for number in range(run.count)]
    more = {"ref_model": run.other} if run.other is not None else {}
    _trl(run, "kto", rows, **more)


def _orpo(run: Run) -> None:
    _trl(run, "orpo", _pairs_of(run))


def _reward(run: Run) -> None:
    rows = [{key: row[key] for key in ("chosen", "rejected")} for row in _pairs_of(run)]
    words = run.job.seq_len - 1
    rows = [{"chosen": _words(words), "rejected": _words(words, "w4")}] * len(rows)
    _trl(run, "reward", rows)


def _gkd(run: Run) -> None:
    turn = {"role": "user", "content": _words(run.prompt_tokens)}
    answer = {"role": "assistant", "content": _words(run.job.seq_len - run.prompt_tokens, "w4")}
    rows = [{"messages": [turn, answer]}] * run.count
    _trl(run, "gkd", rows, teacher_model=run.other, config={"lmbda": 0.0})


def _distillation(run: Run) -> None:
    rows = [{"prompt": _words(run.prompt_tokens)}] * run.count
    length = run.job.seq_len - run.prompt_tokens
    settings = {"max_completion_length": length}
    run.batches = _prompts(run, run.job.micro * run.job.accumulation)
    _trl(run, "distillation", rows, teacher_model=run.other, config=settings)
    run.trainer._generate = lambda prompts: (*_sampled(run, prompts), None, None, None)


def _prompts(run: Run, count: int) -> list[Any]:
    """Batches of prompts alone, all of a step at once."""
    rows = [{"prompt": _words(run.prompt_tokens)}] * count
    return [rows] * (run.job.accumulation * BATCHES)


def _sampled(run: Run, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """In place of sampling: as many completion tokens as the plan has."""
    length = run.job.seq_len - run.prompt_tokens
    return [[3] * run.prompt_tokens for _ in prompts], [[4] * length for _ in prompts]


def _grpo(run: Run, name: str = "grpo", *, vllm: bool = False) -> None:
    """``vllm``: log-probabilities come with the completions, and are corrected by the policy's."""
    job = run.job
    generations = job.micro * job.accumulation
    length = job.seq_len - run.prompt_tokens
    _, config, trainer = _trl_classes(name)
    arguments = config(
        **run.common, num_generations=generations, max_completion_length=length
    )  # fmt: skip
    rows = [{"prompt": _words(run.prompt_tokens)}] * run.count
    home = sys.modules[trainer.__module__]
    with cuda.patched(home, "create_model_from_path", lambda *_, **__: run.other):
        run.trainer = trainer(
            model=run.model, args=arguments, train_dataset=_dataset(rows),
            processing_class=tokenizer(), peft_config=run.peft_config(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
        )  # fmt: skip
    run.trainer.optimizer = run.optimizer()
    run.batches = _prompts(run, generations)

    def generate(prompts: list[Any]) -> Any:
        texts = ["w4"] * len(prompts)
        if name == "rloo":
            return (*_sampled(run, prompts), texts)
        sampled = [[0.0] * length for _ in prompts] if vllm else None
        return (*_sampled(run, prompts), None, texts, sampled, {}, None, [None] * len(prompts))

    run.trainer.use_vllm = vllm
    run.trainer._generate = generate


def _ppo(run: Run) -> None:
    """TRL's PPO, until 1.12: a policy and a value model in one wrapper, and its own loop."""
    from accelerate.state import AcceleratorState
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    job, batch = run.job, run.job.micro * run.job.accumulation
    # its Accelerator asks the launcher alone
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if job.mixed == "bfloat16" else "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"num_ppo_epochs": 1, **run.common}
    given = {key: given[key] for key in given if key not in ("max_steps", "deepspeed")}
    if run.zero:  # its own arguments stand in the way of ``deepspeed``: its scripts are launched so
        settings = Path(run.folder) / "deepspeed.json"
        settings.write_text(json.dumps(zero.settings_of(job)), encoding="ascii")
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    arguments = PPOConfig(
        **given, total_episodes=batch * BATCHES, num_sample_generations=0,
        response_length=job.seq_len - run.prompt_tokens, optim="adamw_torch_fused",
    )  # fmt: skip
    if run.zero:
        create = PPOTrainer.create_optimizer_and_scheduler

        def of_what_is_trained(trainer: Any, *args: Any, **kwargs: Any) -> None:
            zero.cast(job, trainer.model)
            create(trainer, *args, **kwargs)

        cast = cuda.patched(PPOTrainer, "create_optimizer_and_scheduler", of_what_is_trained)
    value, reward = run.beside
    reward.requires_grad_(False)
    for model in (run.model, run.other, value, reward):
        if model is not None:
            model.config.use_cache = True  # nobody turns it off in this trainer
    adapter = run.peft_config()
    reference = None if adapter else run.other
    with cast if run.zero else contextlib.nullcontext():
        run.trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer(), model=run.model, ref_model=reference,
            reward_model=reward, value_model=value, peft_config=adapter,
            train_dataset=_dataset([{"input_ids": [3]}] * batch),
        )  # fmt: skip
    query = torch.full((batch, run.prompt_tokens), 3, device="meta")
    run.batches = [{"input_ids": query}] * BATCHES
    run.trainer.dataloader = _Loader(run)
    ppo_trainer.batch_generation = partial(_generation, run)
    run.own_loop = True


def _generation(run: Run, model: Any, queries: Any, *_rest: Any) -> Any:
    """``batch_generation`` where all is sampled at once: the cache, and scores of every token.

    The scores are listed a token at a time, stacked, and padded into one tensor again
    (trl/experimental/ppo/ppo_trainer.py, ``generate`` and ``batch_generation``, 1.12).
    """
    config, sequences = run.model.config, queries.shape[0]
    length = run.job.seq_len - run.prompt_tokens
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = (sequences, config.num_key_value_heads, run.job.seq_len - 1, size)
    dtype = next(p.dtype for p in run.model.parameters() if p.dtype.is_floating_point)
    cache = [torch.empty(width, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    scores = [torch.empty(sequences, config.vocab_size) for _ in range(length)]
    stacked = torch.stack(scores, 1)
    del cache, scores
    padded = torch.empty_like(stacked)
    del stacked
    return torch.empty(sequences, run.job.seq_len, dtype=torch.int64), padded


TRAINERS: dict[str, Callable[[Run], None]] = {
    "transformers.Trainer": _trainer,
    "trl.SFTTrainer": _sft,
    "trl.DPOTrainer": _dpo,
    "trl.KTOTrainer": _kto,
    "trl.RewardTrainer": _reward,
    "trl.GRPOTrainer": _grpo,
    "trl.GRPOTrainer, vLLM": lambda run: _grpo(run, vllm=True),
    "trl.RLOOTrainer": lambda run: _grpo(run, "rloo"),
    "trl.DistillationTrainer": _distillation,
    "trl.experimental.ORPOTrainer": _orpo,
    "trl.experimental.GKDTrainer": _gkd,
    "trl.experimental.PPOTrainer": _ppo,
}
"""What builds each trainer, by the name of its class."""


def run_trainer(
    name: str,
    job: Job,
    config: dict[str, Any],
    *,
    layers: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    prompt_tokens: int = 1,
    evaluates: bool = False,
) -> core.TraceResult:
    """Two steps of a real trainer; the peak of the second. ``arguments`` are its own, by name.

    Under ZeRO-1 and 2 the worst of the first, the last and the rank that owns the most gradients.
    """
    ranks = sorted({0, 1, job.world - 1}) if job.sharding in ("zero1", "zero2") else [0]
    results = [
        _run_rank(
            name,
            replace(job, traced_rank=rank),
            config,
            layers=layers,
            arguments=arguments,
            teacher=teacher,
            prompt_tokens=prompt_tokens,
            evaluates=evaluates,
        )
        for rank in ranks
    ]
    return max(results, key=lambda result: result.allocated_bytes)


def _run_rank(
    name: str,
    job: Job,
    config: dict[str, Any],
    *,
    layers: int | None,
    arguments: Mapping[str, Any] | None,
    teacher: dict[str, Any] | None,
    prompt_tokens: int,
    evaluates: bool,
) -> core.TraceResult:
    """One rank of a job, or the only one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    os.environ |= _QUIET
    torch.set_num_threads(1)
    ledger = TrainerLedger(job.seq_len, prompt_tokens)
    gc.freeze()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(core._quiet())
        stack.callback(gc.unfreeze)
        folder = enter(tempfile.TemporaryDirectory())
        if name.startswith("trl"):
            enter(_trl_on_cuda())
        if (arguments or {}).get("use_liger_kernel"):
            enter(_liger_on_cuda())
        model = build.build_model(job, build.model_config(config, layers))
        other = _other(job, config, teacher, layers)
        beside = [_scoring(job, config, layers) for _ in range(2 if job.task == "ppo" else 0)]
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(ledger)
        for each in (model, other, *beside):
            if each is not None:
                build.materialize(each)
        total = core._count(model)
        enter(cuda.as_on_cuda(ledger, job.capability))
        ledger.scalar_answer = _answer(job)
        if job.sharding.startswith("zero"):
            enter(zero.launched(job, model, ledger))
        enter(emulated(job, ledger))
        enter(cuda.patched(torch.nn.Module, "_apply", build.apply_to_tensors))
        enter(cuda.patched(torch.Tensor, "__deepcopy__", build.copy_tensor))
        if job.quantized:
            for each in (model, *beside):  # one configuration for all that the script loads
                quantize(each, job)
            model.hf_quantizer = Quantizer()
        run = Run(job, model, other, arguments or {}, prompt_tokens, ledger, folder, beside)
        run.evaluates = evaluates
        TRAINERS[name](run)
        trainable = core._count(run.trainer.model, trained=True)
        end = train(run)
        return core._result(run.trainer.model, ledger, end, total, trainable)


class Quantizer:
    """What Trainer asks of a quantised model before it trains it."""

    is_trainable = True
    is_qat_trainable = False


def _other(
    job: Job, config: dict[str, Any], teacher: dict[str, Any] | None, layers: int | None
) -> Any:
    if job.task == "distill":
        assert teacher is not None
        model = build.build_model(job, build.model_config(teacher, layers))
    elif job.task in ("dpo", "kto", "grpo", "ppo") and job.reference == "model":
        model = build.build_model(job, build.model_config(config, layers))
    else:
        return None
    model.requires_grad_(False)
    return model.eval()


def _answer(job: Job) -> Callable[[Any, str], Any]:
    """``item()`` without values: as in :mod:`cuda`, and numbers of DeepSpeed's as it needs them."""
    known = functools.partial(cuda._scalar, padded=job.padding != "none")
    if not job.sharding.startswith("zero"):
        return known
    return lambda tensor, phase: (
        known(tensor, phase) if tensor.dtype == torch.bool else zero.some_value(tensor)
    )


def _project(
    tile: Any, hidden: Any, weight: Any, bias: Any, start: int, end: int, dtype: Any
) -> None:
    cast = weight[start:end].to(dtype)
    del cast


def _scoring(job: Job, config: dict[str, Any], layers: int | None) -> Any:
    """The same network with a head of one number a token."""
    return build.build_model(replace(job, task="rm"), build.model_config(config, layers))


@contextlib.contextmanager
def _trl_on_cuda() -> Iterator[None]:
    """TRL's modules, as they run where there is Triton: fused kernels, masked rows left out."""
    names = (
        "kernels.chunked_divergence", "kernels.chunked_logprob", "kernels.logprob_entropy",
        "trainer.utils", "trainer.distillation_trainer",
    )  # fmt: skip
    with importable():
        modules = [_imported(f"trl.{name}") for name in names]
    yes = lambda *_args, **_kwargs: True  # noqa: E731 - three names for one answer
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_use_triton"):
                stack.enter_context(cuda.patched(module, "_use_triton", yes))
            if hasattr(module, "_addmm_fp32"):  # a matmul into an fp32 buffer
                stack.enter_context(cuda.patched(module, "_addmm_fp32", lambda *_: None))
            if hasattr(module, "_project"):  # another one, of a weight that may be cast first
                stack.enter_context(cuda.patched(module, "_project", _project))
            if hasattr(module, "_supports_trl_loss_kernel"):
                stack.enter_context(cuda.patched(module, "_supports_trl_loss_kernel", yes))
        yield


@contextlib.contextmanager
def _liger_on_cuda() -> Iterator[None]:
    """Liger's kernels as they are chosen on a GPU: it imports them when one is first asked for."""
    with importable():
        dispatch = importlib.import_module("liger_kernel.backends.dispatch")
        chosen = lambda *_args, **_kwargs: ["nvidia-triton"]  # noqa: E731 - one answer
        with cuda.patched(dispatch, "available_impls", chosen):
            yield


def _imported(name: str) -> Any:
    """A module, or nothing where this version has none of that name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def train(run: Run) -> int:
    """``trainer.train()``, its phases marked; the clock at the end of the last forward."""
    trainer, ledger = run.trainer, run.ledger
    core._mark_model(ledger, trainer.model)
    if run.other is not None:
        ledger.mark(run.other.parameters(), "weights/other")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.mark([p.grad], "gradients")
            )
    ledger.watch_modules(trainer.model)
    clock = _Phases(run)
    trainer.accelerator.backward = clock.backward
    if run.own_loop:
        clock.watch(
            sys.modules[type(trainer).__module__], "batch_generation", "rollout", first=True
        )
        clock.watch(sys.modules[type(trainer).__module__], "selective_log_softmax", "scoring")
        clock.watch(trainer.accelerator, "accumulate", "forward")
    else:
        clock.watch(trainer, "training_step", "forward", first=True)
        trainer.get_train_dataloader = lambda: _Loader(run)
        optimizer = trainer.optimizer  # DeepSpeed's way of making one forgets it first
        trainer.create_optimizer = lambda *_: optimizer
    with _silent():
        trainer.train()
        if run.evaluates:
            trainer.get_eval_dataloader = lambda *_: _Loader(run)
            ledger.enter("evaluation", clock.step)
            trainer.evaluate()
    ledger.enter("end", clock.step + 1)
    return clock.forward_end


class _Phases:
    """Marks in the ledger which phase of which step is running."""

    def __init__(self, run: Run) -> None:
        self._ledger, self._accumulation = run.ledger, 1 if run.own_loop else run.job.accumulation
        self._accelerator = run.trainer.accelerator
        self._begun = 0
        self.forward_end = 0

    @property
    def step(self) -> int:
        """The optimizer step, from 1."""
        return (self._begun - 1) // self._accumulation + 1

    def watch(self, owner: Any, name: str, phase: str, *, first: bool = False) -> None:
        """A phase begins when this is called; ``first``: and a (micro) batch with it."""
        inner = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            if first:
                self._begun += 1
            if self._ledger.phase not in ("forward", "backward") or phase == "forward" or first:
                self._ledger.enter(phase, self.step)
            return inner(*args, **kwargs)

        setattr(owner, name, called)

    def backward(self, loss: Any, **_kwargs: Any) -> None:
        """``accelerator.backward``."""
        gc.collect()
        self.forward_end = self._ledger.clock - 1
        self._ledger.enter("backward", self.step)
        wrapper = getattr(self._accelerator, "deepspeed_engine_wrapped", None)
        if wrapper is None:
            core._backward(loss)
        else:  # ``DeepSpeedEngineWrapper.backward``, which takes the step too
            last = self._accelerator.sync_gradients
            wrapper.engine.set_gradient_accumulation_boundary(is_boundary=last)
            wrapper.engine.backward(loss)
        self._ledger.enter("step", self.step)
        if wrapper is not None and last:
            wrapper.engine.step()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What a trainer prints when it ends is no result of a trace."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class _Loader:
    """Hands out batches, on the device, as accelerate's loader does."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.dataset = [0] * run.count
        self.batch_size = run.job.micro

    def __len__(self) -> int:
        return len(self.run.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.run.batches:
            yield self._moved(batch)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._moved(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor):
            moved = torch.empty(value.shape, dtype=value.dtype)
            self.run.ledger.mark([moved], "inputs")
            return moved
        return value


def trainer_versions() -> dict[str, str]:
    """Versions of what was run, TRL's among them."""
    import trl

    return {**core.versions(), "trl": trl.__version__}
