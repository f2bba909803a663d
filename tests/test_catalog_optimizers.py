"""Optimizers: every name a trainer writes is found, and states are those that were counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.catalog.optimizers import OPTIMIZERS, find_optimizer, search_optimizers
from ftplan.catalog.shelf import canonical
from ftplan.errors import UnknownNameError
from ftplan.memory.optimizer import OptimizerSpec, rounded, state_bytes
from ftplan.memory.tape import Parameter

# OptimizerNames of transformers 5.23.0
TRANSFORMERS = [
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo",
    "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd",
    "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
]  # fmt: skip

MEASURED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "cases" / "catalog" / "optimizer_states.json").read_text("utf-8")
)


# CustomSupportedOptimizers of axolotl 0.19.0
AXOLOTL = [
    "optimi_adamw", "ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8", "adopt_adamw", "adamc",
    "came_pytorch", "muon", "dion", "sinkgd", "polora", "flash_adamw", "flash_adam", "flash_sgd",
    "flash_sgdw", "flash_lion", "q_galore_adamw8bit",
]  # fmt: skip
# FinetuningArguments of LLaMA-Factory 0.9.5, and optimizers_map of ms-swift 4.6.0
FLAGS = ["use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"]
SWIFT = ["galore", "lorap", "muon", "muonclip", "multimodal"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_optim_name_of_transformers_is_a_row(name: str) -> None:
    """`--optim NAME` of the Trainer is the canonical name of a row."""
    assert find_optimizer(name).name == name


@pytest.mark.parametrize("name", [*AXOLOTL, *FLAGS, *SWIFT])
def test_every_name_of_other_trainers_is_found(name: str) -> None:
    """axolotl's `optimizer`, LLaMA-Factory's switches and ms-swift's `--optimizer`: none is
    refused, and what could not be run says so."""
    row = find_optimizer(name)
    assert row.measured or row.notes


@pytest.mark.trace
def test_the_list_of_optim_names_is_current() -> None:
    """The frozen list holds every OptimizerNames of the installed transformers."""
    training_args = pytest.importorskip("transformers.training_args")
    assert {name.value for name in training_args.OptimizerNames} <= set(TRANSFORMERS)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("adam", "adamw_torch_fused"), ("adamw", "adamw_torch_fused"),
        ("AdamW", "adamw_torch_fused"),
        ("sgd_momentum", "sgd_momentum"), ("torch.optim.AdamW", "adamw_torch"),
        ("torch.optim.SGD", "sgd"), ("bitsandbytes.optim.PagedAdamW", "paged_adamw_32bit"),
        ("bitsandbytes.optim.PagedAdamW8bit", "paged_adamw_8bit"),
        ("bitsandbytes.optim.AdamW8bit", "adamw_bnb_8bit"), ("ao_adamw_8bit", "adamw_torch_8bit"),
        ("ao_adamw_4bit", "adamw_torch_4bit"), ("ao_adamw_fp8", "ao_adamw_fp8"),
        ("optimi_adamw", "optimi_adamw"), ("came_pytorch", "came"), ("muon", "muon"),
        ("adopt_adamw", "adopt_adamw"), ("dion", "dion"), ("flash_adamw", "flash_adamw"),
        ("q_galore_adamw8bit", "q_galore_adamw8bit"), ("use_badam", "badam"),
        ("use_galore", "galore_adamw"), ("use_apollo", "apollo_adamw"),
        ("use_adam_mini", "adam_mini"), ("use_muon", "muon"), ("lion", "lion"),
        ("sophia", "sophia"), ("adam-mini", "adam_mini"), ("FusedAdam", "apex_fused_adam"),
        ("transformer_engine.pytorch.optimizers.fused_adam.FusedAdam", "apex_fused_adam"),
        ("flashoptim.FlashAdamW", "flash_adamw"), ("dion.Muon", "muon"),
        ("bitsandbytes.optim.PagedAdam8bit", "paged_adamw_8bit"),
        ("q_galore", "q_galore_adamw8bit"),
    ],
)  # fmt: skip
def test_trainers_spellings(spelling: str, name: str) -> None:
    """The spellings of torchtune, axolotl and LLaMA-Factory find their optimizer."""
    assert find_optimizer(spelling).name == name


def test_rows_are_complete() -> None:
    """Names and aliases are unique, each row has source, date and a step for its default."""
    seen: dict[str, str] = {}
    for row in OPTIMIZERS:
        for name in (row.name, *row.aliases):
            assert seen.setdefault(canonical(name), row.name) == row.name, name
        assert row.source.startswith("https://") and len(row.date) == 10, row.name
        assert row.implementation in row.steps, row.name
        assert set(row.step_counter_on_gpu) <= set(row.steps), row.name
        assert row.measured or row.notes or row.package in ("bitsandbytes", "torch_xla"), row.name
        assert row.others is None or find_optimizer(row.others), row.name
        assert (row.others is None) == (row.applies_to in ("all", "block")), row.name
    assert len(OPTIMIZERS.rows) >= 60


def test_measured_states_are_predicted_to_the_byte() -> None:
    """States counted while each optimizer ran are what the rows say, in blocks of 512 bytes."""
    assert len(MEASURED) == 207
    for case in MEASURED:
        row = find_optimizer(case["optimizer"])
        spec = OptimizerSpec(
            name=row.name,
            states=row.states,
            step=row.steps[row.implementation],
            rank=case["rank"],
        )
        parameter = Parameter("weight", tuple(case["shape"]), case["dtype"], True)
        counted = sum(rounded(size) for size in case["states"].values())
        # AdEMAMix keeps both averages in one tensor: at most one block fewer is rounded up
        slack = 512 if row.name.startswith("ademamix") else 0
        assert 0 <= state_bytes(spec, [(parameter, 1, True)]) - counted <= slack, case


def test_adamw_fused_needs_nothing_at_the_step_and_foreach_one_copy() -> None:
    """The step's temporaries: fused none, foreach a copy of all, loop two of one tensor."""
    row = find_optimizer("adamw")
    assert row.implementation == "fused"
    temporaries = {name: [*step.all, *step.current] for name, step in row.steps.items()}
    assert temporaries == {"fused": [0, 0, 0, 0], "foreach": [4, 2, 0, 0], "loop": [0, 0, 8, 4]}
    assert find_optimizer("adamw_torch").implementation == "foreach"


def test_muonclip_leaves_the_rest_to_momentum() -> None:
    """ms-swift's MuonClip keeps one state for every tensor: no AdamW for embeddings and head."""
    row = find_optimizer("muonclip")
    assert row.applies_to == "matrices" and row.others == "sgd_momentum"
    assert [state.name for state in find_optimizer(row.others).states] == ["momentum_buffer"]


def test_paged_and_in_backward_flags() -> None:
    """Paged states may leave the GPU; LOMO and layerwise variants keep no gradients."""
    for row in OPTIMIZERS:
        assert row.paged == row.name.startswith("paged_"), row.name
        if row.name.endswith("_layerwise") or row.name in ("lomo", "adalomo"):
            assert row.in_backward, row.name


def test_unknown_names_get_suggestions() -> None:
    """A slip of the keyboard names the nearest optimizers."""
    with pytest.raises(UnknownNameError) as caught:
        find_optimizer("adamw_tourch_fused")
    assert "adamw_torch_fused" in caught.value.suggestions


def test_search_holds_every_word() -> None:
    """`paged 8bit` finds the paged 8-bit optimizers and nothing else."""
    found = search_optimizers("paged 8bit")
    assert found and all("paged" in row.name and "8bit" in row.name for row in found)
    assert len(search_optimizers()) == len(OPTIMIZERS.rows)
