"""Write how many operations PyTorch counts in steps of the real classes, on fake tensors.

``torch.utils.flop_counter.FlopCounterMode`` watches one micro batch, forward and backward, of the
jobs below: the family of each is one of tests/cases/families, the model, the adapters and the
checkpoints are those of transformers and peft. Kernels that a trace has stand-ins for are counted
by PyTorch's own formulas for them. Needs the trace extra::

    python tools/flops_cases.py           # write tests/cases/flops.json
    python tools/flops_cases.py --check   # exit 1 if it would change
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import flop_counter

from ftplan.trace import build, core, cuda, quantized
from ftplan.trace.job import plan_from, resolve

ROOT = Path(__file__).parents[1]
CASES = [
    path
    for room in ("families", "mixtures")
    for path in (ROOT / "tests/cases" / room).glob("*.json")
]
FAMILIES = {path.stem: path for path in sorted(CASES)}
TARGET = ROOT / "tests/cases/flops.json"

BF16 = {"weights": "bf16"}
LORA = {"kind": "lora", "rank": 8, "targets": "all-linear"}
BATCH = {"micro": 2, "seq_len": 192}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "full": {"method": {"kind": "full"}, "precision": BF16},
    "lora checkpointed": {"method": LORA, "precision": BF16, "gradient_checkpointing": True},
}
"""Jobs of every family."""
SOMEWHERE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full checkpointed": (
        ("llama", "gemma2", "bert", "gpt2", "t5", "mixtral", "qwen3_next", "mamba2", "opt"),
        {"method": {"kind": "full"}, "precision": BF16, "gradient_checkpointing": True},
    ),
    "full, every other block": (
        ("llama", "phi"),
        {
            "method": {"kind": "full"},
            "precision": BF16,
            "gradient_checkpointing": {"kind": "full", "every": 2},
        },
    ),
    "full, reentrant": (
        ("llama", "gpt_neox"),
        {
            "method": {"kind": "full"},
            "precision": BF16,
            "gradient_checkpointing": {"kind": "full", "reentrant": True},
        },
    ),
    "full eager": (
        ("llama", "gemma2", "gpt2", "bert", "t5", "gpt_oss", "bloom"),
        {"method": {"kind": "full"}, "precision": BF16, "attention": "eager"},
    ),
    "full flash": (
        ("llama", "mistral"),
        {"method": {"kind": "full"}, "precision": BF16, "attention": "flash"},
    ),
    "full autocast": (
        ("llama", "gpt2", "bert", "mixtral"),
        {"method": {"kind": "full"}, "precision": {"weights": "fp32", "mixed": "bf16"}},
    ),
    "full padded": (
        ("llama", "qwen2", "t5"),
        {
            "method": {"kind": "full"},
            "precision": BF16,
            "batch": {**BATCH, "padding": "right"},
        },
    ),
    "last block": (
        ("llama", "gpt2", "t5"),
        {"method": {"kind": "partial", "last_layers": 1}, "precision": BF16},
    ),
    "lora": (("llama", "gpt2", "mixtral", "t5"), {"method": LORA, "precision": BF16}),
    "dora": (
        ("llama", "qwen3", "opt"),
        {"method": {**LORA, "kind": "dora"}, "precision": BF16},
    ),
    "dora checkpointed, dropout": (
        ("llama",),
        {
            "method": {**LORA, "kind": "dora", "dropout": 0.1},
            "precision": BF16,
            "gradient_checkpointing": True,
        },
    ),
    "qlora checkpointed": (
        ("llama", "gpt_neox", "falcon"),
        {
            "method": {**LORA, "kind": "qlora", "prepare_kbit": True},
            "precision": {"weights": "nf4", "mixed": "bf16"},
            "gradient_checkpointing": True,
        },
    ),
    "int8 lora": (
        ("llama",),
        {"method": LORA, "precision": {"weights": "int8", "mixed": "bf16"}},
    ),
    "loha": (("llama",), {"method": {**LORA, "kind": "loha"}, "precision": BF16}),
    "lokr": (("llama",), {"method": {**LORA, "kind": "lokr"}, "precision": BF16}),
    "oft": (("llama",), {"method": {"kind": "oft"}, "precision": BF16}),
    "boft": (("llama",), {"method": {"kind": "boft"}, "precision": BF16}),
    "vera": (("llama",), {"method": {"kind": "vera", "rank": 64}, "precision": BF16}),
    "ia3": (("llama", "t5"), {"method": {"kind": "ia3"}, "precision": BF16}),
    "bitfit": (("gpt2", "bert"), {"method": {"kind": "bitfit"}, "precision": BF16}),
    "prompt tuning": (
        ("llama",),
        {"method": {"kind": "prompt_tuning", "virtual_tokens": 16}, "precision": BF16},
    ),
    "p-tuning": (
        ("llama",),
        {"method": {"kind": "p_tuning", "virtual_tokens": 16}, "precision": BF16},
    ),
    "prefix tuning": (
        ("llama",),
        {"method": {"kind": "prefix_tuning", "virtual_tokens": 16}, "precision": BF16},
    ),
    "chunked loss": (
        ("llama", "qwen3"),
        {"method": LORA, "precision": BF16, "loss": "chunked"},
    ),
    "dpo, the adapter off": (
        ("llama",),
        {
            "method": LORA,
            "precision": BF16,
            "task": "dpo",
            "loss": "full",
            "gradient_checkpointing": True,
        },
    ),
    "dpo, a second model": (
        ("llama", "qwen2"),
        {"method": {"kind": "full"}, "precision": BF16, "task": "dpo", "loss": "full"},
    ),
    "kto": (("llama",), {"method": LORA, "precision": BF16, "task": "kto", "loss": "full"}),
    "orpo": (("llama",), {"method": LORA, "precision": BF16, "task": "orpo", "loss": "full"}),
    "rewards": (("llama",), {"method": LORA, "precision": BF16, "task": "rm"}),
    "classes": (("llama", "bert"), {"method": LORA, "precision": BF16, "task": "classify"}),
}


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(family, name, plan) of every job."""
    for family in FAMILIES:
        for name, plan in EVERYWHERE.items():
            yield family, name, plan
    for name, (families, plan) in SOMEWHERE.items():
        for family in families:
            yield family, name, plan


