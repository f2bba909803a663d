"""The conditions under which a network runs: what decides kernels and dtypes, and no sizes."""

from __future__ import annotations

from typing import Literal

from ftplan.dataclass import dataclass
from ftplan.memory.kernels import NONE, Kernels

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
    repeats_heads: bool = False
    """Keys and values are copied to all query heads before any kernel (transformers until 4.48)."""
    fills_cache: bool = False
    """Keys and values stay in a cache until the model returns, even when it is checkpointed."""
    copies_to_cache: bool = False
    """Nobody turns the model's cache off: every layer copies keys and values into it."""
    attention_dropout: bool = False
    """Dropout inside attention is active."""
    kernels: Kernels = NONE
    """Fused kernels that replace the model's own operations."""
    loss: Literal["full", "chunked", "fused"] = "full"
    """How the loss meets the logits."""
    loss_by: Literal["liger", "unsloth", "cut", "foak", "automodel"] = "liger"
    """Whose function a fused loss is, or one in chunks; ``automodel``: NeMo's, which is cut cross
    entropy where it is fused."""
    casts_products: bool = False
    """Liger's fused loss adds to a 2-byte gradient of the head by way of fp32 (before 0.8.5)."""
    loss_shifts: Literal["labels", "logits"] = "labels"
    """What the loss moves by one token; moving the logits copies them."""
    loss_upcasts: bool = True
    """The loss casts logits to fp32 where the model class does."""
    logits_cast: Literal["loss", "model"] = "loss"
    """Who casts them: a model that does so has let go of the first copy."""
    loss_keeps_chunks: bool = False
    """A chunked loss recomputes nothing: autograd keeps every chunk."""
    loss_compiled: bool = False
    """A chunked loss takes whole logits, and is compiled: it keeps no softmax."""
    loss_columns: int = 0
    """A chunked loss meets so many columns of the vocabulary at a time, in one buffer; 0: all."""
    log_probs: Literal["rows", "whole", "kernel", "copied"] = "rows"
    """How a task takes the log-probabilities of labels out of logits: :mod:`log_probs`."""
    rolls_labels: bool = False
    """Labels are moved by one token, and every token's logits are met, the last one's too."""
    logit_metrics: Literal["none", "returned", "measured"] = "none"
    """What a preference task does with logits for its metrics: KTO's forward returns them by
    label, or they are copied once the loss is there."""
    asks_at_blocks: bool = False
    """Checkpoints are for blocks that train, the first of which asks for its input's gradient."""
    offload_checkpoints: bool = False
    """A checkpointed block's input waits in host memory."""
    keeps_products: bool = False
    """Checkpointed blocks keep every second product of matrices and what fused attention returns
    (torchtitan's selective checkpointing by operation)."""
    checkpoint_parts: bool = False
    """Attention, MLP and the norms before them are checkpointed each by itself."""
    checkpoint_attention: bool = False
    """The core of attention alone is checkpointed (Megatron's selective recomputation)."""
    packed: bool = False
    """Samples are joined: positions come with the batch."""
    hooks_hold_inputs: bool = False
    """FSDP1 around a frozen block that is run again reentrantly: its hook (``register_multi_grad_
    hook`` in ``_register_post_backward_reshard_only_hook``, torch 2.4 to 2.13) keeps the node of
    the block's input, a leaf there, and with it the input and its gradient."""
    keep_outputs: bool = False
    """The caller holds the model's outputs until backward has ended."""
    outputs_to_fp32: bool = False
    """Accelerate's mixed precision casts what the model returns to fp32."""
    ring: int = 1
    """Ranks around which keys and values go (PyTorch's ring attention)."""
    sequence_parts: int = 1
    """Ranks that share the tokens: outside of what tensor parallelism cuts, or in the experts."""
    seq_len: int | None = None
    """Sequence length in tokens, only for decisions (is it longer than the window), not sizes."""
    holds_4bit_inputs: bool = False
    """bitsandbytes' 4-bit product holds its input by itself (before 0.44)."""
    unpacks_gptq: bool = False
    """GPTQ weights are unpacked by elementwise steps, and autograd keeps what comes out."""
    dora_names_identity: bool = False
    """DoRA's forward names the identity it multiplied until it returns (peft before 0.19)."""
    returns_cache: bool = False
    """Models whose code returns keys and values as tensors do so: nothing is checkpointed."""
    one_sequence: bool = False
    """The micro batch is a single sequence: views that mix its heads and tokens need no copy."""
    early_stop: bool = True
    """A block that runs again stops when the last tensor that was saved is there."""
    reentrant: bool = False
    """Which implementation of checkpointing recomputes a block."""
    training: bool = True
    """Dropout acts and a graph may be built."""
    dropout: bool = True
    """The trainer leaves the dropout of model and adapters on."""

    @property
    def modern(self) -> bool:
        """All that operations ask of the card: whether PyTorch's flash kernel runs on it."""
        return self.capability is None or self.capability >= (8, 0)
