"""Mixtures of experts with ordinary attention: Mixtral, Qwen MoE, OLMoE, Granite MoE and others.

Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families.decoder import (
    MLP,
    Attention,
    Block,
    Config,
    Decoder,
    filled,
)
from ftplan.memory.nn import Linear, Module, Network, activation
from ftplan.memory.tape import Tensor


class Mixture(Module):
    """Router and experts, with experts that every token passes, where the model has them.

    ``shared``: the module's name and itself; ``shared_first`` runs it before the router (Qwen),
    ``shared_gate`` weighs it by a sigmoid.
    """

    def __init__(
        self, router: Router, experts: Experts, *, router_name: str = "gate",
        shared: tuple[str, Module] | None = None, shared_gate: int | None = None,
        shared_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.router_name = router_name
        setattr(self, router_name, router)
        self.experts = experts
        self.shared_name = shared[0] if shared else None
        if shared:
            setattr(self, *shared)
        if shared_gate:
            self.shared_expert_gate = Linear(shared_gate, 1)
        self.shared_gate = shared_gate is not None
        self.shared_first = shared_first

    def route(self) -> Router:
        """The router."""
        router = self.children[self.router_name]
        assert isinstance(router, Router)
        return router

    def forward(self, x: Tensor) -> Tensor:
        router = self.route()
        every: Tensor | None = None
        if self.shared_first:
            every = self.every(x)
        routing = router.forward(x)
        out = self.experts.forward(x, routing)
        if every is not None and self.shared_gate:
            weight = ops.unary(self.shared_expert_gate.forward(x), "sigmoid", "output")
            every = ops.mul(weight, every)
            del weight
        if every is not None:
            return ops.add(out, every)
        return ops.add(out, self.every(x)) if self.shared_name is not None else out

    def every(self, x: Tensor) -> Tensor:
        """The experts that every token passes."""
        assert self.shared_name is not None
        out: Tensor = self.children[self.shared_name].forward(x)
        return out


def act(config: Config) -> str:
    """The activation function's name."""
    return str(config.get("hidden_act") or "silu")


def mixtral(raw: Config) -> Network:
    """``MixtralForCausalLM``."""
    config = filled(raw)

    def block(config: Config, layer: int) -> Module:
        hidden, count = config["hidden_size"], config["num_local_experts"]
        router = Router(
            hidden, count, config["num_experts_per_tok"], normalize=True, keep_fp32=True
        )
        experts = Experts(hidden, config["intermediate_size"], count, act=act(config))
        return Block(config, Attention(config, bias=False), Mixture(router, experts))

    return Decoder(config, block, windows={"": config.get("sliding_window")})


def qwen_kind(config: Config, layer: int) -> bool:
    """Whether a layer of a Qwen mixture has experts."""
    dense = config.get("mlp_only_layers") or ()
    step = config.get("decoder_sparse_step") or 1
    return layer not in dense and config["num_experts"] > 0 and (layer + 1) % step == 0


def qwen_mixture(config: Config) -> Module:
    """``Qwen2MoeSparseMoeBlock`` and its successors."""
    hidden, count = config["hidden_size"], config["num_experts"]
    router = Router(
        hidden, count, config["num_experts_per_tok"], normalize=bool(config["norm_topk_prob"])
    )
    experts = Experts(hidden, config["moe_intermediate_size"], count, act=act(config))
    inner = config.get("shared_expert_intermediate_size")
    if not inner:
        return Mixture(router, experts)
    return Mixture(
        router, experts, shared=("shared_expert", MLP(hidden, inner, act(config))),
        shared_gate=hidden, shared_first=True,
    )  # fmt: skip


