"""Adapters: which modules they wrap, what they add, and how they run, as in PEFT 0.21.

One file per kind of adapter; :mod:`rules` has PEFT's targeting. A network is prepared in two
steps: :func:`distinguish` builds layers apart that get different adapters, and :func:`adapt`, once
every weight has its dtype, wraps them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import cast

from ftplan.errors import UnsupportedError
from ftplan.memory.adapters.bottleneck import add_bottlenecks
from ftplan.memory.adapters.lora import FoldedLinear, FoldedParameter, LoraEmbedding, LoraLinear
from ftplan.memory.adapters.lycoris import LohaLinear, LokrLinear
from ftplan.memory.adapters.paths import (
    BeftLinear,
    GloraLinear,
    GraloraLinear,
    PeanutLinear,
    PsoftLinear,
)
from ftplan.memory.adapters.products import (
    AdaLoraLinear,
    Bank,
    C3aLinear,
    DeloraLinear,
    MissLinear,
    PveraLinear,
    RandLoraLinear,
    RandomBases,
    RoadLinear,
    VbLoraLinear,
)
from ftplan.memory.adapters.prompts import add_prompt
from ftplan.memory.adapters.rotations import BoftLinear, OftLinear
from ftplan.memory.adapters.rules import (
    LORA,
    MASKED,
    Place,
    Targeting,
    feedforward,
    matches,
    named_layers,
    rank_of,
    targeting,
)
from ftplan.memory.adapters.vectors import (
    Ia3Linear,
    Projections,
    VeraLinear,
    train_biases,
    trained_copy,
)
from ftplan.memory.adapters.whole import (
    FourierLinear,
    HiraLinear,
    HraLinear,
    MissBatLinear,
    ShiraLinear,
    TokenHead,
    TokenRows,
)
from ftplan.memory.experts import Experts, Router
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.nn import Embedding, Linear, Module, Network
from ftplan.memory.quantized import QuantizedLinear

__all__ = ["adapt", "distinguish", "matches", "rank_of"]

PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")
BOTTLENECKS = ("houlsby", "pfeiffer")
BARE = ("ln_tuning", "trainable_tokens")
"""Kinds that put nothing around a linear layer."""
PLAIN = (
    "adalora", "miss", "c3a", "fourierft", "hra", "randlora", "road", "shira", "vblora", "delora",
    "pvera", "hira", "beft", "gralora", "glora", "peanut", "psoft",
)  # fmt: skip
"""Kinds that are modelled on plain linear layers alone."""
Wrap = Callable[[str, Linear, int], Module]


def _classifies(job: Job) -> bool:
    return job.task in ("classify", "rm")


def _model_type(job: Job) -> str:
    """What PEFT looks up: the type of the whole model, not of its text (``model.config``)."""
    return str(job.config.get("model_type", ""))


def _targeting(network: Network, job: Job) -> Targeting:
    assert job.adapter is not None
    return targeting(network, job.adapter, _model_type(job), classifies=_classifies(job))


def distinguish(network: Network, job: Job) -> None:
    """Build layers apart whose adapters differ, before anything else is done to them."""
    spec = job.adapter
    if spec is None or spec.kind in (*PROMPTS, *BOTTLENECKS, "bitfit"):
        return
    rules = _targeting(network, job)
    if rules.same_in_every_layer:
        return
    for stage in network.stages:
        stack = stage.stack
        blocks = [stack.kinds[kind] for kind in stack.pattern]

        def places(layer: int, name: str = stack.name, blocks: list[Module] = blocks) -> Hashable:
            return tuple(
                rules.place(f"{name}.{layer}.{path}", module)
                for path, module in blocks[layer].named_modules()
                if path
            )

        stack.split(places)


def adapt(network: Network, job: Job) -> None:
    """Add the adapter to a network whose weights have their dtypes and are frozen.

    Raises UnsupportedError for what PEFT refuses: nothing matches, a module of that kind.
    """
    spec = job.adapter
    assert spec is not None
    if spec.kind in PROMPTS:
        if _model_type(job) in MASKED and not _classifies(job):
            raise UnsupportedError(
                f"{spec.kind} of a masked language model",
                remedy="use lora; PEFT has learned tokens for causal, sequence-to-sequence and "
                "classification models",
            )
        add_prompt(network, spec, job)
    elif spec.kind in BOTTLENECKS:
        add_bottlenecks(network, spec)
    elif spec.kind == "bitfit":
        parameters = {
            f"{name}.{own}": parameter
            for _, _, name, module in named_layers(network)
            for own, parameter in module.parameters.items()
        }
        if not train_biases(parameters):
            raise UnsupportedError(
                "bitfit on a model without biases", remedy="use ln_tuning, ia3 or lora"
            )
    else:
        _wrap_modules(network, spec, job)


def _wrap_modules(network: Network, spec: AdapterSpec, job: Job) -> None:
    rules = _targeting(network, job)
    placed = [
        (*entry, place)
        for entry in named_layers(network)
        if entry[2] and (place := rules.place(entry[2], entry[3])) != Place()
    ]
    if not any(place.wrapped or place.parameters for *_, place in placed):
        named = rules.modules if isinstance(rules.modules, str) else ", ".join(rules.modules)
        raise UnsupportedError(
            f"a job whose targets ({named}) match no module of its model",
            remedy="name modules that it has, as [q_proj, v_proj], or use all-linear",
        )
    around = [entry for entry in placed if entry[4].wrapped]
    wrap = None if spec.kind in BARE else _wrapper(network, spec, job, around)
    for root, path, name, module, place in placed:
        if place.saved:
            root.replace(path, trained_copy(module))
            network.tied.pop(f"{name}.weight", None)
        elif place.parameters and isinstance(module, Linear):
            _fold_linear(root, path, module, place, spec)
        elif place.parameters:
            # Megatron's experts have dropout; PEFT's, which are walked for them, cannot have it:
            # what it keeps is among what is unexplained of modules that were not traced
            megatron = job.sharding.megatron and not spec.use_dora
            _fold(name, module, place, replace(spec, dropout=0.0) if megatron else spec)
        elif spec.kind == "ln_tuning":
            root.replace(path, trained_copy(module))
        elif isinstance(module, Embedding) and spec.kind in LORA:
            root.replace(path, LoraEmbedding(module, spec, place.rank))
        elif isinstance(module, Embedding) and spec.kind == "trainable_tokens":
            _learn_rows(network, name, module, job)
        elif wrap and (isinstance(module, Linear) or (spec.kind == "lora" and _of_patches(module))):
            root.replace(path, wrap(name, cast(Linear, module), place.rank))
        else:
            rows = spec.kind == "trainable_tokens"
            what = "embedding" if rows else "linear layer"
            remedy = "name embeddings alone" if rows else "name the linear layers below it"
            raise UnsupportedError(f"{spec.kind} on {name}, which is no {what}", remedy=remedy)


def _of_patches(module: Module) -> bool:
    """A convolution whose windows do not overlap, a linear layer over patches: PEFT's two beside it
    have as many weights as those of such a layer."""
    return hasattr(module, "in_features")


def _learn_rows(network: Network, name: str, table: Embedding, job: Job) -> None:
    """``TrainableTokensLayer`` around an embedding, and around the head that shares its weight."""
    assert job.adapter is not None
    rows = TokenRows(table, job.adapter)
    network.replace(name, rows)
    if network.tied.pop(f"{network.head_name}.weight", None):
        if job.environment.loss != "full":
            raise UnsupportedError(
                "a loss that never makes all logits, over a head that shares its learned tokens",
                remedy="use loss: full",
            )
        head = network.child(network.head_name)
        assert isinstance(head, Linear)
        network.replace(network.head_name, TokenHead(head, rows))
        network.tie(f"{network.head_name}.base_layer.weight", f"{name}.base_layer.weight")


def _fold_linear(root: Module, path: str, module: Linear, place: Place, spec: AdapterSpec) -> None:
    """``target_parameters`` may name a linear layer's weight too."""
    ((own, rank),) = place.parameters
    if own != "weight" or isinstance(module, QuantizedLinear):
        raise UnsupportedError(f"the target parameter {own!r} of a linear layer")
    root.replace(path, FoldedLinear(module, spec, rank))


