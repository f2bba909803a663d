"""Numeric formats: bytes of one weight, to the byte, and names in every usual spelling."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.dtypes import FORMATS, Format, find_format, format_names
from ftplan.errors import FtplanError, UnknownNameError

SHAPES = st.lists(st.integers(min_value=1, max_value=700), min_size=1, max_size=3)
ALL = st.sampled_from(FORMATS)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp64", 64), ("fp32", 32), ("tf32", 32), ("bf16", 16), ("fp16", 16), ("fp8", 8),
        ("fp8-e5m2", 8), ("int8", 8), ("int4", 4),
        ("nf4", Fraction(9, 2)), ("fp4", Fraction(9, 2)),
        ("nf4-dq", Fraction(4) + Fraction(8, 64) + Fraction(32, 64 * 256)),
        ("mxfp4", Fraction(17, 4)), ("nvfp4", Fraction(9, 2)), ("mxfp8", Fraction(33, 4)),
        ("awq-int4", Fraction(4) + Fraction(16 + 4, 128)),
        ("gptq-int4", Fraction(4) + Fraction(16 + 4, 128)),
        ("gptq-int8", Fraction(8) + Fraction(16 + 8, 128)),
        ("hqq-int4", Fraction(9, 2)),
        ("gguf-q4-0", Fraction(9, 2)), ("gguf-q8-0", Fraction(17, 2)),
        ("gguf-q2-k", Fraction(21, 8)), ("gguf-q3-k", Fraction(55, 16)),
        ("gguf-q4-k", Fraction(9, 2)), ("gguf-q5-k", Fraction(11, 2)),
        ("gguf-q6-k", Fraction(105, 16)), ("gguf-iq4-xs", Fraction(17, 4)),
    ],
)  # fmt: skip
def test_bits_per_value_are_the_published_ones(name: str, bits: Fraction | int) -> None:
    """Scales, zero points and double quantisation counted, a large weight takes these bits."""
    assert find_format(name).bits_per_value == bits


def test_double_quantisation_is_4_127_bits() -> None:
    """QLoRA's figure: 4.127 bits a value."""
    assert round(float(find_format("nf4-dq").bits_per_value), 3) == 4.127


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("fp32", 40), ("bf16", 20), ("int8", 10), ("int4", 5)]
)
def test_the_textbooks_sums(name: str, gigabytes: int) -> None:
    """10e9 parameters are 40, 20, 10, 5 GB at 32, 16, 8, 4 bits."""
    assert find_format(name).bytes_for(10**10) == gigabytes * 10**9
    assert find_format(name).nominal_bytes(10**10) == gigabytes * 10**9


# bitsandbytes 0.50.2 on a CPU: bytes of each tensor of quantize_4bit's result.
BITSANDBYTES = [
    ("nf4", (64, 64), [2048, 256, 64]),
    ("nf4", (100, 37), [1850, 232, 64]),
    ("nf4", (3, 333), [500, 64, 64]),
    ("nf4-dq", (64, 64), [2048, 64, 4, 64, 1024, 4]),
    ("nf4-dq", (3, 333), [500, 16, 4, 64, 1024, 4]),
    ("nf4-dq", (4096, 128), [262144, 8192, 128, 64, 1024, 4]),
    ("bnb-int8", (100, 37), [3700, 400]),
]


@pytest.mark.parametrize(("name", "shape", "tensors"), BITSANDBYTES)
def test_bitsandbytes_tensors_to_the_byte(
    name: str, shape: tuple[int, ...], tensors: list[int]
) -> None:
    """Packed values, scales, their own scales and the look-up tables are what it allocates."""
    assert list(find_format(name).storages(shape)) == tensors
    assert find_format(name).bytes_for(shape) == sum(tensors)


