"""Parts that the decoders of mixtures, hybrids and vision-language models are put together from.

A family gives a :class:`Decoder` a builder of blocks; everything else is an option.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.families.defaults import ALIASES, DEFAULTS
from ftplan.memory.families.llama import rotate
from ftplan.memory.nn import (
    Embedding,
    Linear,
    Module,
    Network,
    RMSNorm,
    Shared,
    Stack,
    Stage,
    gated_mlp,
    project,
    rope_table,
)
from ftplan.memory.tape import SEQ, TOKENS, Tape, Tensor

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Decoder",
    "Rope",
    "filled",
    "rotate_part",
]

Config = Mapping[str, Any]
Build = Callable[[Config, int], Module]


def filled(config: Config, model_type: str | None = None) -> dict[str, Any]:
    """The config with what its class fills in, under the class's own names and its aliases."""
    kind = model_type or config.get("model_type") or ""
    aliases = ALIASES.get(kind, {})
    full = dict(DEFAULTS.get(kind, {}))
    full.update({aliases.get(name, name): value for name, value in config.items()})
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
        full["partial_rotary_factor"] = rope["partial_rotary_factor"]
    full.update({alias: full[name] for alias, name in aliases.items() if name in full})
    full["model_type"] = kind
    return full


def head_size(config: Config) -> int:
    """Width of one attention head."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size)


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int, turned: int) -> Tensor:
    """Rotary positions on the first ``turned`` numbers of each head; the rest is joined again."""
    if turned >= size:
        return rotate(x, cos, sin)
    first = ops.part(x, heads * turned)
    rest = ops.part(x, heads * (size - turned))
    return ops.cat((rotate(first, cos, sin), rest))


def rotate_chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``cat(a cos - b sin, b cos + a sin)`` with the halves a and b (GPT-OSS)."""
    first, second = ops.split(x, [x.width // 2, x.width // 2])
    left = ops.add(ops.mul(first, cos), ops.mul(second, sin))
    right = ops.add(ops.mul(second, cos), ops.mul(first, sin))
    return ops.cat((left, right))


def rotate_complex(x: Tensor, cos: Tensor, _sin: Tensor) -> Tensor:
    """Pairs as complex numbers, in fp32: a copy up, the product, a copy back (Llama 4)."""
    return ops.to(ops.mul(ops.to(x, "fp32"), cos, "complex product"), x.dtype)


class Attention(Module):
    """Grouped-query attention. ``qk_norm``: a norm of each ``head``, of the ``full`` width."""

    def __init__(
        self, config: Config, *, bias: bool | None = None, out_bias: bool | None = None,
        qk_norm: str | None = None, qk_offset: bool = False, rope: str | None = "",
        mask: str = "", out_name: str = "o_proj", turned: int | None = None, gated: bool = False,
        joined: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        kv_count = config.get("num_key_value_heads") or count
        size = head_size(config)
        self.heads = Heads(
            count=count, kv_count=kv_count, size=size, value_size=size,
            dropout=config.get("attention_dropout") or 0.0,
        )  # fmt: skip
        bias = bool(config.get("attention_bias")) if bias is None else bias
        out_bias = bias if out_bias is None else out_bias
        self.gated = gated
        self.q_proj = Linear(hidden, count * size * (2 if gated else 1), bias=bias)
        self.k_proj = Linear(hidden, kv_count * size, bias=bias)
        self.v_proj = Linear(hidden, kv_count * size, bias=bias)
        self.out_name = out_name
        setattr(self, out_name, Linear(count * size, hidden, bias=out_bias))
        self.qk_norm = qk_norm
        if qk_norm == "head":
            self.q_norm = RMSNorm(size, offset=qk_offset)
            self.k_norm = RMSNorm(size, offset=qk_offset)
        elif qk_norm == "full":
            self.q_norm = RMSNorm(count * size)
            self.k_norm = RMSNorm(kv_count * size)
        self.rope, self.mask = rope, mask
        self.turned = size if turned is None else turned
        self.joined = joined or self.turned < size

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x)
        q, k = self.turn(q, k, shared)
        out = attend(
            q, k, v, self.heads, shared.masks.get(self.mask), held=held,
            by_head=self.joined, window=shared.windows.get(self.mask),
        )  # fmt: skip
        return self.out(out)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed where the model norms them."""
        together = self.q_proj.together(x, (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_proj.forward(x) if together is None else together.pop(0)
        if self.qk_norm:
            q = self.normed(self.q_norm, q)
        k = self.k_proj.forward(x) if together is None else together.pop(0)
        if self.qk_norm:
            k = self.normed(self.k_norm, k)
        return q, k, self.v_proj.forward(x) if together is None else together.pop(0)

    def normed(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """A norm over each head or over all of them."""
        if self.qk_norm == "full":
            return norm.forward(x)
        heads = x.width // self.heads.size
        out = norm.forward(ops.view(x, x.rows * heads, self.heads.size))
        return ops.view(out, x.rows, x.width)

    def turn(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Rotary positions of queries and keys."""
        if self.rope is None:
            return q, k
        if q.tape.env.kernels.rope:  # a kernel rotates them where they are, forward and backward
            return ops.view(q, q.rows, q.width), ops.view(k, k.rows, k.width)
        cos, sin = shared.rope[self.rope]
        heads = self.heads
        if self.joined and self.turned >= heads.size:  # joined with nothing: a copy all the same
            return ops.cat((rotate(q, cos, sin),)), ops.cat((rotate(k, cos, sin),))
        return (
            rotate_part(q, cos, sin, heads.count, heads.size, self.turned),
            rotate_part(k, cos, sin, heads.kv_count, heads.size, self.turned),
        )

    def out(self, x: Tensor) -> Tensor:
        """The projection back."""
        linear = self.children[self.out_name]
        assert isinstance(linear, Linear)
        return project(x, linear)[0]


class MLP(Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(
        self, hidden: int, inner: int, act: str = "silu", *, bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:  # fmt: skip
        super().__init__()
        self.act = act
        self.names = names
        setattr(self, names[0], Linear(hidden, inner, bias=bias))
        setattr(self, names[1], Linear(hidden, inner, bias=bias))
        setattr(self, names[2], Linear(inner, hidden, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.children[name] for name in self.names)
        assert isinstance(gate, Linear)
        assert isinstance(up, Linear)
        assert isinstance(down, Linear)
        return gated_mlp(x, gate, up, down, self.act)


class Block(Module):
    """A pre-norm decoder layer; its parts bear the names that the model gives them."""

    def __init__(
        self, config: Config, mixer: Module, mlp: Module, *, mixer_name: str = "self_attn",
        mlp_name: str = "mlp", norms: tuple[str, str] = (
            "input_layernorm", "post_attention_layernorm",
        ),
        norm: Callable[[int], Module] = RMSNorm, scaled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.names = (mixer_name, mlp_name, *norms)
        self.scaled = scaled
        setattr(self, mixer_name, mixer)
        setattr(self, mlp_name, mlp)
        for name in norms:
            setattr(self, name, norm(config["hidden_size"]))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        mixer, mlp, first, second = (self.children[name] for name in self.names)
        held: list[Tensor] = []  # eager attention's weights, which the block names until its end
        residual = x
        x = first.forward(x)
        x = mixer.forward(x, shared, held)
        x = ops.add(residual, ops.scale(x) if self.scaled else x)
        residual = x
        x = second.forward(x)
        x = self.feed(mlp, x)
        return ops.add(residual, ops.scale(x) if self.scaled else x)

    def feed(self, mlp: Module, x: Tensor) -> Tensor:
        """The second half of the block; some models add more than one part here."""
        out: Tensor = mlp.forward(x)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A table of positions: ``width`` cosines and sines, or ``complex_pairs`` of that width."""

    width: int
    complex_pairs: bool = False
    fp32: bool = False
    """Not cast to the embeddings' dtype."""
    per_sequence: bool = False
    """Positions differ between the sequences of a batch: a row for each token."""


class Body(Module):
    """The table before the blocks and the norm after them."""

    def __init__(
        self, config: Config, norm: Callable[[int], Module], norm_name: str, embed_name: str,
        table: type[Embedding],
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_name, self.embed_name = norm_name, embed_name
        setattr(self, embed_name, table(config["vocab_size"], config["hidden_size"]))
        setattr(self, norm_name, norm(config["hidden_size"]))

    def embed(self, tape: Tape) -> Tensor:
        """The table's rows; by name, for an adapter may have put something else there."""
        out: Tensor = self.children[self.embed_name].forward(tape)
        return out

    def last(self, x: Tensor) -> Tensor:
        """The norm after the blocks."""
        out: Tensor = self.children[self.norm_name].forward(x)
        return out


class Decoder(Network):
    """A causal language model of one stack.

    ``ropes`` and ``windows`` name the position tables and attention masks that blocks ask for: a
    window in tokens, or None for all.
    """

    def __init__(
        self, config: Config, build: Build, *, kind: Callable[[int], Hashable] = lambda _layer: 0,
        ropes: Mapping[str, Rope] | None = None,
        windows: Mapping[str, int | None] | None = None,
        norm: Callable[[int], Module] = RMSNorm, norm_name: str = "norm", head_bias: bool = False,
        embed_scaled: bool = False, logits_scaled: bool = False, softcap: bool = False,
        path: str = "model", embed_name: str = "embed_tokens",
        layers_name: str = "layers", eager_only: bool = False,
        table: type[Embedding] = Embedding, states_scaled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.path = path
        self.ropes = {"": Rope(width=head_size(config))} if ropes is None else ropes
        self.windows: Mapping[str, int | None] = {"": None} if windows is None else windows
        self.eager_only = eager_only
        self.embed_scaled, self.logits_scaled, self.softcap = embed_scaled, logits_scaled, softcap
        self.states_scaled = states_scaled
        self.body = Body(config, norm, norm_name, embed_name, table)
        del self.children["body"]
        parent: Module = self
        *above, last = path.split(".")
        for name in above:
            if name not in parent.children:
                setattr(parent, name, Module())
            parent = parent.children[name]
        setattr(parent, last, self.body)
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"], bias=head_bias)
        self.embedding_names = (f"{path}.{embed_name}",)
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", f"{path}.{embed_name}.weight")
        stack = Stack(
            f"{path}.{layers_name}",
            config["num_hidden_layers"],
            lambda layer: build(config, layer),
            kind,
        )
        self.stages = [Stage(stack, self.enter, self.leave)]

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed, and build what every block is handed."""
        x = self.body.embed(tape)
        if self.embed_scaled:
            x = ops.scale(x)
        self.prepare(tape, shared, x.dtype)
        return x

    def prepare(self, tape: Tape, shared: Shared, dtype: str) -> None:
        """Masks and positions."""
        for name, window in self.windows.items():
            eager = self.eager_only and tape.env.attention != "flash"
            shared.masks[name] = make_mask(tape, dtype, window=window, eager=eager)
            shared.windows[name] = window
        for name, rope in self.ropes.items():
            if rope.complex_pairs:
                table = tape.tensor(SEQ, rope.width, "fp32", "rope")
                shared.rope[name] = (table, table)
            else:
                table_dtype = "fp32" if rope.fp32 else dtype
                if rope.per_sequence:
                    shared.rope[name] = (
                        tape.tensor(TOKENS, rope.width, table_dtype, "rope"),
                        tape.tensor(TOKENS, rope.width, table_dtype, "rope"),
                    )
                    continue
                shared.rope[name] = rope_table(tape, rope.width, table_dtype)

    def leave(self, x: Tensor, shared: Shared) -> Tensor:
        """The final norm."""
        return self.body.last(x)

    def head(self, x: Tensor) -> Tensor:
        logits = self.lm_head.forward(ops.scale(x) if self.states_scaled else x)
        if self.softcap:
            logits = ops.scale(ops.unary(ops.scale(logits), "tanh", "output"))
        return ops.scale(logits) if self.logits_scaled else logits
