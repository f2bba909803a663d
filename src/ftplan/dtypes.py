"""Numeric formats: how many bytes a tensor of weights takes, to the byte.

A format stores values in a few bits each, and beside them what is needed to turn them back into
numbers: a scale (and a zero point) per block, per row or per tensor, sometimes quantised again
(double quantisation), sometimes an index per input feature. :meth:`Format.storages` lists the
tensors that a library really allocates for one weight, because an allocator rounds each of them.

What a format does not quantise (embeddings, output head, norms, biases, a router) stays in the
model's own dtype; :attr:`Format.unquantised` names it, and the calculator applies it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Literal

from ftplan.dataclass import dataclass
from ftplan.errors import FtplanError, UnknownNameError

__all__ = ["FORMATS", "Format", "Size", "find_format", "format_names"]

Size = int | Sequence[int]
"""A number of values, or the shape of a weight, output features before input features."""

Layout = Literal["plain", "flat", "groups", "row", "tensor", "tile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to store numbers."""

    name: str
    """Canonical name (`bf16`, `nf4`, `gptq-int4`)."""
    label: str
    """The name as papers write it."""
    kind: Literal["float", "integer", "quantised", "mixture"]
    """`quantised`: needs more than its values. `mixture`: several formats in one file."""
    bits: Fraction
    """Bits of one stored value, scales not counted; of a mixture its published average."""
    source: str
    """Where the layout is documented."""
    layout: Layout = "plain"
    """What one scale covers: `flat` runs of values, `groups` of input features per output
    feature, an output `row`, the whole `tensor`, or a square `tile`."""
    block: int = 0
    """Values (`flat`, `groups`) or side (`tile`) that one scale covers."""
    scale_bits: int = 0
    """Bits of one scale."""
    zero_bits: int = 0
    """Bits of one zero point (or block minimum)."""
    nested_block: int = 0
    """Double quantisation: how many scales share one fp32 scale of their own."""
    index_bits: int = 0
    """Bits of an index kept per input feature (GPTQ's `g_idx`)."""
    tables: tuple[int, ...] = ()
    """Bytes of the small tensors kept once per weight: look-up tables, offsets, global scales."""
    interleaved: bool = False
    """Scales stand inside the blocks, in one tensor, as in GGUF."""
    expands_to: str | None = None
    """The dtype that values are expanded to for a matmul, unless the job says otherwise."""
    unquantised: tuple[str, ...] = ()
    """What keeps the model's own dtype: `embeddings`, `head`, `norms`, `biases`, `router`, or
    `all-but-experts`."""
    trainable: bool = False
    """Parameters in this format can take gradients."""
    aliases: tuple[str, ...] = ()
    """Other spellings, in lower case with `-` for `_`."""

    @property
    def itemsize(self) -> int:
        """Bytes of one value of a plain format. ``FtplanError`` for packed formats."""
        if self.layout != "plain" or self.bits % 8:
            raise FtplanError(
                f"{self.name} has no whole number of bytes per value",
                remedy="use a plain format: fp32, bf16 or fp16",
            )
        return int(self.bits // 8)

    @property
    def bits_per_value(self) -> Fraction:
        """Bits per value of a large weight, scales counted, what is kept once not counted.

        Per-row scales and per-feature indexes depend on the shape and are left out too.
        """
        if not self.block:
            return self.bits
        span = self.block * self.block if self.layout == "tile" else self.block
        nested = Fraction(32, span * self.nested_block) if self.nested_block else Fraction(0)
        return self.bits + Fraction(self.scale_bits + self.zero_bits, span) + nested

    def storages(self, size: Size) -> tuple[int, ...]:
        """Bytes of each tensor allocated for one weight of ``size``, the values first.

        A bare count is read as one row of that many input features, without the index that some
        formats keep per feature.
        """
        shape = (size,) if isinstance(size, int) else tuple(size)
        count = prod(shape)
        if self.layout == "plain":
            return (_bytes(count * self.bits),)
        rows = prod(shape[:-1])
        features = shape[-1] if shape else 1
        scales = self._scale_count(count, rows, features, shape)
        if self.interleaved:
            return (_bytes(scales * (self.block * self.bits + self.scale_bits + self.zero_bits)),)
        index = features * self.index_bits if len(shape) > 1 else 0
        parts = [
            _bytes(count * self.bits),
            _bytes(Fraction(scales * self.scale_bits)),
            _bytes(Fraction(scales * self.zero_bits)),
            _bytes(Fraction(_ceil(scales, self.nested_block) * 32)) if self.nested_block else 0,
            _bytes(Fraction(index)),
            *self.tables,
        ]
        return tuple(part for part in parts if part)

    def bytes_for(self, size: Size) -> int:
        """Bytes of one weight of ``size`` (a count or a shape), everything it needs included."""
        return sum(self.storages(size))

    def nominal_bytes(self, count: int) -> int:
        """The textbook's sum: ``count`` values at :attr:`bits` each, scales not counted."""
        return _bytes(count * self.bits)

    def _scale_count(self, count: int, rows: int, features: int, shape: tuple[int, ...]) -> int:
        if self.layout == "flat":
            return _ceil(count, self.block)
        if self.layout == "groups":
            return rows * _ceil(features, self.block)
        if self.layout == "row":
            return rows
        if self.layout == "tile":
            matrices = prod(shape[:-2])
            height = shape[-2] if len(shape) > 1 else 1
            return matrices * _ceil(height, self.block) * _ceil(features, self.block)
        return 1


def _ceil(count: int, block: int) -> int:
    return -(-count // block)


def _bytes(bits: Fraction | int) -> int:
    return int(-(-bits // 8))


def _key(name: str) -> str:
    return name.strip().lower().removeprefix("torch.").replace("_", "-").replace(" ", "-")


_TORCH = "https://docs.pytorch.org/docs/stable/tensor_attributes.html#torch-dtype"
_BNB = (
    "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py"
)
_GGML = "https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h"
_GGUF_MIX = (
    "https://github.com/ggml-org/llama.cpp/blob/b8c1476e44cc1f3a1811613f65251cf779067636/"
    "examples/quantize/README.md"
)
_LINEAR_ONLY = ("embeddings", "head", "norms", "biases")
_QUANTISED_LINEAR = (*_LINEAR_ONLY, "router")


def _plain(
    name: str, label: str, bits: int, *aliases: str, integer: bool = False, trainable: bool = True
) -> Format:
    return Format(
        name=name,
        label=label,
        kind="integer" if integer else "float",
        bits=Fraction(bits),
        source=_TORCH,
        trainable=trainable,
        aliases=aliases,
    )


def _bitsandbytes(name: str, label: str, double: bool, *aliases: str) -> Format:
    # The 16-entry code, and with double quantisation a private 256-entry code and the fp32 mean
    # of the scales, are separate tensors of every quantised weight.
    return Format(
        name=name,
        label=label,
        kind="quantised",
        bits=Fraction(4),
        layout="flat",
        block=64,
        scale_bits=8 if double else 32,
        nested_block=256 if double else 0,
        tables=(64, 1024, 4) if double else (64,),
        expands_to="bf16",
        unquantised=_LINEAR_ONLY,
        source=_BNB,
        aliases=aliases,
    )


def _grouped(
    name: str, label: str, bits: int, block: int, source: str, *aliases: str, index: bool = False,
    zero_bits: int | None = None, stored_bits: Fraction | None = None,
) -> Format:  # fmt: skip
    return Format(
        name=name,
        label=label,
        kind="quantised",
        bits=stored_bits or Fraction(bits),
        layout="groups",
        block=block,
        scale_bits=16,
        zero_bits=bits if zero_bits is None else zero_bits,
        index_bits=32 if index else 0,
        expands_to="fp16",
        unquantised=_QUANTISED_LINEAR,
        source=source,
        aliases=aliases,
    )


def _gguf(name: str, bits: int, block: int, block_bytes: int, *aliases: str) -> Format:
    # ``block_bytes`` is the size of ggml's block struct; what is not values is scales and minima.
    return Format(
        name=f"gguf-{name}",
        label=name.upper().replace("-", "_"),
        kind="quantised",
        bits=Fraction(bits),
        layout="groups",
        block=block,
        scale_bits=block_bytes * 8 - block * bits,
        interleaved=True,
        expands_to="fp16",
        unquantised=("norms", "biases"),
        source=_GGML,
        aliases=(name, *aliases),
    )


def _gguf_mixture(name: str, hundredths_of_bits: int, *aliases: str) -> Format:
    return Format(
        name=f"gguf-{name}",
        label=name.upper().replace("-", "_"),
        kind="mixture",
        bits=Fraction(hundredths_of_bits, 100),
        expands_to="fp16",
        unquantised=("norms", "biases"),
        source=f"{_GGUF_MIX} (bits per weight of Llama 2 7B; other shapes differ by about 2 %)",
        aliases=(name, *aliases),
    )


_GPTQ = "https://github.com/ModelCloud/GPTQModel (qweight, qzeros, scales, g_idx)"
_AWQ = "https://github.com/casper-hansen/AutoAWQ (qweight, qzeros, scales)"
_HQQ = "https://github.com/mobiusml/hqq (group size 64, fp16 scale and zero per group)"
_OCP = "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf"
_TORCHAO = "https://github.com/pytorch/ao/tree/main/torchao/quantization"

FORMATS: tuple[Format, ...] = (
    _plain("fp64", "FP64", 64, "float64", "double", "f64"),
    _plain("fp32", "FP32", 32, "float32", "float", "f32", "single", "32bit", "32-bit"),
    _plain("tf32", "TF32 (stored as FP32)", 32, "tensorfloat32", "tfloat32"),
    _plain("bf16", "BF16", 16, "bfloat16", "brain-float", "bf16-true", "16bit", "16-bit"),
    _plain("fp16", "FP16", 16, "float16", "half", "f16", "16-true"),
    _plain("fp8", "FP8 (E4M3)", 8, "float8", "fp8-e4m3", "float8-e4m3fn", "float8-e4m3",
           "e4m3", "f8-e4m3", "fp8-e4m3fn", trainable=False),
    _plain("fp8-e5m2", "FP8 (E5M2)", 8, "float8-e5m2", "e5m2", "f8-e5m2", trainable=False),
    _plain("int64", "INT64", 64, "i64", integer=True, trainable=False),
    _plain("int32", "INT32", 32, "i32", integer=True, trainable=False),
    _plain("int16", "INT16", 16, "i16", integer=True, trainable=False),
    _plain("int8", "INT8 (values only)", 8, "i8", "8bit", "8-bit", integer=True, trainable=False),
    _plain("uint8", "UINT8", 8, "u8", integer=True, trainable=False),
    _plain("bool", "one-byte truth value", 8, integer=True, trainable=False),
    _plain("int4", "INT4 (values only)", 4, "i4", "uint4", "4bit", "4-bit", integer=True,
           trainable=False),
    _plain("int3", "INT3 (values only)", 3, "3bit", "3-bit", integer=True, trainable=False),
    _plain("int2", "INT2 (values only)", 2, "2bit", "2-bit", integer=True, trainable=False),
    Format(
        name="fp8-block", label="FP8 in 128 x 128 tiles", kind="quantised", bits=Fraction(8),
        layout="tile", block=128, scale_bits=32, expands_to="bf16", unquantised=_QUANTISED_LINEAR,
        source="https://huggingface.co/deepseek-ai/DeepSeek-V3 (weight_scale_inv, fp32)",
        aliases=("fp8-128x128", "finegrained-fp8", "fine-grained-fp8"),
    ),
    Format(
        name="fp8-row", label="FP8 with a scale per row", kind="quantised", bits=Fraction(8),
        layout="row", scale_bits=32, expands_to="bf16", unquantised=_QUANTISED_LINEAR,
        source=f"{_TORCHAO} (per-row float8 weights); fbgemm_fp8 of transformers",
        aliases=("fbgemm-fp8", "fp8-dynamic"),
    ),
    _bitsandbytes("nf4", "NF4", False, "bnb-nf4", "bnb.nf4", "normalfloat4"),
    _bitsandbytes("nf4-dq", "NF4, double quantisation", True, "bnb.nf4-dq", "nf4-double",
                  "nf4-double-quant", "bnb-nf4-dq"),
    _bitsandbytes("fp4", "FP4 (bitsandbytes)", False, "bnb-fp4", "bnb.fp4"),
    _bitsandbytes("fp4-dq", "FP4 (bitsandbytes), double quantisation", True, "bnb.fp4-dq",
                  "fp4-double-quant", "bnb-fp4-dq"),
    Format(
        name="bnb-int8", label="LLM.int8()", kind="quantised", bits=Fraction(8), layout="row",
        scale_bits=32, expands_to="fp16", unquantised=_LINEAR_ONLY,
        source="https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/"
        "nn/modules.py (Int8Params: int8 values, SCB fp32 per output row)",
        aliases=("llm-int8", "llm.int8", "llm.int8()", "bnb.int8", "bitsandbytes-int8",
                 "bnb-8bit"),
    ),
    Format(
        name="int8-row", label="INT8 with a scale per row", kind="quantised", bits=Fraction(8),
        layout="row", scale_bits=16, expands_to="bf16", unquantised=_QUANTISED_LINEAR,
        source=f"{_TORCHAO} (int8_weight_only; scales in the weight's dtype)",
        aliases=("int8-weight-only", "torchao-int8", "int8wo"),
    ),
    Format(
        name="mxfp4", label="MXFP4", kind="quantised", bits=Fraction(4), layout="groups", block=32,
        scale_bits=8, expands_to="bf16", unquantised=("all-but-experts",),
        source=f"{_OCP}; transformers Mxfp4Config (gpt-oss: experts only)", aliases=("mx-fp4",),
    ),
    Format(
        name="mxfp8", label="MXFP8", kind="quantised", bits=Fraction(8), layout="groups", block=32,
        scale_bits=8, expands_to="bf16", unquantised=_QUANTISED_LINEAR, source=_OCP,
        aliases=("mx-fp8",),
    ),
    Format(
        name="nvfp4", label="NVFP4", kind="quantised", bits=Fraction(4), layout="groups", block=16,
        scale_bits=8, tables=(4,), expands_to="bf16", unquantised=_QUANTISED_LINEAR,
        source="https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-"
        "low-precision-inference/ (E4M3 scale per 16 values, fp32 scale per tensor)",
        aliases=("nv-fp4",),
    ),
    _grouped("gptq-int4", "GPTQ, 4 bits, groups of 128", 4, 128, _GPTQ, "gptq", "gptq-4bit",
             "gptq-4bit-128g", index=True),
    _grouped("gptq-int8", "GPTQ, 8 bits, groups of 128", 8, 128, _GPTQ, "gptq-8bit", index=True),
    _grouped("gptq-int3", "GPTQ, 3 bits, groups of 128", 3, 128, _GPTQ, "gptq-3bit", index=True),
    _grouped("gptq-int2", "GPTQ, 2 bits, groups of 128", 2, 128, _GPTQ, "gptq-2bit", index=True),
    _grouped("awq-int4", "AWQ, 4 bits, groups of 128", 4, 128, _AWQ, "awq", "awq-4bit"),
    _grouped("hqq-int4", "HQQ, 4 bits, groups of 64", 4, 64, _HQQ, "hqq", "hqq-4bit",
             zero_bits=16),
    _grouped("hqq-int8", "HQQ, 8 bits, groups of 64", 8, 64, _HQQ, "hqq-8bit", zero_bits=16),
    _grouped("hqq-int3", "HQQ, 3 bits, groups of 64", 3, 64, _HQQ, "hqq-3bit", zero_bits=16,
             stored_bits=Fraction(32, 10)),
    _grouped("hqq-int2", "HQQ, 2 bits, groups of 64", 2, 64, _HQQ, "hqq-2bit", zero_bits=16),
    _grouped("int4-groups", "INT4 in groups of 128", 4, 128, f"{_TORCHAO} (int4_weight_only)",
             "int4-weight-only", "torchao-int4", "int4wo", zero_bits=16),
    _gguf("q4-0", 4, 32, 18),
    _gguf("q4-1", 4, 32, 20),
    _gguf("q5-0", 5, 32, 22),
    _gguf("q5-1", 5, 32, 24),
    _gguf("q8-0", 8, 32, 34),
    _gguf("q2-k", 2, 256, 84),
    _gguf("q3-k", 3, 256, 110),
    _gguf("q4-k", 4, 256, 144),
    _gguf("q5-k", 5, 256, 176),
    _gguf("q6-k", 6, 256, 210),
    _gguf("iq4-nl", 4, 32, 18),
    _gguf("iq4-xs", 4, 256, 136),
    _gguf("iq3-xxs", 3, 256, 98),
    _gguf("iq3-s", 3, 256, 110),
    _gguf("iq2-xxs", 2, 256, 66),
    _gguf("iq2-xs", 2, 256, 74),
    _gguf("iq2-s", 2, 256, 82),
    _gguf("iq1-s", 1, 256, 50),
    _gguf("iq1-m", 1, 256, 56),
    _gguf("tq1-0", 1, 256, 54),
    _gguf("tq2-0", 2, 256, 66),
    _gguf_mixture("q3-k-s", 350),
    _gguf_mixture("q3-k-m", 391),
    _gguf_mixture("q3-k-l", 427),
    _gguf_mixture("q4-k-s", 458),
    _gguf_mixture("q4-k-m", 484, "gguf"),
    _gguf_mixture("q5-k-s", 552),
    _gguf_mixture("q5-k-m", 568),
)  # fmt: skip


def _index() -> dict[str, Format]:
    names: dict[str, Format] = {}
    for form in FORMATS:
        for name in (form.name, *form.aliases):
            assert names.setdefault(_key(name), form) is form, f"two formats are called {name}"
    return names


_BY_NAME = _index()


def format_names() -> tuple[str, ...]:
    """The canonical names, in the order of the table."""
    return tuple(form.name for form in FORMATS)


def find_format(name: str) -> Format:
    """The format called ``name``, in any usual spelling (`torch.float16`, `Q4_K_M`, `4bit`).

    Raises ``UnknownNameError`` with the nearest names when there is none.
    """
    key = _key(name)
    if key in _BY_NAME:
        return _BY_NAME[key]
    near = difflib.get_close_matches(key, _BY_NAME, n=8, cutoff=0.6)
    suggestions = tuple(dict.fromkeys(_BY_NAME[match].name for match in near))[:3]
    raise UnknownNameError(
        "number format", name, suggestions=suggestions, remedy="formats: fp32, bf16, fp16, nf4 ..."
    )
