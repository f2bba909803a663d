"""The model, its adapters and its optimizer, built from the real classes without any memory.

Everything is built on the meta device, then every parameter and buffer is swapped for an empty
fake CPU tensor: what a checkpoint would have filled, with its dtype and shape.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from torch._guards import active_fake_mode

from ftplan.errors import UnsupportedError
from ftplan.trace.images import is_vision_language
from ftplan.trace.job import Job
from ftplan.trace.quantized import prepare_kbit, quantize

__all__ = [
    "adapt",
    "apply_to_tensors",
    "attention_of",
    "auto_class",
    "build_model",
    "build_optimizer",
    "checkpoint",
    "copy_tensor",
    "family_of",
    "keep_in_fp32",
    "materialize",
    "model_config",
    "peft_config",
    "train_in_fp32",
]


FURTHER = {
    "adalora": ("AdaLoraConfig", "init_r"), "miss": ("MissConfig", "r"), "c3a": ("C3AConfig", ""),
    "fourierft": ("FourierFTConfig", ""), "hra": ("HRAConfig", "r"),
    "randlora": ("RandLoraConfig", "r"), "road": ("RoadConfig", ""), "shira": ("ShiraConfig", "r"),
    "vblora": ("VBLoRAConfig", "r"), "delora": ("DeloraConfig", "r"), "pvera": ("PveraConfig", "r"),
    "hira": ("HiraConfig", "r"), "beft": ("BeftConfig", ""), "gralora": ("GraloraConfig", "r"),
    "glora": ("GloraConfig", "r"), "peanut": ("PeanutConfig", "r"), "psoft": ("PsoftConfig", "r"),
    "trainable_tokens": ("TrainableTokensConfig", ""),
}  # fmt: skip
"""peft's configuration of a kind, and its name for the rank."""


def further(kind: str, rank: int, targets: Any, saved: Any, settings: dict[str, Any]) -> Any:
    """peft's configuration of one of :data:`FURTHER`."""
    import peft

    name, ranked = FURTHER[kind]
    made = {**settings, **({ranked: rank} if ranked else {})}
    if kind != "trainable_tokens":
        made |= {"target_modules": targets, "modules_to_save": saved}
    return getattr(peft, name)(**made)


def model_config(config: dict[str, Any], layers: int | None = None) -> Any:
    """The transformers config of a ``config.json`` mapping; ``layers`` cuts its depth."""
    from transformers import AutoConfig

    data = copy.deepcopy(config)
    for key in ("torch_dtype", "dtype", "transformers_version", "quantization_config", "auto_map"):
        data.pop(key, None)
    model_type = data.pop("model_type")
    if layers is not None:
        data = cut_depth(data, layers)
    made = AutoConfig.for_model(model_type, **data)
    if getattr(made, "is_encoder_decoder", False):
        if getattr(made, "decoder_start_token_id", None) is None:
            made.decoder_start_token_id = 0
        if getattr(made, "pad_token_id", None) is None:
            made.pad_token_id = 0
    return made


DEPTHS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers",
)  # fmt: skip
"""Names of a config for how many layers there are."""
PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "intermediate_size",
    "activation_sparsity_pattern",
)  # fmt: skip
"""Names of lists with an entry for each layer."""


