"""The conditions under which a network runs: what decides kernels and dtypes, and no sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Environment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the operations look at. Everything here may change what is saved, nothing how much."""

    autocast: str | None = None
    """Dtype that autocast computes matmuls in, or None."""
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    """The implementation that was asked for."""
    capability: tuple[int, int] | None = (8, 0)
    """CUDA compute capability: below 8.0 there is no flash kernel. None: no NVIDIA GPU."""
    padding_mask: bool = False
    """A mask reaches attention: no flash kernel, keys and values expanded to all heads."""
    attention_dropout: bool = False
    """Dropout inside attention is active."""
    kernels: Literal["none", "liger", "unsloth"] = "none"
    """Fused kernels that replace the model's own."""
    loss: Literal["full", "chunked", "fused"] = "full"
    """How the loss meets the logits."""
    loss_shifts: Literal["labels", "logits"] = "labels"
    """What the loss moves by one token; moving the logits copies them."""
    loss_upcasts: bool = True
    """The loss casts logits to fp32 where the model class does."""
    loss_keeps_chunks: bool = False
    """A chunked loss recomputes nothing: autograd keeps every chunk."""
    loss_columns: int = 0
    """A chunked loss meets so many columns of the vocabulary at a time, in one buffer; 0: all."""
    offload_checkpoints: bool = False
    """A checkpointed block's input waits in host memory."""
    checkpoint_attention: bool = False
    """The core of attention alone is checkpointed (Megatron's selective recomputation)."""
    packed: bool = False
    """Samples are joined: positions come with the batch."""
    keep_outputs: bool = False
    """The caller holds the model's outputs until backward has ended."""
    outputs_to_fp32: bool = False
    """Accelerate's mixed precision casts what the model returns to fp32."""
    seq_len: int | None = None
    """Sequence length in tokens, only for decisions (is it longer than the window), not sizes."""
    one_sequence: bool = False
    """The micro batch is a single sequence: views that mix its heads and tokens need no copy."""
    reentrant: bool = False
    """Which implementation of checkpointing recomputes a block."""
    training: bool = True
    """Dropout acts and a graph may be built."""

    @property
    def fused(self) -> bool:
        """Kernels take the place of norms, rotations and gates."""
        return self.kernels != "none"
