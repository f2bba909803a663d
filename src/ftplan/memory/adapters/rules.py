"""PEFT's rules: which modules an adapter wraps, layer by layer.

Source: peft 0.21.2, ``tuners/tuners_utils.py`` (``check_target_module_exists``,
``_maybe_include_all_linear_layers``), ``utils/other.py`` (``get_pattern_key``, ``_set_trainable``)
and ``utils/transformers_weight_conversion.py`` (``_convert_peft_config_moe``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory.adapters.defaults import CONVERTED, FUSED, IA3_FEEDFORWARD
from ftplan.memory.adapters.defaults import IA3_TARGETS as IA3
from ftplan.memory.adapters.defaults import LN_TARGETS as LN
from ftplan.memory.experts import Experts, Router
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module, Network

__all__ = ["Place", "Targeting", "matches", "named_layers", "rank_of", "targeting"]

LORA = ("lora", "qlora", "dora")
CLASSIFIERS = ("classifier", "score")
MASKED = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert",
    "albert", "mpnet", "deberta-v2",
)  # fmt: skip
FIRST_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class Place:
    """What happens to one module: wrapped with a rank, saved in full, a parameter adapted."""

    wrapped: bool = False
    """An adapter goes around the module."""
    rank: int = 0
    """Its rank, where the kind has one."""
    saved: bool = False
    """``modules_to_save``: a copy of the module is trained in full."""
    parameters: tuple[tuple[str, int], ...] = ()
    """Parameters of the module that are adapted by name, each with its rank."""


NOTHING = Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targeting:
    """A spec's targets after PEFT's own changes to them."""

    modules: tuple[str, ...] | str
    """Endings of names, or one regular expression for whole names."""
    linear_only: bool
    """`all-linear`, `attention`: other modules of that name are passed over."""
    parameters: tuple[str, ...]
    rank: int
    rank_pattern: Mapping[str, int]
    saved: tuple[str, ...]
    layers: tuple[int, ...] | None
    head: str
    attention: bool = False

    def place(self, name: str, module: Module) -> Place:
        """What the rules do with the module of that full name."""
        if any(name.endswith(key) for key in self.saved):
            return Place(saved=True)
        if any(re.match(rf"(^|.*\.){key}($|\..*)", name) for key in self.saved):
            return NOTHING  # inside a module that is saved
        wrapped = self._wraps(name, module)
        found = tuple(
            (own, rank_of(f"{name}.{own}", self.rank, self.rank_pattern))
            for own in sorted(module.parameters)
            if matches(f"{name}.{own}", self.parameters)
        )
        if not wrapped:
            return Place(parameters=found) if found else NOTHING
        rank = rank_of(name, self.rank, self.rank_pattern)
        return Place(wrapped=True, rank=rank, parameters=found)

    def _wraps(self, name: str, module: Module) -> bool:
        if self.linear_only and (not isinstance(module, Linear) or name == self.head):
            return False
        if self.attention:
            parents = name.lower().split(".")[:-1]
            return any("att" in part and "norm" not in part for part in parents)
        if self.modules == "all-linear":
            return True
        if not matches(name, self.modules):
            return False
        if self.layers is None or isinstance(self.modules, str) or name in self.modules:
            return True
        found = FIRST_LAYER.match(name)
        return found is not None and int(found["index"]) in self.layers

    @property
    def same_in_every_layer(self) -> bool:
        """No rule can tell one layer from another by its number."""
        endings = self.modules if isinstance(self.modules, tuple) else ()
        texts = (*endings, *self.rank_pattern, *self.saved, *self.parameters)
        regex = isinstance(self.modules, str) and self.modules != "all-linear"
        numbered = any(re.search(r"[\d\\\[{]", text) for text in texts)
        return not regex and not numbered and self.layers is None


def matches(name: str, targets: tuple[str, ...] | str) -> bool:
    """A string is a regular expression for the whole name, a list are names or their endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def rank_of(name: str, rank: int, patterns: Mapping[str, int]) -> int:
    """The rank of one module: ``rank_pattern`` by ending or regular expression, first match."""
    for pattern, own in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return own
    return rank


def named_layers(network: Network) -> Iterator[tuple[Module, str, str, Module]]:
    """(root, path below it, full name, module): the first layer of each kind, and all else."""
    for path, module in list(network.named_modules()):
        yield network, path, path, module
    for stage in network.stages:
        for kind, block in enumerate(stage.stack.kinds):
            layer = stage.stack.pattern.index(kind)
            for path, module in list(block.named_modules()):
                name = f"{stage.stack.name}.{layer}"
                yield block, path, f"{name}.{path}" if path else name, module