def qwen_moe(raw: Config) -> Network:
    """``Qwen2MoeForCausalLM``, ``Qwen3MoeForCausalLM``."""
    config = filled(raw)
    old = config["model_type"] == "qwen2_moe"
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = [""] * config["num_hidden_layers"]
    windows: dict[str, int | None] = {"": window}
    if old:  # a window of zero where none is used: the mask is built all the same
        windows = {"": None, "sliding_attention": window or 0}
        types = list(config.get("layer_types") or ()) or [
            "sliding_attention"
            if window and layer % 2 == 0 and layer < config["max_window_layers"]
            else ""
            for layer in range(config["num_hidden_layers"])
        ]
        types = ["" if name == "full_attention" else name for name in types]
    else:
        config.pop("shared_expert_intermediate_size", None)

    def block(config: Config, layer: int) -> Module:
        if old:
            bias = bool(config["qkv_bias"])
            attention = Attention(config, bias=bias, out_bias=False, mask=types[layer])
        else:
            attention = Attention(config, qk_norm="head", mask=types[layer])
        if qwen_kind(config, layer):
            return Block(config, attention, qwen_mixture(config))
        mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
        return Block(config, attention, mlp)

    return Decoder(
        config, block, kind=lambda layer: (types[layer], qwen_kind(config, layer)), windows=windows
    )


def olmoe(raw: Config) -> Network:
    """``OlmoeForCausalLM``."""
    config = filled(raw)

    def block(config: Config, layer: int) -> Module:
        hidden, count = config["hidden_size"], config["num_experts"]
        router = Router(
            hidden, count, config["num_experts_per_tok"], normalize=bool(config["norm_topk_prob"])
        )
        experts = Experts(hidden, config["intermediate_size"], count, act=act(config))
        attention = Attention(config, qk_norm="full")
        return Block(config, attention, Mixture(router, experts))

    return Decoder(config, block)


def granite_moe(raw: Config) -> Network:
    """``GraniteMoeForCausalLM`` and, with an MLP that every token passes, the shared variant."""
    config = filled(raw)
    inner = config.get("shared_intermediate_size") or 0

    def block(config: Config, layer: int) -> Module:
        mixture = granite_mixture(config)
        if not inner:
            return Block(
                config, Attention(config), mixture, mlp_name="block_sparse_moe", scaled=True
            )
        return SharedBlock(config, Attention(config), mixture, fused_mlp(config, inner))

    return Decoder(config, block, embed_scaled=True, logits_scaled=True)


def granite_mixture(config: Config) -> Module:
    """``GraniteMoeMoE``: softmax over the chosen experts only."""
    hidden, count = config["hidden_size"], config["num_local_experts"]
    router = Router(
        hidden, count, config["num_experts_per_tok"], scoring="top_softmax", float_logits=True
    )
    experts = Experts(hidden, config["intermediate_size"], count, act=act(config))
    return Mixture(router, experts, router_name="router")


class SharedMLP(Module):
    """``GraniteMoeSharedMLP``: gate and up in one matrix."""

    def __init__(self, hidden: int, inner: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.input_linear = Linear(hidden, 2 * inner)
        self.output_linear = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_linear.forward(x)
        gate, up = ops.split(x, [x.width // 2, x.width // 2])
        x = ops.mul(activation(gate, self.act), up)
        return self.output_linear.forward(x)


def fused_mlp(config: Config, inner: int) -> Module:
    """The MLP that every token passes."""
    return SharedMLP(config["hidden_size"], inner, act(config))


class SharedBlock(Block):
    """A Granite block whose MLP is a sum of experts and a shared one."""

    def __init__(
        self, config: Config, mixer: Module, mixture: Module | None, shared: Module,
        mixer_name: str = "self_attn",
    ) -> None:  # fmt: skip
        super().__init__(
            config, mixer, shared, mixer_name=mixer_name, mlp_name="shared_mlp", scaled=True
        )
        self.mixture = mixture is not None
        if mixture is not None:
            self.block_sparse_moe = mixture

    def feed(self, mlp: Module, x: Tensor) -> Tensor:
        if not self.mixture:
            return super().feed(mlp, x)
        routed = self.block_sparse_moe.forward(x)
        return ops.add(routed, mlp.forward(x))


MODEL_TYPES = {
    "mixtral": mixtral,
    "qwen2_moe": qwen_moe,
    "qwen3_moe": qwen_moe,
    "olmoe": olmoe,
    "granitemoe": granite_moe,
    "granitemoeshared": granite_moe,
}