def _fold(name: str, module: Module, place: Place, spec: AdapterSpec) -> None:
    if spec.kind not in LORA or not isinstance(module, Experts | Router):
        raise UnsupportedError(
            f"{spec.kind} on the parameters of {name}",
            remedy="adapt linear layers, or fused experts and routers with lora",
        )
    if isinstance(module, Experts) and module.exchange and not module.exchange.adapts:
        raise UnsupportedError(
            f"adapters on {name} under expert parallelism",
            because="PEFT 0.21 adds whole tensors to weights that are a rank's part, which PyTorch "
            "refuses",
            remedy="name targets that leave the experts out, as [q_proj, k_proj, v_proj, o_proj]",
        )
    transposed = isinstance(module, Experts) and module.transposed
    for own, rank in place.parameters:
        folded = FoldedParameter(module.parameters[own], spec, rank, transposed=transposed)
        module.children[f"{own}_lora"] = folded
        module.folded[own] = folded


def _refuse_others(kind: str, linears: Iterable[Linear]) -> None:
    for layer in linears:
        if layer.transposed or isinstance(layer, QuantizedLinear):
            what = "GPT-2's transposed layers" if layer.transposed else "a quantised layer"
            raise UnsupportedError(f"{kind} on {what}", remedy="use lora, vera or ia3 here")