def cut_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer layers, in its text model where it has one inside."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": cut_depth(config["text_config"], layers)}
    if isinstance(config.get("attention_types"), list):  # GPT-Neo: [[["global", "local"], n]]
        config = {**config, "attention_types": [[["global", "local"], -(-layers // 2)]]}
        layers = 2 * -(-layers // 2)
    lists = {k: config[k][:layers] for k in PER_LAYER if isinstance(config.get(k), list)}
    cut = {**config, **{key: layers for key in DEPTHS if key in config}, **lists}
    if cut.get("num_kv_shared_layers"):  # Gemma 4: of its last layers
        cut["num_kv_shared_layers"] = min(cut["num_kv_shared_layers"], layers // 2)
    return cut


def family_of(config: Any) -> str:
    """``causal``, ``masked`` or ``seq2seq``: which head the model is finetuned with."""
    named = " ".join(getattr(config, "architectures", None) or ())
    if is_vision_language(config):
        return "vision"
    if "ForMaskedLM" in named:
        return "masked"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    encoders = {
        "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2",
        "xlm-roberta", "modernbert", "camembert", "mpnet", "xlm-roberta-xl", "eurobert",
        "nomic_bert",
    }  # fmt: skip
    if config.model_type in encoders and "CausalLM" not in named:
        return "masked"
    return "causal"


def auto_class(config: Any, job: Job) -> Any:
    """The auto class that a script would load the model with."""
    import transformers

    if job.task in ("classify", "rm"):
        return transformers.AutoModelForSequenceClassification
    found = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "vision": transformers.AutoModelForCausalLM,
    }[family_of(config)]
    if not job.images and type(config) in found._model_mapping:
        return found
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForMultimodalLM


def build_model(job: Job, config: Any) -> Any:
    """The model on the meta device, as it is loaded; nothing is allocated."""
    dtype = getattr(torch, job.compute_dtype if job.quantized else job.weights)
    kind = auto_class(config, job)
    attention: str | None = attention_of(job, config)
    attention = None if attention == "sdpa" else attention  # by default, and where a part has it
    if job.task in ("classify", "rm"):
        config.num_labels = 1 if job.task == "rm" else config.num_labels
        config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else 0
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
        model.train()
        model.config.use_cache = job.method == "prefix_tuning"  # whose prefix is a cache
        keep_in_fp32(model, dtype)
    return model


def keep_in_fp32(model: Any, dtype: Any) -> None:
    """What ``from_pretrained`` loads in fp32 whatever dtype is asked for (transformers 5.23)."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None or not names & {*path.split("."), name} or old.dtype != dtype:
                    continue
                new = old.to(torch.float32)
                store[name] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new


def attention_of(job: Job, config: Any) -> str:
    """The implementation that transformers runs; without SDPA support it is the eager one."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from ftplan.trace import cuda

    kind = auto_class(config, job)
    classes = kind._model_mapping[type(config)]
    model_class = classes[0] if isinstance(classes, (list, tuple)) else classes
    if job.attention == "flash":
        if not model_class._supports_flash_attn:
            raise UnsupportedError(
                f"flash attention for {config.model_type}", remedy="use attention: eager"
            )
        AttentionInterface.register(cuda.FLASH, lambda *a, **k: None)
        AttentionMaskInterface.register(cuda.FLASH, lambda *a, **k: None)
        return cuda.FLASH
    if job.attention == "sdpa" and not model_class._supports_sdpa:
        return "eager"
    return job.attention


def _blocks(model: Any) -> nn.ModuleList:
    """The longest list of blocks: the decoder's (or the encoder's) layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    candidates = [m for m in lists if sum(p.numel() for p in m[0].parameters())]
    return max(candidates, key=lambda m: sum(p.numel() for p in m.parameters()))


def _attention_targets(model: Any) -> list[str]:
    """Names of the linear layers inside attention."""
    names = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        if _is_linear(module) and any(re.search(r"att", part) for part in parts[:-1]):
            names.add(parts[-1])
    return sorted(names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def _targets(model: Any, job: Job) -> list[str] | str:
    if job.targets == "attention":
        return _attention_targets(model)
    if isinstance(job.targets, str):
        return job.targets
    return list(job.targets)


def adapt(model: Any, job: Job, *, quantized_already: bool = False) -> Any:
    """Freeze and adapt as the plan's method says; the model has been materialized.

    peft looks at devices and dtypes when it places an adapter, so it is run on the fake tensors.
    """
    if job.quantized:
        if not quantized_already:
            quantize(model, job)
        if job.prepare_kbit:
            prepare_kbit(model, job)
        else:
            model.requires_grad_(False)
    if job.method == "full":
        return model
    if job.method == "partial":
        model.requires_grad_(False)
        for block in list(_blocks(model))[-job.last_layers :]:
            block.requires_grad_(True)
        return model
    if job.method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model
    import peft

    configuration = peft_config(model, job)
    adapted = peft.get_peft_model(
        model, configuration, autocast_adapter_dtype=job.adapter_dtype == "fp32"
    )
    if job.adapter_dtype == "bf16":  # over any base, as TRL casts them
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    adapted.train()
    return adapted


def peft_config(model: Any, job: Job) -> Any:
    """PEFT's configuration of the adapter that the plan's method asks for."""
    import peft

    family = family_of(model.config)
    task = {"causal": "CAUSAL_LM", "vision": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(family)
    if job.task in ("classify", "rm"):
        task = "SEQ_CLS"
    common: dict[str, Any] = {"task_type": task, **job.options}
    save = list(job.modules_to_save) or None
    targets = _targets(model, job)
    if job.method in ("lora", "qlora", "dora"):
        configuration = peft.LoraConfig(
            **common, r=job.rank, lora_alpha=job.alpha, target_modules=targets,
            lora_dropout=job.dropout, modules_to_save=save, rank_pattern=job.rank_pattern,
            layers_to_transform=list(job.layers_to_transform) or None,
            target_parameters=list(job.target_parameters) or None,
            use_dora=job.use_dora, use_rslora=job.use_rslora,
        )  # fmt: skip
    elif job.method == "ia3":
        named = () if job.targets == "all-linear" else job.targets
        configuration = peft.IA3Config(
            **common, target_modules=list(named) or None, modules_to_save=save
        )
    elif job.method == "vera":
        configuration = peft.VeraConfig(
            **common, r=job.rank, target_modules=targets, vera_dropout=job.dropout,
            modules_to_save=save,
        )  # fmt: skip
    elif job.method in ("loha", "lokr"):
        kind = peft.LoHaConfig if job.method == "loha" else peft.LoKrConfig
        configuration = kind(
            **common, r=job.rank, alpha=job.alpha, target_modules=targets, modules_to_save=save
        )
    elif job.method == "oft":
        configuration = peft.OFTConfig(**common, target_modules=targets, modules_to_save=save)
    elif job.method == "boft":
        configuration = peft.BOFTConfig(**common, target_modules=targets, modules_to_save=save)
    elif job.method == "ln_tuning":
        configuration = peft.LNTuningConfig(**common, modules_to_save=save)
    elif job.method == "prompt_tuning":
        configuration = peft.PromptTuningConfig(**common, num_virtual_tokens=job.virtual_tokens)
    elif job.method == "prefix_tuning":
        configuration = peft.PrefixTuningConfig(**common, num_virtual_tokens=job.virtual_tokens)
    elif job.method == "p_tuning":
        configuration = peft.PromptEncoderConfig(**common, num_virtual_tokens=job.virtual_tokens)
    elif job.method in FURTHER and job.method != "shira":  # no sparse gradient on fake tensors
        configuration = further(job.method, job.rank, targets, save, common)
    else:
        raise UnsupportedError(
            f"tracing the method {job.method!r}", remedy="trace it with peft's own adapters"
        )
    return configuration


def apply_to_tensors(self: Any, fn: Any, recurse: bool = True) -> Any:
    """``nn.Module._apply`` (behind ``.to()``) for fake tensors: assign, do not swap.

    The original swaps fake tensors in place, which the weak references of a trace forbid.
    """
    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, old in self._parameters.items():
        if old is None:
            continue
        if "_cast" in vars(old):  # a tied weight is cast once
            self._parameters[name] = old._cast
            continue
        with torch.no_grad():
            new = fn(old)
        if new is not old and new.dtype != old.dtype:
            old._cast = nn.Parameter(new, requires_grad=old.requires_grad)
            self._parameters[name] = old._cast
    for name, old in self._buffers.items():
        if old is not None:
            self._buffers[name] = fn(old)
    return self


def copy_tensor(self: Any, memo: dict[int, Any]) -> Any:
    """``Tensor.__deepcopy__`` for fake tensors: through the dispatcher, which counts the copy.

    The original copies the bytes of the storage, and a fake storage has none.
    """
    if id(self) not in memo:
        copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
    return memo[id(self)]


def materialize(model: Any) -> None:
    """Swap every parameter and buffer for an empty tensor of the mode that is on; ties are kept."""
    swapped: dict[int, Any] = {}

    def empty(old: Any) -> Any:
        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
        if active_fake_mode() is None:
            new.zero_()  # positions are looked up with what is in a buffer
        if isinstance(old, nn.Parameter):
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            parameter.__dict__.update(old.__dict__)
            return parameter
        return new

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in swapped:
                    swapped[id(old)] = (empty(old), old)
                store[name] = swapped[id(old)][0]
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                setattr(module, name, empty(value))
        if "dynamic" in str(getattr(module, "rope_type", "")):
            # positions decide which frequencies are used, never how large anything is
            module.rope_type = "default"


def train_in_fp32(job: Job, model: Any) -> None:
    """LLaMA-Factory casts whatever is trained to fp32 (model/adapter.py, cast_trainable_params)."""
    if job.stack != "llamafactory":
        return
    swapped: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or not old.requires_grad or old.dtype == torch.float32:
                continue
            if id(old) not in swapped:
                swapped[id(old)] = (nn.Parameter(old.detach().to(torch.float32)), old)
            module._parameters[name] = swapped[id(old)][0]


def checkpoint(job: Job, model: Any) -> None:
    """Checkpoint the blocks as Trainer does, where the plan says so."""
    if job.checkpointing == "none":
        return
    if job.checkpointing != "full":
        raise UnsupportedError(
            f"tracing {job.checkpointing} checkpointing", remedy="use gradient_checkpointing: true"
        )
    # the random state that a checkpoint stows is host memory, and nothing here is random
    kwargs = {"use_reentrant": job.reentrant, "preserve_rng_state": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.activation_checkpointing_enable(
        activation_checkpointing_kwargs=kwargs, every_n_layers=job.every
    )


def build_optimizer(job: Job, model: Any, *, real: bool = False) -> Any:
    """The optimizer of the plan over what is trained, in Trainer's two groups.

    ``real`` asks for the kernels of a GPU where a trace has stand-ins.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: Any = trained
    if job.stack != "pytorch":
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.0},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    from ftplan.trace.optimizers import make_optimizer

    return make_optimizer(job, groups, model, real=real)
