"""Modules: weights with names, and the forward code that runs on the tape.

A module mirrors the one of the same name in PyTorch, transformers or peft: the same parameters
under the same names (so that counts, adapter targets and checkpoints agree), and a forward in the
same order of operations (so that what is kept agrees). Local variables live as long as they do
there: a tensor that a forward still names is a tensor that still occupies memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import field
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory import fused, ops
from ftplan.memory.images import Image
from ftplan.memory.tape import ONE, SEQ, TOKENS, Parameter, Size, Tape, Tensor

__all__ = [
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "Network",
    "RMSNorm",
    "Shared",
    "Stack",
    "Stage",
    "activation",
    "gated_mlp",
    "project",
]


class Module:
    """A named tree of parameters. Subclasses define ``forward``."""

    forward: Callable[..., Any]
    skipped = False
    """The model's forward passes this block over."""

    def __init__(self) -> None:
        self.children: dict[str, Module] = {}
        self.parameters: dict[str, Parameter] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        """A module like this one, with weights of its own; what is neither is shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            vars(twin)[name] = _twin(value, memo)
        twin.children = _twin_values(self.children, memo)
        twin.parameters = _twin_values(self.parameters, memo)
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            self.children[name] = value
        elif isinstance(value, Parameter):
            self.parameters[name] = value
        super().__setattr__(name, value)

    def parameter(self, name: str, *shape: int, dtype: str = "fp32") -> Parameter:
        """A new weight of this module."""
        weight = Parameter(name, shape, dtype, True)
        setattr(self, name, weight)
        return weight

    def looks_at(self) -> Sequence[Parameter]:
        """Weights of modules inside whose dtype the forward code asks for before they run."""
        return ()

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with dotted names, parents first."""
        waiting: list[tuple[str, Module]] = [(prefix, self)]
        while waiting:
            path, module = waiting.pop()
            yield path, module
            start = f"{path}." if path else ""
            waiting += [(start + name, child) for name, child in reversed(module.children.items())]

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """All weights below this module, with dotted names."""
        for path, module in self.named_modules(prefix):
            for name, parameter in module.parameters.items():
                yield (f"{path}.{name}" if path else name), parameter

    def child(self, path: str) -> Module:
        """The module at a dotted path."""
        module = self
        for name in path.split("."):
            module = module.children[name]
        return module

    def replace(self, path: str, module: Module) -> None:
        """Put ``module`` where another one is."""
        parent, _, name = path.rpartition(".")
        setattr(self.child(parent) if parent else self, name, module)


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (Module, Parameter)):
        return copy.deepcopy(value, memo)
    if isinstance(value, list):
        return [_twin(item, memo) for item in value]
    if isinstance(value, tuple):
        return tuple(_twin(item, memo) for item in value)
    if isinstance(value, dict) and isinstance(next(iter(value.values()), None), Module):
        return _twin_values(value, memo)
    return value


def _twin_values(values: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value, memo) for name, value in values.items()}


