"""GPUs: rows are plausible and sourced, and every name a driver prints is found."""

from __future__ import annotations

import re

import pytest

from ftplan.catalog.gpus import GPUS, find_gpu, search_gpus
from ftplan.catalog.shelf import canonical
from ftplan.errors import AmbiguousNameError, UnknownNameError

GIB = 2**30


def test_rows_are_complete_and_canonically_named() -> None:
    """A name is lower case and ends in the label; every row has source, date and where its usable
    bytes come from."""
    names = [row.name for row in GPUS]
    assert len(names) == len(set(names)) >= 185
    for row in GPUS:
        assert re.fullmatch(rf"[a-z0-9-]+-{row.label_gb}gb", row.name), row.name
        assert row.source.startswith("https://") and len(row.date) == 10, row.name
        assert row.usable_source, row.name
        assert (row.vendor == "NVIDIA") == (row.compute_capability is not None), row.name


def test_usable_bytes_are_plausible_against_the_label() -> None:
    """A driver reports 88 to 100 % of the number on the box; unified memory is shared."""
    for row in GPUS:
        share = row.usable_bytes / (row.label_gb * GIB)
        low = 0.6 if row.unified_memory else 0.88
        assert low <= share <= 1, (row.name, share)
        if row.smi_bytes is not None:
            assert row.usable_bytes <= row.smi_bytes <= row.label_gb * GIB * 1.02, row.name


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("a100-80gb", 79.15), ("h100-80gb", 79.1), ("h200-141gb", 139.72), ("a10g-24gb", 22.06),
        ("t4-16gb", 14.74), ("l40s-48gb", 44.42), ("rtx-4090-24gb", 23.64),
        ("rtx-5090-32gb", 31.36),
        ("a100-40gb", 39.39), ("v100-16gb", 15.77), ("mi300x-192gb", 191.69),
        ("rtx-4060-laptop-8gb", 7.62), ("rtx-5070-ti-16gb", 15.47), ("gb200-186gb", 184.31),
        ("b300-288gb", 267.69), ("mi355x-288gb", 287.98), ("arc-a770-16gb", 15.11),
        ("jetson-thor-128gb", 122.8), ("m3-ultra-512gb", 464.0), ("m4-max-36gb", 27.0),
    ],
)  # fmt: skip
def test_usable_bytes_are_what_the_driver_reports(name: str, gib: float) -> None:
    """These are the totals that PyTorch prints on such a card, not the label."""
    assert round(find_gpu(name).usable_bytes / GIB, 2) == gib
    assert find_gpu(name).usable_from == "driver"


def test_most_totals_were_read_from_a_driver() -> None:
    """An estimate is the exception, and says of what."""
    read = [row for row in GPUS if row.usable_from == "driver"]
    assert len(read) >= 125 and len(read) > 2 * (len(GPUS.rows) - len(read))
    for row in GPUS:
        if row.usable_from == "estimated":
            assert re.search(r"less|as the|of memory|GiB|tiles", row.usable_source), row.name


def test_rates_are_dense_and_ordered() -> None:
    """FP8 is twice BF16 or equal, BF16 equals FP16, and both are at least FP32 where tensor cores
    exist; bandwidth is between 50 GB/s and 20 TB/s."""
    for row in GPUS:
        flops = row.flops
        assert flops and all(rate > 0 for rate in flops.values()), row.name
        if "bf16" in flops:
            assert flops["bf16"] == flops["fp16"], row.name
        if "fp8" in flops:
            assert 0.99 < flops["fp8"] / flops["bf16"] < 2.05, row.name
        assert 50e9 <= row.bandwidth_bytes_per_s <= 20e12, row.name
        assert row.interconnect.bytes_per_s > 0, row.name


