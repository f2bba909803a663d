"""Writing a plan as a trainer's file: YAML lines, what was left out, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ftplan.catalog.stacks import Stack
from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.spec import Method, OptimizerChoice, Plan
from ftplan.trainers.words import torchtune_component

__all__ = ["Exported", "Writer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A plan in a trainer's own format."""

    text: str
    """The file."""
    trainer: str
    """Whose format it is."""
    notes: tuple[str, ...]
    """What the file cannot say; they stand in it as comments too."""


_FUSED_LOSSES = {"axolotl": ("cut", "liger"), "unsloth": ("unsloth",)}
"""Whose fused losses a trainer can be told to use; the others have Liger's."""


_SWIFT_PRESETS: dict[tuple[str | None, str | None], str] = {
    ("zero1", None): "zero1", ("zero2", None): "zero2", ("zero2", "optimizer"): "zero2_offload",
    ("zero3", None): "zero3", ("zero3", "params"): "zero3_offload",
}  # fmt: skip
"""DeepSpeed files that ms-swift carries itself (swift/config), by kind and what is offloaded."""


class Writer:
    """Collects the lines of a YAML file from a plan; refuses by name what has no key."""

    def __init__(self, plan: Plan, *, trainer: str) -> None:
        self.plan = plan
        self.trainer = trainer
        self.lines: list[str] = []
        self.notes: list[str] = []
        if plan.method is None:
            self.refuse("a plan without a method (inference)")
        self._functions(plan, plan.method)
        if plan.kernels == "automodel":
            self.plan = replace(plan, kernels=None)
            self.comment("kernels: automodel is not written: it is NeMo AutoModel's own model code")

    def refuse(self, what: str) -> NoReturn:
        """There is no key for this: the export stops and says so."""
        raise UnsupportedError(
            f"writing {what} to a {self.trainer} file",
            remedy=f"change the plan, or export to another trainer than {self.trainer}",
        )

    def _functions(self, plan: Plan, method: Method) -> None:
        """Fused functions that this trainer has no key for."""
        if plan.kernels == "foak":
            self.refuse("kernels: foak")
        if method.fused_lora and self.trainer != "axolotl":
            self.refuse("method.fused_lora")
        by = plan.loss.by if plan.loss is not None and plan.loss.kind == "fused" else None
        if by not in (None, *_FUSED_LOSSES.get(self.trainer, ("liger",))):
            self.refuse(f"loss.by: {by}")

    def comment(self, text: str) -> None:
        """A remark that stands at the top of the file."""
        self.notes.append(text)

    def differs(self, key: str, value: Any, why: str) -> None:
        """A plan key that this trainer decides itself: it stands in the notes, not in the file."""
        self.notes.append(f"{key}: {value} is not written: {why}")

    def profile(self, stack: Stack) -> None:
        """Note what the plan says otherwise than the trainer does and no key can change."""
        method, plan = self.plan.method, self.plan
        assert method is not None
        quantised = method.kind == "qlora"
        dtype = stack.adapter_dtype_quantized if quantised else stack.adapter_dtype
        adapter = method.kind in ("lora", "qlora", "dora")
        if adapter and method.adapter_dtype not in (None, dtype):
            self.differs(
                "method.adapter_dtype", method.adapter_dtype, f"{self.trainer} keeps {dtype}"
            )
        if method.prepare_kbit not in (None, stack.prepare_kbit):
            told = "casts" if stack.prepare_kbit else "does not cast"
            why = f"{self.trainer} {told} what is not quantised to fp32"
            self.differs("method.prepare_kbit", method.prepare_kbit, why)
        if method.compute_dtype not in (None, "bf16"):
            self.differs("method.compute_dtype", method.compute_dtype, "the training dtype is used")
        if method.double_quant is not None and plan.precision.weights not in ("nf4", "fp4"):
            self.differs("method.double_quant", method.double_quant, "only 4-bit formats have it")
        if plan.batch.padding is not None:
            self.differs("batch.padding", plan.batch.padding, "the collator pads as it does")

    def line(self, key: str, value: Any) -> None:
        """``key: value``; None writes nothing."""
        if value is not None:
            self.lines.append(f"{key}: {_scalar(value)}")

    def mapping(self, key: str, values: Mapping[str, Any], *, keep_null: bool = False) -> None:
        """A nested mapping; values that are None are left out unless ``keep_null``."""
        self.lines.append(f"{key}:")
        for name, value in values.items():
            if value is not None or keep_null:
                self.lines.append(f"  {_scalar(name)}: {_scalar(value)}")

    # --- parts that several trainers share -----------------------------------------------------

    def tasks(self, *known: str) -> None:
        """Refuse a task that the trainer's files cannot name."""
        task = self.plan.task or "sft"
        if task not in known:
            self.refuse(f"task: {task}")

    def methods(self, *known: str) -> None:
        """Refuse a method that the trainer does not have."""
        method = self.plan.method
        assert method is not None
        if method.kind not in known:
            self.refuse(f"method: {method.kind}")

    def model(self) -> str:
        """The model's name as written; a placeholder with a note when the plan names a file."""
        model = self.plan.model
        if model.name is not None:
            return model.name
        if model.config is not None:
            self.comment(
                f"the plan's model is the configuration {model.config}: name its checkpoint folder"
            )
            return model.config
        return self.refuse("a model given as a parameter count")

    def attention(self, key: str, words: Mapping[str, str]) -> None:
        """The attention implementation by the trainer's word."""
        if self.plan.attention is not None:
            self.line(key, words[self.plan.attention])

    def lora(
        self,
        *,
        rank: str,
        targets: str,
        modules: str,
        dora: str,
        rslora: str,
        parameters: str | None = None,
        linear: str | None = None,
        joined: bool = False,
    ) -> None:
        """The adapter's keys by the trainer's names."""
        method = self.plan.method
        assert method is not None
        self.line(rank, method.rank)
        self.line("lora_alpha", method.alpha)
        self.line("lora_dropout", method.dropout)
        chosen = method.targets
        if chosen == "all-linear" and linear is not None:
            self.line(linear, True)
        elif chosen == "attention":
            self.refuse("targets: attention (name the modules)")
        elif isinstance(chosen, tuple):
            self.line(targets, ",".join(chosen) if joined else list(chosen))
        elif chosen is not None:
            self.line(targets, "all" if joined and chosen == "all-linear" else chosen)
        saved = method.modules_to_save
        if saved is not None:
            self.line(modules, ",".join(saved) if joined else list(saved))
        if method.target_parameters is not None:
            if parameters is None:
                self.refuse("target_parameters")
            self.line(parameters, list(method.target_parameters))
        if method.use_dora or method.kind == "dora":
            self.line(dora, True)
        if method.use_rslora:
            self.line(rslora, True)
        for name in ("rank_pattern", "layers_to_transform"):
            if getattr(method, name) is not None and self.trainer != "axolotl":
                self.refuse(name)

    def quantised(self, *, double: str | None) -> None:
        """``load_in_4bit`` or ``load_in_8bit`` for a quantised base."""
        method, weights = self.plan.method, self.plan.precision.weights
        assert method is not None
        if method.kind != "qlora":
            return
        if weights in ("nf4", "fp4"):
            self.line("load_in_4bit", True)
            if double is not None:
                self.line(double, method.double_quant)
                self.line("bnb_4bit_quant_type", weights if weights == "fp4" else None)
        elif weights == "int8":
            self.line("load_in_8bit", True)
        else:
            self.refuse(f"a base quantised as {weights}")

    def checkpointing(self) -> None:
        """``gradient_checkpointing`` and its keywords, as transformers and axolotl spell them."""
        wanted = self.plan.gradient_checkpointing
        if wanted is None:
            return
        if wanted.every != 1:
            self.refuse(f"checkpointing every {wanted.every} blocks")
        self.line("gradient_checkpointing", wanted.kind != "none")
        options: dict[str, Any] = {}
        if wanted.reentrant is not None and wanted.kind != "none":
            options["use_reentrant"] = wanted.reentrant
        if wanted.kind == "selective":
            if self.trainer == "axolotl":
                self.line("selective_checkpointing", True)
            else:
                options["selective"] = True
        if options:
            self.mapping("gradient_checkpointing_kwargs", options)
        if wanted.kind == "offload":
            self.line("activation_offloading", True)

    def optimizer(self, key: str) -> None:
        """The optimizer by its name in transformers' list."""
        optimizer = self.plan.optimizer
        if optimizer is None:
            return
        if optimizer.rank is not None or optimizer.state_dtype is not None:
            self.refuse(f"optimizer {optimizer.name} with its own rank or state dtype")
        if optimizer.in_backward and "layerwise" not in optimizer.name:
            self.refuse("an optimizer in backward")
        if optimizer.implementation is not None:
            self.refuse(f"optimizer implementation {optimizer.implementation}")
        if optimizer.momentum:
            self.refuse("SGD's momentum")
        self.line(key, optimizer.name)

    def training_arguments(
        self, *, checkpointing: bool = True, mixed: bool = True, liger: bool = True
    ) -> None:
        """The part of transformers' TrainingArguments."""
        plan = self.plan
        self.line("per_device_train_batch_size", plan.batch.micro)
        self.line("gradient_accumulation_steps", plan.batch.accumulation)
        if checkpointing:
            self.checkpointing()
        if mixed:
            self.line(
                "bf16", plan.precision.mixed == "bf16" if plan.precision.mixed != "fp16" else False
            )
            self.line("fp16", True if plan.precision.mixed == "fp16" else None)
        self._transformers_optimizer()
        if plan.batch.eval_micro is not None:
            self.line("do_eval", True)
            self.line("eval_strategy", "epoch")
            self.line("per_device_eval_batch_size", plan.batch.eval_micro)
        if liger and plan.kernels == "liger":
            self.line("use_liger_kernel", True)
        elif liger and plan.kernels == "unsloth":
            self.refuse("kernels: unsloth")
        self._transformers_sharding()

    def _transformers_optimizer(self) -> None:
        optimizer = self.plan.optimizer
        if optimizer is None:
            return
        blockwise = optimizer.name.startswith(("galore", "apollo", "badam"))
        adapter = self.plan.method is not None and self.plan.method.kind not in ("full", "partial")
        if blockwise and adapter and self.trainer == "llamafactory":
            self.refuse(f"{optimizer.name} with an adapter")
        for family in ("galore", "apollo"):
            if optimizer.name.startswith(f"{family}_adamw") and self.trainer == "llamafactory":
                self.line(f"use_{family}", True)
                self.line(f"{family}_rank", optimizer.rank)
                if "layerwise" in optimizer.name:
                    self.line(f"{family}_layerwise", True)
                return
        flags = {"badam": "use_badam", "adam_mini": "use_adam_mini", "muon": "use_muon"}
        if self.trainer == "llamafactory" and optimizer.name in flags:
            self.line(flags[optimizer.name], True)
            return
        self.optimizer("optim")

    def _transformers_sharding(self) -> None:
        sharding = self.plan.sharding
        kind = sharding.kind
        if kind == "fsdp":
            words = [
                "full_shard" if sharding.reshard_after_forward is not False else "shard_grad_op"
            ]
            if sharding.wrap != "model":
                words.append("auto_wrap")
            if sharding.offload == "params":
                words.append("offload")
            self.line("fsdp", " ".join(words))
            options: dict[str, Any] = {"fsdp_version": sharding.version}
            options["reshard_after_forward"] = sharding.reshard_after_forward
            options["use_orig_params"] = sharding.use_orig_params
            given = {name: value for name, value in options.items() if value is not None}
            if given:
                self.mapping("fsdp_config", given)
        elif self.trainer == "ms-swift" and (
            preset := _SWIFT_PRESETS.get((kind, sharding.offload))
        ):
            self.line("deepspeed", preset)
        elif kind in ("zero1", "zero2", "zero3"):
            self.comment(
                f"sharding {kind} is DeepSpeed's: write it with `ftplan export --to "
                f"deepspeed` and name it "
                "with `deepspeed: FILE`, or pass it as an overlay"
            )
        self._launch_note()

    def _launch_note(self) -> None:
        hardware = self.plan.hardware
        total = (hardware.count or 1) * (hardware.nodes or 1)
        if total > 1:
            self.comment(
                f"the plan runs on {total} GPUs: that is the launcher's to say (accelerate export)"
            )
        if hardware.gpu is not None:
            self.comment(f"the plan's GPU is {hardware.gpu}: no trainer has a key for it")

    def fsdp(self, *, prefix: str) -> None:
        """axolotl's ``fsdp_config`` without the prefix, or a note for DeepSpeed."""
        sharding = self.plan.sharding
        if sharding.kind == "fsdp":
            self.line("fsdp_version", sharding.version or 2)
            options: dict[str, Any] = {
                f"{prefix}offload_params": sharding.offload == "params",
                f"{prefix}auto_wrap_policy": "NO_WRAP"
                if sharding.wrap == "model"
                else "TRANSFORMER_BASED_WRAP",
                f"{prefix}reshard_after_forward": sharding.reshard_after_forward,
                f"{prefix}use_orig_params": sharding.use_orig_params
                if sharding.version != 2
                else None,
            }
            self.mapping("fsdp_config", options)
        elif sharding.kind in ("zero1", "zero2", "zero3"):
            self.comment(
                f"sharding {sharding.kind} is DeepSpeed's: `ftplan export --to deepspeed`, "
                f"then `deepspeed: FILE`"
            )
        self._launch_note()

    def degrees(self, **names: str | None) -> None:
        """Parallel degrees by the trainer's keys; one without a key is refused."""
        sharding = self.plan.sharding
        for name, key in (("pp", None), *names.items()):
            degree = getattr(sharding, name)
            if degree is None or degree == 1:
                continue
            if key is None:
                self.refuse(f"{name}: {degree}")
            self.line(key, degree)

    # --- torchtune -------------------------------------------------------------------------------

    def torchtune_builder(self) -> str:
        """The builder of the plan's model with its method's prefix; refused when there is none."""
        method = self.plan.method
        assert method is not None
        name = self.plan.model.name
        prefix = {"full": "", "lora": "lora_", "dora": "lora_", "qlora": "lora_"}[method.kind]
        if method.kind == "qlora" and self.plan.precision.weights != "nf4":
            self.refuse(f"a base quantised as {self.plan.precision.weights}")
        component = None if name is None else torchtune_component(name, prefix)
        if component is None:
            self.refuse(f"the model {name or 'without a name'} (no builder has its sizes)")
        return component

    def torchtune_tokenizer(self, builder: str) -> str:
        """The tokenizer that belongs to a model builder's package."""
        package = builder.split(".")[2]
        known = {
            "llama3_1": "llama3",
            "llama3_2": "llama3",
            "llama3_3": "llama3",
            "phi3": "phi3",
            "gemma2": "gemma",
        }
        owner = known.get(package, package)
        suffix = "phi3_mini" if owner == "phi3" else owner
        return f"torchtune.models.{owner}.{suffix}_tokenizer"

    def torchtune_adapter(
        self, attention: Mapping[str, str], mlp: tuple[str, ...]
    ) -> dict[str, Any]:
        """The adapter's keys of a torchtune model section."""
        method = self.plan.method
        assert method is not None
        back = {plan: theirs for theirs, plan in attention.items()}
        chosen = method.targets
        if chosen == "all-linear":
            chosen = (*back, *mlp)
        if not isinstance(chosen, tuple):
            self.refuse(f"targets: {chosen}")
        picked = [back[name] for name in chosen if name in back]
        rest = [name for name in chosen if name not in back]
        head = "lm_head" in rest
        rest = [name for name in rest if name != "lm_head"]
        if not picked or (rest and tuple(rest) != mlp):
            self.refuse(f"targets: {', '.join(chosen)}")
        for name in (
            "modules_to_save",
            "rank_pattern",
            "layers_to_transform",
            "target_parameters",
            "use_rslora",
        ):
            if getattr(method, name):
                self.refuse(name)
        return {
            "lora_attn_modules": picked,
            "apply_lora_to_mlp": bool(rest),
            "apply_lora_to_output": head,
            "lora_rank": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "use_dora": True if method.use_dora or method.kind == "dora" else None,
            "quantize_base": True if method.kind == "qlora" else None,
        }

    def torchtune_checkpointing(self) -> None:
        """``enable_activation_checkpointing`` and its companions."""
        wanted = self.plan.gradient_checkpointing
        if wanted is None:
            return
        self.line("enable_activation_checkpointing", wanted.kind != "none")
        self.line("enable_activation_offloading", wanted.kind == "offload")
        if wanted.kind == "selective" or wanted.every != 1:
            self.line("ac_mode", "selective")
            self.line("ac_option", "op" if wanted.kind == "selective" else wanted.every)

    def torchtune_optimizer(self) -> None:
        """The optimizer as a component."""
        optimizer = self.plan.optimizer or OptimizerChoice(name="adamw_torch_fused")
        components: dict[str, dict[str, Any]] = {
            "adamw_torch": {"_component_": "torch.optim.AdamW"},
            "adamw_torch_fused": {"_component_": "torch.optim.AdamW", "fused": True},
            "adamw_bnb_8bit": {"_component_": "bitsandbytes.optim.AdamW8bit"},
            "paged_adamw_32bit": {"_component_": "bitsandbytes.optim.PagedAdamW"},
            "paged_adamw_8bit": {"_component_": "bitsandbytes.optim.PagedAdamW8bit"},
            "sgd": {"_component_": "torch.optim.SGD"},
            "cpu_offload_adamw": {"_component_": "torchao.optim.CPUOffloadOptimizer"},
        }
        if optimizer.name not in components or optimizer.rank or optimizer.state_dtype:
            self.refuse(f"optimizer {optimizer.name}")
        section = dict(components[optimizer.name])
        section["lr"] = 2e-5
        if optimizer.name == "sgd" and optimizer.momentum:
            section["momentum"] = optimizer.momentum
        on_host = optimizer.name == "cpu_offload_adamw"
        if on_host and optimizer.in_backward:
            section["offload_gradients"] = True
        self.mapping("optimizer", section)
        if optimizer.in_backward and not on_host:
            self.line("optimizer_in_bwd", True)

    # --- the end ---------------------------------------------------------------------------

    def done(self, *, hint: str) -> Exported:
        """The file's text, with its notes as comments on top."""
        task = {"rm": "reward"}.get(self.plan.task or "sft", self.plan.task or "sft")
        head = [f"# written by ftplan from a plan; {hint % task if '%s' in hint else hint}"]
        head += [f"# {note}" for note in self.notes]
        head.append("# data, learning rate and output folder are not part of a plan")
        return Exported(
            text="\n".join([*head, *self.lines]) + "\n",
            trainer=self.trainer,
            notes=tuple(self.notes),
        )


def _scalar(value: Any) -> str:
    """A value in YAML's flow style, which JSON is, plain where nothing could be misread."""
    if isinstance(value, str):
        plain = value.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
        safe = plain.isalnum() and plain.isascii() and not plain.isdigit() and value[0].isalpha()
        reserved = value.lower() in ("yes", "no", "on", "off", "true", "false", "null", "none")
        number = plain.lower().replace("e", "").isdigit()
        return value if safe and not reserved and not number else json.dumps(value)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return json.dumps(value)