class Linear(Module):
    """A matrix, kept as (out x in). ``Conv1D`` of GPT-2 holds the same numbers transposed."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = self.parameter("weight", *shape)
        self.bias = self.parameter("bias", out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        weight = tape.leaf(self.weight)
        if self.transposed:
            weight = _transposed(weight)
        bias = tape.leaf(self.bias) if self.bias else None
        return ops.linear(x, weight, bias, plain=self.transposed)

    def together(self, x: Tensor, layers: Sequence[Linear]) -> list[Tensor] | None:
        """This layer and others on one input as one function, where a library has one."""
        return None

    def gated(self, x: Tensor, gate: Linear, up: Linear) -> Tensor | None:
        """``self(act(gate(x)) * up(x))`` as one function, where a library has one."""
        return None


def project(x: Tensor, *layers: Linear) -> list[Tensor]:
    """Several linear layers on one input."""
    together = layers[0].together(x, layers)
    if together is not None:
        return together
    return [layer.forward(x) for layer in layers]


def gated_mlp(x: Tensor, gate: Linear, up: Linear, down: Linear, act: str) -> Tensor:
    """``down(act(gate(x)) * up(x))``."""
    made = down.gated(x, gate, up)
    if made is not None:
        return made
    if x.tape.env.kernels.gate and act.startswith(("silu", "swish", "gelu")):
        return down.forward(fused.gate(gate.forward(x), up.forward(x)))
    return down.forward(ops.mul(activation(gate.forward(x), act), up.forward(x)))


def _transposed(weight: Tensor) -> Tensor:
    turned = weight.alias(ONE * weight.width, weight.rows[0])
    turned.requires_grad, turned.node = weight.requires_grad, weight.node
    return turned


class Embedding(Module):
    """A table of (count x width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", count, width)
        self.weight.embedding = True

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        return ops.embedding(tape, tape.leaf(self.weight), rows)


class RMSNorm(Module):
    """The RMSNorm of transformers: in fp32, written out in elementwise steps.

    ``offset``: Gemma's, whose weight is stored around zero and multiplied before the cast back.
    ``late``: OLMo 2's, whose weight is multiplied before the cast back too, but as it is.
    """

    def __init__(
        self, width: int, *, offset: bool = False, weight: bool = True, late: bool = False
    ) -> None:
        super().__init__()
        self.offset = offset
        self.late = late
        self.weight = self.parameter("weight", width) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        weight = x.tape.leaf(self.weight) if self.weight else None
        if x.tape.env.kernels.norm:
            return fused.rms_norm(x, weight)
        hidden = ops.to(x, "fp32")
        del x
        hidden = ops.mul(hidden, _inverse_root(hidden))
        if self.offset:
            hidden = ops.mul(hidden, ops.shift(ops.to(weight, "fp32"))) if weight else hidden
            return ops.to(hidden, dtype)
        if self.late and weight:
            return ops.to(ops.mul(weight, hidden), dtype)
        hidden = ops.to(hidden, dtype)
        return ops.mul(weight, hidden) if weight else hidden


def _inverse_root(hidden: Tensor) -> Tensor:
    variance = ops.mean_square(hidden)
    return ops.unary(ops.shift(variance), "rsqrt", "output")


class LayerNorm(Module):
    """PyTorch's fused layer norm."""

    def __init__(self, width: int, *, bias: bool = True, weight: bool = True) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width) if weight else None
        self.bias = self.parameter("bias", width) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        weight = tape.leaf(self.weight) if self.weight else None
        return ops.layer_norm(x, weight, tape.leaf(self.bias) if self.bias else None)


_KEEPS_OUTPUT = {"relu", "sigmoid", "tanh"}


def activation(x: Tensor, name: str) -> Tensor:
    """An activation function by the name that config.json uses (``ACT2FN``)."""
    out: Tensor = x.tape.runs(x, lambda x: _activate(x, name))
    return out


def _activate(x: Tensor, name: str) -> Tensor:
    if name in ("gelu_new", "gelu_accurate"):
        return _gelu_new(x)
    if name == "gelu_fast":
        return _gelu_fast(x)
    if name == "gelu_python":
        half = ops.scale(ops.scale(x))
        inner = ops.scale(x)
        return ops.mul(half, ops.shift(ops.unary(inner, "erf", "input")))
    if name == "gelu_10":
        return ops.unary(ops.unary(x, "gelu", "input"), "clip", "input")
    if name == "relu2":
        relu = ops.unary(x, "relu", "output")
        return ops.unary(relu, "square", "input")
    if name == "quick_gelu":
        return ops.mul(x, ops.unary(ops.scale(x), "sigmoid", "output"))
    if name in ("linear", "identity"):
        return x
    return ops.unary(x, name, "output" if name in _KEEPS_OUTPUT else "input")