def test_gptq_keeps_an_index_per_input_feature_and_awq_does_not() -> None:
    """GPTQ: 4-bit values, fp16 scales, packed zero points, an int32 index per input feature."""
    rows, features = 11008, 4096
    groups = rows * features // 128
    values = rows * features // 2
    assert find_format("awq").storages((rows, features)) == (values, groups * 2, groups // 2)
    assert find_format("gptq").storages((rows, features)) == (
        values, groups * 2, groups // 2, features * 4,
    )  # fmt: skip


@given(ALL, SHAPES)
@settings(deadline=None)
def test_a_weight_takes_at_least_its_values(form: Format, shape: list[int]) -> None:
    """Bytes are the sum of the tensors, never less than the packed values, and an integer."""
    count = prod(shape)
    total = form.bytes_for(shape)
    assert isinstance(total, int)
    assert total == sum(form.storages(shape))
    assert total >= ceil(count * form.bits / 8)


@given(ALL, st.integers(min_value=1, max_value=4096), st.integers(min_value=1, max_value=8))
@settings(deadline=None)
def test_more_rows_never_take_less(form: Format, features: int, rows: int) -> None:
    """A weight with one row more takes at least as many bytes."""
    assert form.bytes_for((rows + 1, features)) >= form.bytes_for((rows, features))


@given(ALL)
@settings(deadline=None)
def test_a_large_weight_approaches_its_bits_per_value(form: Format) -> None:
    """What is kept once, per row or per feature vanishes in a large weight."""
    side = 2**14
    bits = Fraction(form.bytes_for((side, side)) * 8, side * side)
    assert abs(bits - form.bits_per_value) < Fraction(1, 100)


def test_every_format_says_where_its_layout_is_documented() -> None:
    """Name, source and what is left unquantised are there; names are canonical and unique."""
    names = format_names()
    assert len(names) == len(set(names)) >= 40
    for form in FORMATS:
        assert form.source.startswith("https://"), form.name
        assert form.name == form.name.lower() and "_" not in form.name
        assert form.kind in ("float", "integer") or form.unquantised, form.name
        assert form.trainable <= (form.kind == "float"), form.name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("float16", "fp16"), ("half", "fp16"), ("torch.float16", "fp16"), ("FP16", "fp16"),
        ("bfloat16", "bf16"), ("torch.bfloat16", "bf16"), ("float", "fp32"), ("32-bit", "fp32"),
        ("float8_e4m3fn", "fp8"), ("4bit", "int4"), ("int4", "int4"), ("8-bit", "int8"),
        ("NF4", "nf4"), ("bnb.nf4-dq", "nf4-dq"), ("GPTQ", "gptq-int4"), ("awq_int4", "awq-int4"),
        ("Q4_K_M", "gguf-q4-k-m"), ("Q8_0", "gguf-q8-0"), ("llm.int8()", "bnb-int8"),
    ],
)  # fmt: skip
def test_usual_spellings(spelling: str, name: str) -> None:
    """Torch's, Hugging Face's, trainers' and llama.cpp's spellings find the format."""
    assert find_format(spelling).name == name


@given(ALL)
@settings(deadline=None)
def test_every_name_and_alias_finds_its_format(form: Format) -> None:
    """Letter case and `_` for `-` do not matter."""
    for name in (form.name, *form.aliases):
        assert find_format(name) is form
        assert find_format(f" {name.upper().replace('-', '_')} ") is form


def test_an_unknown_format_gets_suggestions() -> None:
    """A slip of the keyboard names the nearest formats."""
    with pytest.raises(UnknownNameError) as caught:
        find_format("bf61")
    assert "bf16" in caught.value.suggestions
    with pytest.raises(UnknownNameError):
        find_format("")


def test_a_packed_format_has_no_item_size() -> None:
    """Only plain formats have whole bytes per value; others refuse."""
    assert find_format("bf16").itemsize == 2
    for name in ("nf4", "int4", "gguf-q4-k-m"):
        with pytest.raises(FtplanError):
            _ = find_format(name).itemsize