def _wrapper(
    network: Network,
    spec: AdapterSpec,
    job: Job,
    placed: list[tuple[Module, str, str, Module, Place]],
) -> Wrap:
    """How a linear layer is wrapped by this kind of adapter."""
    kind = spec.kind
    if kind == "ia3":
        ends = feedforward(spec, _model_type(job))
        return lambda name, base, _rank: Ia3Linear(
            base, spec, feedforward=any(name.endswith(end) for end in ends)
        )
    linears = [module for *_, module, _ in placed if isinstance(module, Linear)]
    largest = (
        max((m.in_features for m in linears), default=1),
        max((m.out_features for m in linears), default=1),
    )
    if kind in PLAIN:
        _refuse_others(kind, linears)
    if kind == "vera":
        shared = Projections(*largest, spec.rank, spec.dtype)
        network.children["vera"] = shared
        return lambda _name, base, rank: VeraLinear(base, spec, rank, shared)
    if kind == "pvera":
        drawn = Projections(*largest, 2 * spec.rank, spec.dtype, up=spec.rank, prefix="pvera")
        network.children["pvera"] = drawn
        return lambda _name, base, rank: PveraLinear(base, spec, rank, drawn)
    if kind == "randlora":
        bases = RandomBases(*largest, spec.rank, spec.dtype)
        network.children["randlora"] = bases
        return lambda _name, base, rank: RandLoraLinear(base, spec, rank, bases)
    if kind == "vblora":
        bank = Bank(
            int(spec.options.get("num_vectors", 256)),
            int(spec.options.get("vector_length", 256)),
            spec.dtype,
        )
        network.children["vblora"] = bank
        return lambda _name, base, rank: VbLoraLinear(base, spec, rank, bank)
    simple: dict[str, Callable[[Linear, AdapterSpec, int], Module]] = {
        **dict.fromkeys(LORA, LoraLinear),
        "loha": LohaLinear,
        "lokr": LokrLinear,
        "oft": OftLinear,
        "boft": BoftLinear,
        "adalora": AdaLoraLinear,
        "miss": MissBatLinear if spec.options.get("init_weights") == "bat" else MissLinear,
        "c3a": C3aLinear,
        "fourierft": FourierLinear,
        "hra": HraLinear,
        "road": RoadLinear,
        "shira": ShiraLinear,
        "delora": DeloraLinear,
        "hira": HiraLinear,
        "beft": BeftLinear,
        "gralora": GraloraLinear,
        "glora": GloraLinear,
        "peanut": PeanutLinear,
        "psoft": PsoftLinear,
    }
    if kind not in simple:
        raise UnsupportedError(f"the adapter {kind!r}", remedy=f"use one of {', '.join(simple)}")
    return lambda _name, base, rank: simple[kind](base, spec, rank)
