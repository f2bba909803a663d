"""What FSDP2 gathers together: a block, what is wrapped apart beside the blocks, or the root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field

from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Module, Network
from ftplan.memory.tape import Parameter, Storage, Tensor

__all__ = ["OUTER", "Unit", "is_adapted", "stays_gathered", "wrapped_apart"]

OUTER = ("root", "embeddings", "head")
"""Units that are no blocks, nor in one."""


@dataclass(slots=True)
class Unit:
    """Weights that are gathered and freed together."""

    name: str
    parameters: list[Parameter]
    gathered: list[Storage] = field(default_factory=list)
    flat: Storage | None = None
    reduced: bool = False
    across: Storage | None = None
    """A shard of gradients while replicas sum it: kept until backward has ended."""
    accumulated: list[Storage] = field(default_factory=list)
    """Whole gradients of earlier micro batches, in the dtype that they will be reduced in."""
    place: int | str | None = None
    """The layer, where it is recorded by itself; else it stands for others too."""
    module: Module | None = None
    part: Tensor | None = None
    """A gradient of some of the tokens, before it is reduced with those of the others."""
    scattered: dict[int, Tensor | None] = field(default_factory=dict)
    """Shards of gradients (by id of the weight) that were reduced before the rest of the unit's."""
    times: dict[int, int] = field(default_factory=dict)
    """How many tensors of the model a parameter stands for, where that is not one."""
    experts: bool = False
    """Experts that are spread, and sharded over those ranks alone that have the same ones."""
    stays: bool | None = None
    """Whether it is not freed between forward and backward; None: as the policy says."""
    waiting: set[int] = field(default_factory=set)
    """Which of its modules (by id) have not run yet in this pass."""
    entered: bool = False
    """One of its modules has run in this pass."""
    turns: int = 0
    """How many of its calls the way back has come to."""
    shards: dict[int, Tensor] = field(default_factory=dict)
    """Reduced gradients of later calls, by parameter."""


def wrapped_apart(
    network: Network, spec: ShardingSpec, *, adapted: bool
) -> list[tuple[str, list[Module]]]:
    """What FSDP2 makes units of beside the blocks, as accelerate does since 1.14.

    The embeddings, and the final norm with the head: one unit where these two share a weight
    (accelerate/utils/fsdp_utils.py 1.15, ``fsdp2_prepare_model``). ``adapted``: PEFT is around it.
    Or the output layer alone (torchtune's ``custom_sharded_layers``).
    """
    if not spec.apart:
        return []
    table = network.child(network.embedding_names[0])
    head = _output_embeddings(network)
    if "untied" in spec.apart:
        return _untied(network, table, head)
    norm = _final_norm(network, adapted=adapted)
    tail = [module for module in (norm, head) if module is not None]
    if len(network.stages) > 1:
        raise UnsupportedError(
            "FSDP2 of an encoder-decoder whose embeddings are a unit of their own",
            because="its encoder and decoder share them, and torch 2.13 refuses a weight of two "
            "units",
            remedy="use sharding: {kind: fsdp, version: 2, wrap: block}, as accelerate had it "
            "until 1.13",
        )
    units = [("embeddings", [table]), ("head", tail), ("output", [head] if head else [])]
    if f"{network.head_name}.weight" in network.tied:
        if "output" in spec.apart:
            raise UnsupportedError(
                "an output layer as a unit of FSDP2 whose weight is the embeddings'",
                because="torchtune multiplies by a sharded table then, and fails",
                remedy="leave output out of sharding.apart (custom_sharded_layers)",
            )
        units = [("head", [table, *tail])]
    return [(name, modules) for name, modules in units if name in spec.apart and modules]


def _untied(network: Network, table: Module, head: Module | None) -> list[tuple[str, list[Module]]]:
    """AutoModel's: tables that are trained, and share no weight.

    nemo_automodel/components/distributed/parallelizer.py 0.7.0,
    ``_fully_shard_untied_input_output_embeddings``.
    """
    if f"{network.head_name}.weight" in network.tied:
        return []
    both = (("embeddings", table), ("head", head))
    return [
        (name, [module])
        for name, module in both
        if module is not None and any(p.trainable for _, p in module.named_parameters())
    ]


def stays_gathered(network: Network, spec: ShardingSpec) -> Callable[[Parameter, bool], bool]:
    """Whether a forward leaves a weight gathered, by the weight and whether a block has it."""
    freed = {
        id(parameter)
        for name, modules in wrapped_apart(network, spec, adapted=is_adapted(network))
        for module in modules
        for _, parameter in module.named_parameters()
        if name != "head"
    }

    def stays(parameter: Parameter, inside: bool) -> bool:
        if not spec.reshard_after_forward:
            return True
        in_root = spec.wrap == "model" or not inside
        return in_root and not spec.reshard_root and id(parameter) not in freed

    return stays


def _output_embeddings(network: Network) -> Module | None:
    """``get_output_embeddings``: none of a classifier or an embedding model."""
    path, _, name = network.head_name.rpartition(".")
    parent = network.child(path) if path else network
    return None if network.head_name == "score" else parent.children.get(name)


def is_adapted(network: Network) -> bool:
    """Whether blocks have adapters."""
    return any(p.added for stage in network.stages for p in stage.stack.parameters())


def _final_norm(network: Network, *, adapted: bool) -> Module | None:
    """``_find_final_norm``: the last norm among the base model's own children.

    With PEFT around a model whose base is called ``model`` it looks one module too high, and finds
    none.
    """
    base, inside, _ = network.embedding_names[0].partition(".")
    if adapted and base == "model":
        return None
    children = (network.child(base) if inside else network).children.values()
    norms = [module for module in children if "Norm" in type(module).__name__]
    return norms[-1] if norms else None