def targeting(
    network: Network, spec: AdapterSpec, model_type: str, *, classifies: bool
) -> Targeting:
    """The rules that hold for this adapter of this model. Raises UnsupportedError as PEFT does."""
    modules = _modules(network, spec, model_type)
    saved = (*spec.modules_to_save, *(CLASSIFIERS if classifies else ()))
    if spec.layers_to_transform is not None and isinstance(modules, str):
        raise UnsupportedError(
            f"layers_to_transform with targets {modules!r}",
            remedy="name the modules in a list, as [q_proj, v_proj]; PEFT asks for it too",
        )
    parameters, patterns = spec.target_parameters, dict(spec.rank_pattern)
    linear_only = modules in ("all-linear", "attention")
    attention = modules == "attention"
    if spec.kind in LORA and model_type in CONVERTED and not attention:
        modules, parameters, patterns = _converted(network, spec, modules, model_type)
        linear_only = False
    return Targeting(
        modules=modules,
        linear_only=linear_only,
        attention=attention,
        parameters=parameters,
        rank=spec.rank,
        rank_pattern=patterns,
        saved=saved,
        layers=spec.layers_to_transform,
        head=network.head_name,
    )


def _modules(network: Network, spec: AdapterSpec, model_type: str) -> tuple[str, ...] | str:
    given = spec.targets
    if spec.kind == "trainable_tokens" and given is None:
        return network.embedding_names[:1]
    own = {"ia3": IA3, "ln_tuning": LN}.get(spec.kind)
    if own is None:
        return given if given is not None else "all-linear"
    if given is None and model_type not in own:
        raise UnsupportedError(
            f"{spec.kind} without targets on model_type {model_type!r}",
            remedy="name the modules: PEFT has no default for this architecture",
        )
    return own[model_type] if given is None else given


def feedforward(spec: AdapterSpec, model_type: str) -> tuple[str, ...]:
    """IA3's feed-forward modules: endings of names, without a dot."""
    given = spec.options.get("feedforward_modules")
    if given is not None:
        if isinstance(spec.targets, tuple) and not set(given) <= set(spec.targets):
            raise UnsupportedError(
                f"ia3 with feedforward_modules {', '.join(given)} that are no targets",
                remedy="name them among the targets too; PEFT asks for it",
            )
        return tuple(given)
    if model_type not in IA3_FEEDFORWARD:
        raise UnsupportedError(
            f"ia3 on model_type {model_type!r}",
            remedy="use lora: PEFT does not know which modules are feed-forward ones here",
        )
    return IA3_FEEDFORWARD[model_type]


def _converted(
    network: Network, spec: AdapterSpec, modules: tuple[str, ...] | str, model_type: str
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Experts were layers before transformers 5: their names become names of parameters."""
    names = CONVERTED[model_type]
    if isinstance(modules, str):
        modules = _leaves(network, modules, names)
    rest, found = [], set()
    parameters = set(spec.target_parameters)
    patterns = dict(spec.rank_pattern)
    for target in modules:
        old = next((o for o in names if target == o or target.endswith(f".{o}")), None)
        if old is None:
            rest.append(target)
            continue
        parameters.add(names[old])
        found.add(old)
    for first, together in FUSED.items():
        present = found & set(together) if first in names else set()
        if present and len(present) < len(together):
            raise UnsupportedError(
                f"{', '.join(sorted(present))} without {', '.join(set(together) - present)}",
                remedy="target them together: transformers 5 fuses them into one parameter",
            )
        if present:
            patterns[rf".*\.{re.escape(names[first])}"] = spec.rank * len(together)
    return tuple(rest), tuple(sorted(parameters)), patterns


def _leaves(network: Network, targets: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """The last parts of the names that `all-linear` or a regular expression matches."""
    leaves: set[str] = set()
    everything = targets == "all-linear"
    for _, _, name, module in named_layers(network):
        leaf = name.rpartition(".")[2]
        if everything:
            if isinstance(module, Linear) and name != network.head_name:
                leaves.add(leaf)
            continue
        if matches(name, targets):
            leaves.add(leaf)
        for own in module.parameters:
            if matches(f"{name}.{own}", targets):
                leaves.add(own)
        if isinstance(module, Experts | Router):
            leaves |= {old for old in names if matches(f"{name}.{old}", targets)}
    return tuple(sorted(leaves | set(names) if everything else leaves))
