"""Write what peft builds for the small configs and methods in tests/cases/adapters.

Each case file names a config and a list of methods; this fills in, for each method, how many
parameters peft trains, by full name and shape, or the class of the error with which it refuses.
The models are tiny: some adapters cannot be built on the meta device. Needs the trace extra::

    python tools/adapter_cases.py [name ...]           # write (all, or the named files)
    python tools/adapter_cases.py --check [name ...]   # exit 1 if a file would change
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ftplan.trace import build

CASES = Path(__file__).parents[1] / "tests/cases/adapters"


def configuration(method: dict[str, Any], task: str | None) -> Any:
    """peft's own configuration of a plan's method."""
    given = dict(method)
    kind = given.pop("kind")
    targets, rank = given.pop("targets", None), given.pop("rank", 16)
    tokens = given.pop("virtual_tokens", 20)
    common: dict[str, Any] = {"task_type": task, **given.pop("options", {})}
    if kind in build.FURTHER:
        return build.further(kind, rank, targets or "all-linear", None, common)
    if kind in ("prompt_tuning", "prefix_tuning", "p_tuning"):
        made = {
            "prompt_tuning": peft.PromptTuningConfig,
            "prefix_tuning": peft.PrefixTuningConfig,
            "p_tuning": peft.PromptEncoderConfig,
        }[kind]
        return made(**common, num_virtual_tokens=tokens)
    common |= {"modules_to_save": given.pop("modules_to_save", None)}
    if kind in ("ia3", "ln_tuning"):
        made = peft.IA3Config if kind == "ia3" else peft.LNTuningConfig
        return made(**common, target_modules=targets)
    common |= {"target_modules": targets or "all-linear"}
    common |= {"layers_to_transform": given.pop("layers_to_transform", None)}
    if kind in ("lora", "qlora", "dora"):
        dropout = given.pop("dropout", 0.0)
        dora = given.pop("use_dora", False) or kind == "dora"
        return peft.LoraConfig(**common, r=rank, lora_dropout=dropout, use_dora=dora, **given)
    if kind == "oft":
        blocks = {"r": method["rank"], "oft_block_size": 0} if "rank" in method else {}
        return peft.OFTConfig(**common, **blocks)
    if kind == "boft":
        return peft.BOFTConfig(**common)
    made = {"vera": peft.VeraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    return made(**common, r=rank)


def trained(config: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """Parameters that peft trains, or how it refuses."""
    settings = build.model_config(copy.deepcopy(config))
    family = build.family_of(settings)
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[family]
    task = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(family)
    model = auto.from_config(settings, dtype=torch.bfloat16)
    try:
        adapted = peft.get_peft_model(model, configuration(method, task))
    except (ValueError, TypeError, KeyError) as error:
        return {"refused": type(error).__name__}
    shapes = sorted([sorted(p.shape) for _, p in adapted.named_parameters() if p.requires_grad])
    counted: dict[str, int] = {}
    for shape in shapes:
        key = "x".join(map(str, shape))
        counted[key] = counted.get(key, 0) + 1
    total = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {"trained": total, "shapes": counted}


def filled(case: dict[str, Any]) -> dict[str, Any]:
    """The case with what peft does."""
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    results = [
        {"method": row["method"], **trained(case["config"], row["method"])}
        for row in case["methods"]
    ]
    return {"config": case["config"], "versions": versions, "methods": results}


def main(arguments: list[str]) -> int:
    """Write or check the case files."""
    warnings.simplefilter("ignore")
    names = [name for name in arguments if not name.startswith("-")]
    changed = 0
    for path in sorted(CASES.glob("*.json")):
        if names and path.stem not in names:
            continue
        text = path.read_text()
        made = json.dumps(filled(json.loads(text)), indent=1) + "\n"
        if made == text:
            continue
        changed += 1
        if "--check" in arguments:
            print(f"{path.name} would change: run python tools/adapter_cases.py {path.stem}")
        else:
            path.write_text(made)
    return 1 if changed and "--check" in arguments else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
