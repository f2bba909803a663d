"""Hybrids of attention and state spaces: Falcon-H1, Jamba, Bamba, Nemotron-H.

Modelled is the path that transformers runs without the packages mamba-ssm and causal-conv1d (see
:mod:`chunked` and :mod:`recurrent`); with those packages less is kept.
Source: transformers 5.23.0, models/falcon_h1, jamba, bamba, nemotron_h.
"""

from __future__ import annotations

from functools import partial

from ftplan.memory import ops
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families.chunked import Mamba2Mixer
from ftplan.memory.families.decoder import (
    MLP,
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
)
from ftplan.memory.families.hybrid import without_padding
from ftplan.memory.families.mixture import Mixture, act
from ftplan.memory.families.recurrent import MambaMixer
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared, activation
from ftplan.memory.tape import ONE, Tensor

_NORMS = ("input_layernorm", "pre_ff_layernorm")


def bamba(raw: Config) -> Network:
    """``BambaForCausalLM``."""
    config = filled(raw)
    attends = config.get("attn_layer_indices") or ()
    turned = head_size(config) // 2  # half of a head, whatever the config says

    def block(config: Config, layer: int) -> Module:
        if layer in attends:
            mixer: Module = Attention(config, turned=turned)
        else:
            mixer = Mamba2Mixer(
                config["hidden_size"], int(config["mamba_expand"] * config["hidden_size"]),
                config["mamba_n_heads"], config["mamba_d_state"], config["mamba_n_groups"],
                config["mamba_d_conv"], config["mamba_chunk_size"],
                bias=bool(config["mamba_proj_bias"]), conv_bias=bool(config["mamba_conv_bias"]),
            )  # fmt: skip
        mlp = MLP(
            config["hidden_size"], config["intermediate_size"], act(config),
            bias=bool(config["mlp_bias"]),
        )  # fmt: skip
        return Block(
            config, mixer, mlp, mixer_name="self_attn" if layer in attends else "mamba",
            mlp_name="feed_forward", norms=_NORMS,
        )  # fmt: skip

    return Decoder(
        config, block, kind=lambda layer: layer in attends, norm_name="final_layernorm",
        ropes={"": Rope(width=turned)},
    )  # fmt: skip


class ScaledMixer(Mamba2Mixer):
    """``FalconH1Mixer``: multiplied on the way in, and weighed by its gate with or without norm."""

    def __init__(self, config: Config) -> None:
        hidden = config["hidden_size"]
        inner = config.get("mamba_d_ssm")
        inner = int(config["mamba_expand"] * hidden) if inner is None else inner
        super().__init__(
            hidden, inner, config["mamba_n_heads"], config["mamba_d_state"],
            config["mamba_n_groups"], config["mamba_d_conv"], config["mamba_chunk_size"],
            bias=bool(config["mamba_proj_bias"]), conv_bias=bool(config["mamba_conv_bias"]),
        )  # fmt: skip
        self.out_proj = Linear(inner, hidden, bias=bool(config["projectors_bias"]))
        norm = GatedGroupNorm(inner, self.groups, before=bool(config["mamba_norm_before_gate"]))
        self.gated: Module = norm if config["mamba_rms_norm"] else Gate()
        del self.children["gated"], self.children["norm"]
        if config["mamba_rms_norm"]:
            self.children["norm"] = self.gated

    def forward(
        self, x: Tensor, _shared: Shared | None = None, _held: list[Tensor] | None = None
    ) -> Tensor:
        dtype, tape = x.dtype, x.tape
        x = ops.scale(without_padding(x))
        projected = self.in_proj.forward(x)
        # the multipliers are a buffer of the weights' dtype
        factors = Tensor(tape, None, ONE, projected.width, self.A_log.dtype)
        projected = ops.mul(projected, factors)
        rate = ops.neg(ops.unary(ops.to(tape.leaf(self.A_log), "fp32"), "exp", "output"))
        gate, mixed, step = ops.split(projected, [self.inner, self.channels, self.heads])
        mixed = without_padding(self.conv1d.forward(mixed))
        narrow = self.groups * self.states
        x, b, c = ops.split(mixed, [self.inner, narrow, narrow])
        out = self.scan(x, step, rate, b, c)
        out = self.gated.forward(out, gate)
        return self.out_proj.forward(ops.to(out, dtype))