def _gelu_new(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(c (x + 0.044715 x^3)))`` in elementwise steps (``NewGELUActivation``).

    Autocast runs the power in fp32, and everything after it follows.
    """
    half = ops.scale(x)
    inner = ops.scale(ops.add(x, ops.scale(ops.power(ops.autocast_fp32(x)))))
    inner = ops.shift(ops.unary(inner, "tanh", "output"))
    return ops.mul(half, inner)


def _gelu_fast(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(c x (1 + 0.044715 x x)))`` (``FastGELUActivation``)."""
    half = ops.scale(x)
    square = ops.shift(ops.mul(ops.scale(x), x))
    inner = ops.mul(ops.scale(x), square)
    return ops.mul(half, ops.shift(ops.unary(inner, "tanh", "output")))


@dataclass(slots=True)
class Shared:
    """What the model computes once and hands to every block."""

    rope: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines by the name of the layer type."""
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    """Attention masks by the name of the layer type, where a kernel needs one."""
    windows: dict[str, int | None] = field(default_factory=dict)
    """How many tokens each one sees, by the name of the layer type; None: all before it."""
    mask: Tensor | None = None
    bias: Tensor | None = None
    """A position bias with a gradient (T5)."""
    cross_bias: Tensor | None = None
    """The same for cross attention: zeros."""
    zeros: list[tuple[Tensor, Parameter]] = field(default_factory=list)
    """The first of these zeros, and what collects a gradient of them that nobody asks for: under
    checkpointing."""
    memory: Tensor | None = None
    """The encoder's output, for cross attention."""
    held: list[Tensor] = field(default_factory=list)
    """What the model's forward has names for until it returns: what came out of the embeddings, or
    of a tower."""
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values that later layers use too, by layer type: one place for all layers, also
    when they run again (Gemma 4)."""
    picked: Tensor | None = None
    """Which tokens the layer before looked at (GLM-5)."""
    layer_inputs: list[Tensor] = field(default_factory=list)
    """A tensor of which each layer is given a part (Gemma 4)."""
    checkpointed: bool = False
    """Gradient checkpointing is on, in every block or in some."""

    def made(self) -> list[Tensor]:
        """What blocks make for others."""
        kept = [tensor for pair in self.kept.values() for tensor in pair]
        return [t for t in (self.bias, self.cross_bias, *kept) if t is not None]

    def given(self) -> list[Tensor]:
        """What blocks are handed that may ask for a gradient, beside their input."""
        whole = [] if self.memory is None else [self.memory]
        return [*whole, *self.made(), *self.layer_inputs]

    def forget(self) -> None:
        """What is local to the model's forward; only a checkpoint keeps it."""
        self.mask = self.bias = self.cross_bias = self.picked = None
        self.rope, self.masks, self.kept, self.layer_inputs = {}, {}, {}, []