def _grouped(a: Any, b: Any, *_args: Any, out_shape: Any = None, **_more: Any) -> int:
    """Rows sorted by expert, each times its expert's matrix; or both grouped by rows."""
    if len(b) == 3:
        return int(2 * a[0] * a[1] * b[2])
    return int(2 * a[0] * a[1] * b[1])


def _convolution_backward(
    grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **_more: Any
) -> int:
    """As many as forward for each of input and weight.

    PyTorch's own formula takes the weight gradient of a depthwise convolution for a dense one.
    """
    wanted = args[-1]
    once = flop_counter.conv_flop_count(x, weight, grad)
    return int(once * sum(wanted[:2]))


def _forward(ctx: Any, q: Any, k: Any, v: Any, *_more: Any) -> int:
    # a checkpoint lets what was saved be read once: the shapes are noted here
    ctx.counted_shapes = q.shape, _wide(q, k), _wide(q, v)
    count: int = flop_counter.sdpa_flop_count(*ctx.counted_shapes)
    return count


def _wide(q: Any, x: Any) -> tuple[int, ...]:
    return (*q.shape[:2], *x.shape[2:])


@contextlib.contextmanager
def counted(model: Any) -> Iterator[None]:
    """Count while the block runs; ``counted.total`` has the answer after it."""
    extra = [0]

    def watching(owner: Any, name: str, count: Any) -> Any:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            extra[0] += count(*args)
            return original(*args)

        return cuda.patched(owner, name, staticmethod(watched))

    def backward(ctx: Any, grad: Any) -> int:
        number: int = flop_counter.sdpa_backward_flop_count(grad.shape, *ctx.counted_shapes)
        return number

    def int8(_ctx: Any, x: Any, _bias: Any, state: Any, _ledger: Any) -> int:
        return int(2 * x.numel() * state.CB.shape[0])

    def experts(ctx: Any, x: Any, weight: Any, _ledger: Any) -> int:
        ctx.counted = _grouped(x.shape, weight.shape)
        return int(ctx.counted)

    def experts_back(ctx: Any, _grad: Any) -> int:
        return int(ctx.counted * sum(ctx.needs_input_grad[:2]))

    mapping = {
        torch.ops.aten._grouped_mm: _grouped,
        torch.ops.aten.convolution_backward: _convolution_backward,
    }
    with contextlib.ExitStack() as stack:
        for kind in (cuda._Flash, cuda._Efficient):
            stack.enter_context(watching(kind, "forward", _forward))
            stack.enter_context(watching(kind, "backward", backward))
        stack.enter_context(watching(cuda._GroupedMM, "forward", experts))
        stack.enter_context(watching(cuda._GroupedMM, "backward", experts_back))
        stack.enter_context(watching(quantized._Matmul8Bit, "forward", int8))
        mode = flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)
        stack.enter_context(mode)
        yield
        counted.total = mode.get_total_flops() + extra[0]  # type: ignore[attr-defined]


def _auto_class(original: Any, config: dict[str, Any]) -> Any:
    """A wrapper with a vision tower is no causal model to transformers."""
    from transformers import AutoModelForImageTextToText

    def auto_class(family: str, task: str) -> Any:
        if "vision_config" in config and task not in ("classify", "rm"):
            return AutoModelForImageTextToText
        return original(family, task)

    return auto_class


def count(family: str, plan: dict[str, Any]) -> int:
    """Operations of one micro batch."""
    config = json.loads(FAMILIES[family].read_text())["config"]
    data = {"model": family, "batch": BATCH, **plan}
    with cuda.patched(build, "auto_class", _auto_class(build.auto_class, config)):
        core.trace_job(resolve(plan_from(data)), config, around=counted)
    total: int = counted.total  # type: ignore[attr-defined]
    return total


def main() -> int:
    """Write or check."""
    wanted = [a for a in sys.argv[1:] if not a.startswith("-")]
    old = json.loads(TARGET.read_text()) if TARGET.exists() else {"cases": []}
    known = {(c["family"], c["name"]): c for c in old["cases"]}
    cases = []
    for family, name, plan in jobs():
        if wanted and family not in wanted and name not in wanted:
            if (family, name) in known:
                cases.append(known[family, name])
            continue
        try:
            operations: int | None = count(family, plan)
        except Exception as error:
            print(f"{family}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        cases.append({"family": family, "name": name, "plan": plan, "operations": operations})
    data = {"versions": core.versions(), "batch": BATCH, "cases": cases}
    if "--check" in sys.argv:
        return int(data != old)
    TARGET.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