def test_capability_decides_bf16_and_flash() -> None:
    """NVIDIA cards have bfloat16 and flash attention from capability 8.0."""
    for row in GPUS:
        if row.compute_capability is not None:
            ampere = float(row.compute_capability) >= 8
            assert row.supports_bf16 == row.supports_flash == ampere, row.name
    assert not find_gpu("t4").supports_flash and find_gpu("a10g").supports_flash


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("A100 80GB", "a100-80gb"),
        ("a100_40gb", "a100-40gb"), ("A100-80G", "a100-80gb"), ("Tesla T4", "t4-16gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"), ("rtx4090", "rtx-4090-24gb"),
        ("RTX 3090", "rtx-3090-24gb"), ("4090", "rtx-4090-24gb"), ("h100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H200", "h200-141gb"),
        ("a10g", "a10g-24gb"), ("NVIDIA L40S", "l40s-48gb"), ("A10G 24GB", "a10g-24gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"), ("NVIDIA RTX A6000", "rtx-a6000-48gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48gb"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx-4060-laptop-8gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"), ("H20 96GB", "h20-96gb"),
        ("Apple M3 Max 128GB", "m3-max-128gb"), ("gaudi3", "gaudi3-128gb"),
        ("NVIDIA Thor", "jetson-thor-128gb"), ("NVIDIA GB10", "dgx-spark-128gb"),
        ("NVIDIA GeForce RTX 5060 Laptop GPU", "rtx-5060-laptop-8gb"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "rtx-4000-ada-20gb"), ("Tesla K80", "k80-12gb"),
        ("Intel(R) Data Center GPU Max 1550", "max-1550-64gb"),
    ],
)  # fmt: skip
def test_names_that_drivers_and_people_use(spelling: str, name: str) -> None:
    """nvidia-smi's and PyTorch's product names, short names, and `_` or spaces for `-`."""
    assert find_gpu(spelling).name == name


def test_every_name_finds_its_own_row() -> None:
    """A canonical name is never ambiguous; an alias finds its row or names its candidates."""
    for row in GPUS:
        assert find_gpu(row.name) is row
        assert find_gpu(row.name.upper()) is row
        for alias in row.aliases:
            try:
                assert find_gpu(alias) is row, alias
            except AmbiguousNameError as error:
                assert row.name in error.candidates


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("a100", ("a100-40gb", "a100-80gb")),
        ("v100", ("v100-16gb", "v100-32gb")),
        ("RTX 4060 Ti", ("rtx-4060-ti-8gb", "rtx-4060-ti-16gb")),
        ("agx-orin", ("jetson-agx-orin-64gb", "jetson-agx-orin-32gb")),
    ],
)
def test_an_ambiguous_name_lists_its_candidates(name: str, candidates: tuple[str, ...]) -> None:
    """40 or 80 GB is never guessed."""
    with pytest.raises(AmbiguousNameError) as caught:
        find_gpu(name)
    assert caught.value.candidates == candidates
    assert all(candidate in str(caught.value) for candidate in candidates)


@pytest.mark.parametrize(("name", "near"), [("h1000", "h100"), ("rtx-4090-25gb", "rtx-4090-24gb")])
def test_an_unknown_gpu_gets_suggestions(name: str, near: str) -> None:
    """A slip of the keyboard names the nearest cards."""
    with pytest.raises(UnknownNameError) as caught:
        find_gpu(name)
    assert any(suggestion.startswith(near) for suggestion in caught.value.suggestions)


def test_apple_memory_is_marked_as_unified() -> None:
    """Unified memory is a flag, and only what Metal recommends of it is usable."""
    apple = search_gpus("apple")
    assert apple and all(row.unified_memory for row in apple)
    assert find_gpu("m1-max-64gb").usable_bytes == 48 * GIB


def test_canonical_keys_do_not_collide() -> None:
    """No alias of one row is the canonical name of another."""
    names = {canonical(row.name): row.name for row in GPUS}
    for row in GPUS:
        for alias in row.aliases:
            assert names.get(canonical(alias), row.name) == row.name, alias