class Gate(Module):
    """``x * silu(gate)``."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return ops.mul(x, ops.unary(gate, "silu", "input"))


class GatedGroupNorm(Module):
    """``FalconH1RMSNormGated``: a norm in groups, in fp32, before or after the gate."""

    def __init__(self, width: int, groups: int, *, before: bool) -> None:
        super().__init__()
        self.weight = self.parameter("weight", width)
        self.groups, self.before = groups, before

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype, rows, width = x.dtype, x.rows, x.width
        if not self.before:
            x = ops.mul(x, ops.unary(ops.to(gate, "fp32"), "silu", "input"))
        hidden = ops.to(ops.view(x, rows * self.groups, width // self.groups), "fp32")
        root = ops.unary(ops.shift(ops.mean_square(hidden)), "rsqrt", "output")
        hidden = ops.view(ops.mul(hidden, root), rows, width)
        hidden = ops.mul(x.tape.leaf(self.weight), hidden)
        if self.before:
            hidden = ops.mul(hidden, ops.unary(ops.to(gate, "fp32"), "silu", "input"))
        return ops.to(hidden, dtype)


class ScaledAttention(Attention):
    """Attention whose keys are multiplied by a number."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj.forward(x)
        k = ops.scale(self.k_proj.forward(x))
        return q, k, self.v_proj.forward(x)


class ScaledMLP(MLP):
    """An MLP whose gate and output are multiplied by numbers."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.children[name] for name in self.names)
        wide = up.forward(x)
        wide = ops.mul(wide, activation(ops.scale(gate.forward(x)), self.act))
        return ops.scale(down.forward(wide))


class ParallelBlock(Module):
    """``FalconH1DecoderLayer``: attention and a state space side by side, then an MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.feed_forward = ScaledMLP(
            hidden, config["intermediate_size"], act(config), bias=bool(config["mlp_bias"])
        )
        self.mamba = ScaledMixer(config)
        self.self_attn = ScaledAttention(config)
        self.input_layernorm = RMSNorm(hidden)
        self.pre_ff_layernorm = RMSNorm(hidden)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        residual = x
        x = self.input_layernorm.forward(x)
        mixed = self.mamba.forward(x)
        mixed = ops.scale(mixed)
        attended = self.self_attn.forward(ops.scale(x), shared)
        attended = ops.scale(attended)
        x = ops.add(mixed, attended)
        x = ops.add(residual, x)
        residual = x
        x = self.pre_ff_layernorm.forward(x)
        x = self.feed_forward.forward(x)
        return ops.add(residual, x)


def falcon_h1(raw: Config) -> Network:
    """``FalconH1ForCausalLM``."""
    config = filled(raw)
    return Decoder(
        config, lambda config, _layer: ParallelBlock(config), norm_name="final_layernorm",
        embed_scaled=True, logits_scaled=True,
    )  # fmt: skip


class JambaMixer(MambaMixer):
    """``JambaMambaMixer``: B, C and the time step are normed by weights of their own."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            {
                **config, "intermediate_size": config["mamba_expand"] * config["hidden_size"],
                "state_size": config["mamba_d_state"], "time_step_rank": config["mamba_dt_rank"],
                "use_bias": config["mamba_proj_bias"], "conv_kernel": config["mamba_d_conv"],
                "use_conv_bias": config["mamba_conv_bias"],
            },
            normed=False,
        )  # fmt: skip
        self.dt_layernorm = RMSNorm(self.rank)
        self.b_layernorm = RMSNorm(self.states)
        self.c_layernorm = RMSNorm(self.states)

    def forward(
        self, x: Tensor, _shared: Shared | None = None, _held: list[Tensor] | None = None
    ) -> Tensor:
        return super().forward(x)

    def selected(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.dt_layernorm.forward(step), self.b_layernorm.forward(b),
            self.c_layernorm.forward(c),
        )  # fmt: skip


def jamba(raw: Config) -> Network:
    """``JambaForCausalLM``."""
    config = filled(raw)

    def attends(layer: int) -> bool:
        return bool(layer % config["attn_layer_period"] == config["attn_layer_offset"])

    def sparse(layer: int) -> bool:
        here = layer % config["expert_layer_period"] == config["expert_layer_offset"]
        return bool(here and config["num_experts"] > 1)

    def block(config: Config, layer: int) -> Module:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        if sparse(layer):
            count = config["num_experts"]
            router = Router(hidden, count, config["num_experts_per_tok"])
            experts = Experts(hidden, inner, count, act=act(config))
            mlp: Module = Mixture(router, experts, router_name="router")
        else:
            mlp = MLP(hidden, inner, act(config))
        mixer: Module = (
            Attention(config, bias=False, rope=None) if attends(layer) else JambaMixer(config)
        )
        return Block(
            config, mixer, mlp, mixer_name="self_attn" if attends(layer) else "mamba",
            mlp_name="feed_forward", norms=_NORMS,
        )  # fmt: skip

    return Decoder(
        config, block, kind=lambda layer: (attends(layer), sparse(layer)), ropes={},
        norm_name="final_layernorm",
    )  # fmt: skip


class TwoLinears(Module):
    """``down(act(up(x)))``."""

    def __init__(self, hidden: int, inner: int, act: str, *, bias: bool) -> None:
        super().__init__()
        self.act = act
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(
        self, x: Tensor, _shared: Shared | None = None, _held: list[Tensor] | None = None
    ) -> Tensor:
        return self.down_proj.forward(activation(self.up_proj.forward(x), self.act))


class LatentMixture(Module):
    """``NemotronHMoE``: experts without a gate, in a latent space where the config names one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["n_routed_experts"]
        act, bias = config["mlp_hidden_act"], bool(config["mlp_bias"])
        latent = config.get("moe_latent_size")
        self.experts = Experts(
            latent or hidden, config["moe_intermediate_size"], count, act=act, gated=False
        )
        self.gate = Router(
            hidden, count, config["num_experts_per_tok"], scoring="sigmoid", upcast=True,
            keep_fp32=True, normalize=bool(config["norm_topk_prob"]), scaled=True,
        )  # fmt: skip
        self.shared_experts = TwoLinears(
            hidden, config["moe_shared_expert_intermediate_size"], act, bias=bias
        )
        self.latent = bool(latent)
        if latent:
            self.fc1_latent_proj = Linear(hidden, latent, bias=bias)
            self.fc2_latent_proj = Linear(latent, hidden, bias=bias)

    def forward(
        self, x: Tensor, _shared: Shared | None = None, _held: list[Tensor] | None = None
    ) -> Tensor:
        residual = x
        routing = self.gate.forward(x)
        if self.latent:
            x = self.fc1_latent_proj.forward(x)
        x = self.experts.forward(x, routing)
        if self.latent:
            x = self.fc2_latent_proj.forward(x)
        return ops.add(x, self.shared_experts.forward(residual))


