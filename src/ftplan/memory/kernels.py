"""Which operations a library of fused kernels takes the place of, model by model.

Values only: the operations themselves are in :mod:`fused`. What is not listed runs as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ftplan.dataclass import dataclass

__all__ = ["LIBRARIES", "NONE", "Kernels", "Lora", "kernels_of"]

Lora = Literal["none", "unsloth", "axolotl", "foak", "automodel"]
"""Whose autograd functions run the projections of LoRA: each keeps its input once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What is fused in one job."""

    norm: bool = False
    norm_in_place: bool = True
    """The gradient of a norm's input is written over the gradient of its output."""
    norm_trains: bool = True
    """The norm's weight gets a gradient; Unsloth's kernel of before 2026.10 makes none."""
    norm_partials: int = 0
    """Rows of fp32 partial sums of which that gradient is made; 0: it is summed in place."""
    norm_wide: bool = False
    """The norm is one opaque step that makes fp32 copies of its input and output."""
    rope: bool = False
    """Queries and keys are rotated where they are, forward and backward."""
    rope_wide: bool = False
    """They are rotated in fp32, out of tables that stay from batch to batch."""
    in_parts: bool = False
    """Checkpointing is of attention, MLP and norms, each by itself."""
    gate: bool = False
    """``act(gate) * up`` in one kernel."""
    loss: bool = False
    """A cross entropy that keeps the logits it was given."""
    loss_in_place: bool = True
    """It writes the gradient over them; else it keeps the losses too and makes a new tensor."""
    lora: Lora = "none"
    lora_mlp: bool = True
    """They run gate, up and down as one."""


NONE = Kernels()

_ALL = Kernels(norm=True, rope=True, gate=True)
_LIGER: Mapping[str, Kernels] = {
    **dict.fromkeys(
        (
            "llama", "smollm3", "ministral", "mistral", "mixtral", "gemma", "qwen2", "qwen3",
            "qwen3_moe", "phi3", "falcon_h1", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama4_text",
            "llama4", "qwen2_vl", "qwen2_5_vl", "paligemma", "mllama", "pixtral",
        ),
        _ALL,
    ),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3", "exaone4"),
        replace(_ALL, norm_in_place=False),
    ),
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "gemma4_text", "gemma4", "glm4", "glm4v", "glm4v_moe",
            "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
        ),
        replace(_ALL, norm_in_place=False, rope=False),
    ),
    **dict.fromkeys(("gpt_oss", "qwen3_vl", "qwen3_vl_moe"), replace(_ALL, gate=False)),
    **dict.fromkeys(("internvl", "smolvlm", "deepseek_v4"), Kernels(norm=True)),
    **dict.fromkeys(("nemotron", "llava"), NONE),
    "granite": replace(_ALL, loss=True),
}  # fmt: skip
"""liger_kernel/transformers/monkey_patch.py 0.8.5: the defaults of ``apply_liger_kernel_to_*``,
and ``in_place`` of the norm's class (rms_norm.py). Granite alone has no fused linear loss."""

_DW_PROGRAMS = 432
"""Programs of the norm's way back on an A100, at widths from 2048 to 4096: 108 multiprocessors of
32 warps, 8 a program (unsloth/kernels/rms_layernorm.py 2026.10.9, ``_dw_row_config``)."""
_FAST = Kernels(norm=True, norm_partials=_DW_PROGRAMS, rope=True, loss_in_place=False)
_UNSLOTH: Mapping[str, Kernels] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "granite"), _FAST),
    **dict.fromkeys(("gemma", "gemma2"), replace(_FAST, norm_in_place=False)),
    **dict.fromkeys(("cohere", "falcon_h1"), Kernels(rope=True)),
}
"""unsloth/models 2026.10.9: the architectures with a ``Fast*Model``. Others run transformers' code,
compiled; their loss and their checkpointing are Unsloth's."""

_FOAK: Mapping[str, Kernels] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "granite", "granitemoe", "granitemoeshared"),
        Kernels(norm=True, norm_trains=False, rope=True, loss=True),
    ),
    "gpt_bigcode": Kernels(loss=True),
}
"""fms_acceleration_foak/models 0.7.4, Unsloth's kernels of early 2024: ``fast_rms_layernorm``,
``fast_rope_embeddings``, ``fast_loss``."""

_AUTOMODEL: Mapping[str, Kernels] = {
    **dict.fromkeys(
        ("llama", "qwen2"), Kernels(norm=True, norm_wide=True, rope_wide=True, in_parts=True)
    ),
    "qwen3": Kernels(rope_wide=True, in_parts=True),
}
"""nemo_automodel/components/models 0.7.0: dense models of its own, with ``Float32RMSNorm`` (Qwen 3
has transformers' norms) and llama/rope_utils.py. Any other dense model is transformers'."""

LIBRARIES: Mapping[str, Mapping[str, Kernels]] = {
    "none": {}, "liger": _LIGER, "unsloth": _UNSLOTH, "foak": _FOAK, "automodel": _AUTOMODEL,
}  # fmt: skip


def kernels_of(
    library: str, model_type: str, *, lora: Lora = "none", lora_mlp: bool = True
) -> Kernels:
    """What ``library`` fuses in a model of this type; ``lora``: whose functions adapters run in."""
    return replace(LIBRARIES[library].get(model_type, NONE), lora=lora, lora_mlp=lora_mlp)
