"""Write what transformers builds and keeps for the small configs in tests/cases/families.

Each case file has a config; this fills in the names and shapes of its weights and, where the case
lists ``modes``, the bytes that a step of the real classes has alive (on fake tensors): at the end
of forward, at the peak of forward, at the peak of backward, without the weights. Needs the trace
extra::

    python tools/family_cases.py [name ...]           # write (all, or the named files)
    python tools/family_cases.py --check [name ...]   # exit 1 if a file would change
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.trace import build, cuda
from ftplan.trace.ledger import Ledger

CASES = Path(__file__).parents[1] / "tests/cases/families"
MICRO, SEQ_LEN = 2, 192


def real_model(config: dict[str, Any], dtype: torch.dtype, attention: str) -> Any:
    """The class for the config's usual task, on the meta device."""
    settings = build.model_config(copy.deepcopy(config))
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[build.family_of(settings)]
    with torch.device("meta"):
        return auto.from_config(settings, dtype=dtype, attn_implementation=attention)


def inventory(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of all weights."""
    model = real_model(config, torch.float32, "eager")
    return {name: list(p.shape) for name, p in sorted(model.named_parameters())}


def traced(config: dict[str, Any], mode: str) -> list[int]:
    """Bytes above the weights: end of forward, peak of forward, peak of backward."""
    precision, attention = mode.split("/")
    dtype = torch.bfloat16 if precision in ("bf16", "frozen") else torch.float32
    model = real_model(config, dtype, attention).train()
    model.config.use_cache = False
    ledger = Ledger()
    if precision == "frozen":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    amp = torch.autocast("cpu", dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        build.materialize(model)
        with cuda.as_on_cuda(ledger, (8, 0), padded=False):
            ids = torch.zeros((MICRO, SEQ_LEN), dtype=torch.int64)
            start, first = ledger.live_bytes, ledger.clock
            with amp if precision == "amp" else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids)["loss"]
            end, middle = ledger.live_bytes - start, ledger.clock
            loss.backward()
            last = ledger.clock
    curve = ledger.curve()
    forward = max(live for clock, live in curve if first <= clock < middle) - start
    backward = max(live for clock, live in curve if middle <= clock < last) - start
    return [end, forward, backward]


def filled(case: dict[str, Any]) -> dict[str, Any]:
    """The case with what the real classes say."""
    modes = case.get("modes", [])
    return {
        "config": case["config"],
        "modes": modes,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__).partition("+")[0],
        "parameters": inventory(case["config"]),
        "traced": {mode: traced(case["config"], mode) for mode in modes},
    }


def rendered(case: dict[str, Any]) -> str:
    """JSON with one line for each weight and mode."""
    lines = []
    for key, value in case.items():
        if key in ("parameters", "traced"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}" if inner else f' "{key}": {{}}')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    """Write or check the named case files."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = [name for name in arguments if not name.startswith("--")]
    stale = 0
    for path in sorted(CASES.glob("*.json")):
        if names and path.stem not in names:
            continue
        text = rendered(filled(json.loads(path.read_text())))
        if "--check" in arguments:
            stale += text != path.read_text()
        else:
            path.write_text(text)
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