class MixerBlock(Module):
    """``NemotronHBlock``: one norm and one part of whichever kind."""

    def __init__(self, config: Config, mixer: Module) -> None:
        super().__init__()
        self.norm = RMSNorm(config["hidden_size"], late=True)
        self.mixer = mixer

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        residual = x
        assert self.norm.weight is not None
        x = self.norm.forward(ops.to(x, self.norm.weight.dtype))
        return ops.add(residual, self.mixer.forward(x, shared))


class NemotronH(Decoder):
    """``NemotronHForCausalLM``: the logits are cast to fp32 where they are made."""

    def head(self, x: Tensor) -> Tensor:
        return ops.to(super().head(x), "fp32")


_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_OLDER = {"mamba": "linear_attention", "attention": "full_attention"}


def nemotron_h(raw: Config) -> Network:
    """``NemotronHForCausalLM``; its pattern of layers is a list or a string of M, E, * and -."""
    config = filled(raw)
    older = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
             "use_conv_bias": "mamba_conv_bias", "chunk_size": "mamba_chunk_size"}  # fmt: skip
    config |= {name: raw[old] for name, old in older.items() if old in raw}
    named = config.get("layers_block_type")
    if named is None and config.get("hybrid_override_pattern") is not None:
        named = [_PATTERN[sign] for sign in config["hybrid_override_pattern"]]
    types = [_OLDER.get(name, name) for name in named or _PATTERN.values()]
    if named is None:
        types = ["linear_attention", "moe", "full_attention", "mlp"]
    config["num_hidden_layers"] = len(types)

    def block(config: Config, layer: int) -> Module:
        hidden = config["hidden_size"]
        if types[layer] == "linear_attention":
            mixer: Module = Mamba2Mixer(
                hidden, config["mamba_num_heads"] * config["mamba_head_dim"],
                config["mamba_num_heads"], config["ssm_state_size"], config["n_groups"],
                config["conv_kernel"], config["chunk_size"], bias=bool(config["use_bias"]),
                conv_bias=bool(config["use_conv_bias"]),
            )  # fmt: skip
        elif types[layer] == "full_attention":
            mixer = Attention(config, bias=False, rope=None)
        elif types[layer] == "moe":
            mixer = LatentMixture(config)
        else:
            mixer = TwoLinears(
                hidden, config["intermediate_size"], config["mlp_hidden_act"],
                bias=bool(config["mlp_bias"]),
            )  # fmt: skip
        return MixerBlock(config, mixer)

    return NemotronH(
        config, block, kind=lambda layer: types[layer], ropes={}, norm_name="norm_f",
        norm=partial(RMSNorm, late=True), embed_name="embeddings",
    )  # fmt: skip


MODEL_TYPES = {
    "bamba": bamba, "falcon_h1": falcon_h1, "jamba": jamba, "nemotron_h": nemotron_h,
}  # fmt: skip
