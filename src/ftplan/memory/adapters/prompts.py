"""Prompt tuning, p-tuning and prefix tuning: learned tokens before the real ones.

Source: peft 0.21.2, ``peft_model.py`` (``get_prompt``, ``PeftModelForCausalLM.forward``),
``utils/other.py`` (``_prepare_prompt_learning_config``), ``tuners/prompt_tuning``, ``p_tuning``,
``prefix_tuning``. PEFT keeps these weights in fp32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import thin
from ftplan.memory.families import complete
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.nn import Embedding, Module, Network, Shared
from ftplan.memory.tape import BATCH, ONE, SCORES, TOKENS, Grads, Size, Tape, Tensor

__all__ = ["add_prompt"]


def _learned(module: Module) -> None:
    for _, parameter in module.named_parameters():
        parameter.dtype = "fp32"
        parameter.trainable = True
        parameter.added = True


class Prompt(Module):
    """The learned tokens; p-tuning passes them through three linear layers."""

    def __init__(self, tokens: int, width: int, *, encoded: bool) -> None:
        super().__init__()
        self.embedding = Embedding(tokens, width)
        self.mlp_head = Module()
        if encoded:
            for index in (0, 2, 4):  # 1 and 3 are activations
                self.mlp_head.children[str(index)] = thin(width, width, "fp32", bias=True)
        _learned(self)

    def forward(self, tape: Tape) -> Tensor:
        x = self.embedding.forward(tape, ONE * self.embedding.weight.shape[0])
        for index, layer in self.mlp_head.children.items():
            x = layer.forward(x)
            if index != "4":
                x = ops.unary(x, "relu", "output")
        return x


class PromptedEmbedding(Embedding):
    """The word embedding, with the learned tokens joined before each sequence."""

    def __init__(self, base: Embedding, prompt: Prompt, tokens: int) -> None:
        Module.__init__(self)
        self.base_layer = base
        object.__setattr__(self, "weight", base.weight)
        self.prompt_encoder = prompt
        self.tokens = tokens

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        words = self.base_layer.forward(tape, TOKENS + BATCH * -self.tokens)
        prompt = self.prompt_encoder.forward(tape)
        prompts = _repeat(prompt, BATCH * self.tokens)
        prompts = ops.to(prompts, words.dtype)
        return _join(prompts, words)


def _repeat(x: Tensor, rows: Size) -> Tensor:
    """The same tokens for every sequence."""
    out = x.tape.tensor(rows, x.width, x.dtype, "repeat")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "repeat", [x], lambda grad: (make(grad),))
    return out


def _join(first: Tensor, second: Tensor, name: str = "cat") -> Tensor:
    """Joined along the sequence; the way back hands out views."""
    dtype = ops.promote(first.dtype, second.dtype)
    out = first.tape.tensor(first.rows + second.rows, first.width, dtype, name)
    rows = [x.rows if x.requires_grad else None for x in (first, second)]

    def apply(grad: Tensor) -> Grads:
        return tuple(None if own is None else grad.alias(rows=own) for own in rows)

    ops.record([out], name, [first, second], apply)
    return out


class Prefix:
    """What attention joins before its keys and values in every layer."""

    def __init__(self, past: Tensor, tokens: int, width: int) -> None:
        tape = past.tape
        self.past = past
        self.tokens = tokens
        self.width = width
        rows = SCORES + TOKENS * tokens
        self.mask = tape.tensor(rows, 1, "bool", "mask")
        """More keys than queries: no kernel's causal flag will do."""
        if tape.env.attention == "eager":
            self.mask = tape.tensor(rows, 1, past.dtype, "mask")

    def join(self, x: Tensor) -> Tensor:
        """Keys (or values) of one layer behind the prefix's; the cache holds them too."""
        own = _slice(self.past, BATCH * self.tokens, self.width)
        out = _join(own, x, "keys with prefix")
        out.tape.cached.append(out.alias())
        return out


def _slice(past: Tensor, rows: Size, width: int) -> Tensor:
    """One layer's keys or values: a view; the way back pads it to its layer's pair."""
    out = past.alias(rows, width)
    pair = (rows, width * 2, past.dtype)

    def apply(grad: Tensor) -> Grads:
        return (grad.tape.tensor(*pair, "gradient"),)

    ops.record([out], "select", [past], apply)
    return out


def add_prompt(network: Network, spec: AdapterSpec, job: Job) -> None:
    """Put learned tokens before the input, or before the keys and values of every layer."""
    config = complete(job.config.get("text_config") or job.config)
    tokens = spec.virtual_tokens
    if spec.kind == "prefix_tuning":
        _add_prefix(network, config, tokens, job)
        return
    width = _of(config, "hidden_size", "n_embd", "d_model")
    stages = len(network.stages)
    prompt = Prompt(tokens * stages, width, encoded=spec.kind == "p_tuning")
    path = network.embedding_names[0]
    base = network.child(path)
    assert isinstance(base, Embedding)
    network.replace(path, PromptedEmbedding(base, prompt, tokens))
    network.virtual_tokens = tokens


def _of(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise UnsupportedError(f"learned tokens for a config without {names[0]}")


def _add_prefix(network: Network, config: Mapping[str, Any], tokens: int, job: Job) -> None:
    if job.checkpoint_every:
        raise UnsupportedError(
            "prefix tuning with gradient checkpointing",
            remedy="set gradient_checkpointing: false; the prefix lives in a cache, which PEFT and "
            "transformers drop when they checkpoint",
        )
    heads = _of(config, "num_attention_heads", "n_head", "num_heads")
    width = _of(config, "hidden_size", "n_embd", "d_model")
    if config.get("num_key_value_heads"):
        size = config.get("head_dim") or width // heads
        width = size * int(config["num_key_value_heads"])
    stage = network.stages[-1]  # a decoder's own attention, never an encoder's
    layers = stage.stack.count
    table = Embedding(tokens, layers * 2 * width)
    _learned(table)
    network.children["prompt_encoder"] = table
    enter = stage.enter

    def entered(tape: Tape, shared: Shared) -> Tensor:
        past = table.forward(tape, BATCH * tokens)
        x = enter(tape, shared)
        tape.prefix = Prefix(ops.to(past, x.dtype), tokens, width)
        return x

    stage.enter = entered