class Stack:
    """Blocks in a row. Only one of each kind is built; the others are like it.

    ``shared``: the blocks of one kind are one block, run several times: its weights count once.
    """

    def __init__(
        self,
        name: str,
        count: int,
        build: Callable[[int], Module],
        kind: Callable[[int], Hashable] = lambda _layer: 0,
        *,
        shared: bool = False,
    ) -> None:
        self.name = name
        self.shared = shared
        self.hands_on = False
        """Blocks make things that later ones use: the last of a kind is first to give back."""
        self.count = count
        self._build = build
        self._kind = kind
        self.kinds: list[Module] = []
        self.pattern: list[int] = []
        self.split(lambda _layer: 0)

    def split(self, difference: Callable[[int], Hashable]) -> None:
        """Build anew with one more difference between layers (trained or not, rank, ...)."""
        before = self._kind
        self._kind = lambda layer: (before(layer), difference(layer))
        self.kinds, self.pattern = [], []
        seen: dict[Hashable, int] = {}
        for layer in range(self.count):
            key = self._kind(layer)
            if key not in seen:
                seen[key] = len(self.kinds)
                self.kinds.append(self._build(layer))
            self.pattern.append(seen[key])

    def parameters(self) -> list[Parameter]:
        """The weights of one block of each kind."""
        return [p for block in self.kinds for _, p in block.named_parameters()]

    def times(self) -> dict[int, int]:
        """For each of them (by id) in how many layers there is one like it."""
        return {
            id(parameter): 1 if self.shared else self.pattern.count(kind)
            for kind, block in enumerate(self.kinds)
            for _, parameter in block.named_parameters()
        }

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The weights of every layer, by full name."""
        places = range(len(self.kinds)) if self.shared else self.pattern
        for layer, kind in enumerate(places):
            yield from self.kinds[kind].named_parameters(f"{self.name}.{layer}")


class Stage:
    """A stack with what stands before and after it. A decoder-only model is one stage."""

    def __init__(
        self,
        stack: Stack,
        enter: Callable[[Tape, Shared], Tensor],
        leave: Callable[[Tensor, Shared], Tensor],
    ) -> None:
        self.stack = stack
        self.enter = enter
        """From ids (and an earlier stage's output, in ``shared``) to the first block's input."""
        self.leave = leave
        """From the last block's output to the stage's: the final norm, usually."""


class Network(Module):
    """A whole model. Parameters outside the blocks are its own; those of blocks are the stacks'.

    An encoder-decoder has two stages; the first one's output becomes ``shared.memory``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Stage] = []
        self.checkpoints = True
        """Its class has gradient checkpointing (``supports_gradient_checkpointing``)."""
        self.tied: dict[str, str] = {}
        """Names of weights that are another weight: no bytes of their own."""
        self.buffer_bytes = 0
        """Large buffers that are no weights (causal masks of older models), static."""
        self.loaded_dtype = "fp32"
        """The dtype that the model is loaded in: its buffers keep it, whatever weights become."""
        self.buffer_elements = 0
        """The same for buffers of that dtype, in elements."""
        self.loss_in_fp32 = True
        """The loss casts logits to fp32 first (``ForCausalLMLoss``); else it takes them as is."""
        self.loss_shifts: str | None = None
        """What the model's own loss moves by one token; None: what the stack's does."""
        self.lends_tables = False
        """All blocks read a table that is the model's: of relative positions."""
        self.returns_tuples = False
        """The cache it returns is tuples of tensors, which a conversion of outputs finds."""
        self.embedding_names: tuple[str, ...] = ("model.embed_tokens",)
        """Modules that quantisation and `all-linear` leave alone, beside the head."""
        self.entrance: tuple[str, ...] = ()
        """Where names of further weights begin that are beside the embeddings (a tower's)."""
        self.head_name: str = "lm_head"
        self.unquantised: tuple[str, ...] = ()
        """Linear layers that transformers keeps as they are (``_keep_in_fp32_modules``)."""
        self.kept_in_fp32: tuple[str, ...] = ()
        """Modules and weights that are loaded in fp32 whatever dtype is asked for
        (``_keep_in_fp32_modules_strict``)."""
        self.fsdp_kind: Any = None
        """How FSDP2 runs it, where that is in a way of the trainer's own."""
        self.frees_head = False
        """FSDP2 frees a unit of norm and head after forward as others: somebody told it to."""
        self.virtual_tokens = 0
        """Learned tokens before each sequence, in tokens of a sequence (prompt tuning)."""

    def was_cut(self, *, first: bool, fresh: bool) -> None:
        """A rank of a pipeline has a part of it now: the first one's, or another's; ``fresh``: no
        backward has ended yet."""

    def tie(self, name: str, to: str) -> None:
        """Make the weight ``name`` the same one as ``to``."""
        path, _, attribute = name.rpartition(".")
        to_path, _, to_attribute = to.rpartition(".")
        weight = self.child(to_path).parameters[to_attribute]
        setattr(self.child(path), attribute, weight)
        self.tied[name] = to

    def inputs(self, tape: Tape) -> list[Tensor]:
        """What the caller passes beside the text, and holds: none, but for images."""
        return []

    def tables(self, tape: Tape) -> list[Tensor]:
        """What the model keeps from batch to batch, as long as the longest: none, usually."""
        return []

    def sharded(self, fsdp: Any, units: Sequence[Any]) -> None:
        """FSDP shards it: ``units`` are those that are no blocks."""

    def after_block(self, _layer: int, x: Tensor) -> Tensor:
        """What the model does to the hidden states between two blocks: nothing, but for images."""
        return x

    def further_inputs(self) -> list[Module]:
        """What ``enable_input_require_grads`` finds beside the word embedding: a tower's patches.

        It hooks the input embeddings of every model inside the model (transformers 5.23,
        ``modeling_utils.py``).
        """
        return []

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence; ``image``: of what size, where it is left open."""
        raise UnsupportedError(
            "images in the batch of this model",
            remedy="leave batch.images out: no tower of this model is run",
        )

    def head_parameters(self) -> list[Parameter]:
        """The weights of the output head."""
        return [parameter for _, parameter in self.child(self.head_name).named_parameters()]

    def head(self, x: Tensor) -> Tensor:
        """From the last stage's output to the logits."""
        raise NotImplementedError

    def classify(self, labels: int) -> None:
        """Put a linear ``score`` over ``labels`` in place of the language model's head.

        What transformers does for decoders (``GenericForSequenceClassification``). Raises
        UnsupportedError for an encoder-decoder.
        """
        if len(self.stages) > 1:
            raise UnsupportedError(
                "a head that classifies on an encoder-decoder",
                remedy="classify with a decoder or an encoder (llama, qwen3, bert, roberta ...)",
            )
        head = self.child(self.head_name)
        assert isinstance(head, Linear)
        del self.children[self.head_name]
        self.tied.pop(f"{self.head_name}.weight", None)
        self.head_name = "score"
        score = Linear(head.in_features, labels)
        self.replace("score", score)
        self.head = self._scored  # type: ignore[method-assign]

    def value(self) -> None:
        """Put a head of one number a token beside the language model's head, which stays.

        TRL's ``AutoModelForCausalLMWithValueHead`` (trl/models/modeling_value_head.py, 0.24).
        """
        head = self.child(self.head_name)
        assert isinstance(head, Linear)
        summary = Linear(head.in_features, 1, bias=True)
        self.replace("v_head", summary)
        for _, parameter in summary.named_parameters():
            parameter.dtype, parameter.trainable = "fp32", True

    def values(self, x: Tensor) -> Tensor:
        """A number a token, out of the last hidden states."""
        weight: Parameter = self.children["v_head"].weight  # type: ignore[attr-defined]
        out: Tensor = self.children["v_head"].forward(ops.to(ops.dropout(x, 0.1), weight.dtype))
        return out

    def _scored(self, x: Tensor) -> Tensor:
        out: Tensor = self.children["score"].forward(x)  # by name: an adapter trains a copy of it
        return out

    def drop_head(self) -> None:
        """Return the last hidden states (``AutoModel``): an embedding model has no head."""
        self.classify(1)
        for name in (self.head_name.partition(".")[0], "pooler"):
            self.children.pop(name, None)
        self.head = _as_it_is  # type: ignore[method-assign]

    def all_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every weight of the model once, by the name transformers gives it."""
        for name, parameter in self.named_parameters():
            if name not in self.tied:
                yield name, parameter
        for stage in self.stages:
            yield from stage.stack.named_parameters()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def rope_table(tape: Tape, width: int, dtype: str, rows: Size = SEQ) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``width`` for each position, computed in fp32 and cast."""
    made: tuple[Tensor, Tensor] = tape.runs(None, lambda _: _rope(tape, width, dtype, rows))
    return made


def _rope(tape: Tape, width: int, dtype: str, rows: Size) -> tuple[Tensor, Tensor]:
    angles = tape.tensor(rows, width, "fp32", "rope")
    cos, sin = (
        ops.to(ops.scale(angles, "rope"), dtype),
        ops.to(ops.scale(angles, "rope"), dtype),
    )
    return cos, sin
