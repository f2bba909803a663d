"""Write tests/cases/tensor_ranks.json: what transformers leaves a rank of small models, cut in two.

Every small model of tests/cases is built without storage and cut by its own plan. Needs torch and
transformers; run it when a new version is followed::

    python tools/tensor_ranks.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

CASES = Path(__file__).parents[1] / "tests" / "cases"
RANKS = 2


def built(config: dict[str, Any]) -> Any:
    """The model on the meta device, with its image tower where it has one."""
    given = {name: value for name, value in config.items() if name != "model_type"}
    whole = CONFIG_MAPPING[config["model_type"]](**given)
    with torch.device("meta"):
        if "vision_config" in config:
            return AutoModelForImageTextToText.from_config(whole)
        return AutoModelForCausalLM.from_config(whole)


def left_on_a_rank(config: dict[str, Any], mesh: Any) -> int | str:
    """How many numbers a rank has, or why the library refuses."""
    try:
        model = built(config)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=RANKS))
    except ValueError as error:
        return "no plan" if "has no `tp_plan`" in str(error) else "no causal language model"
    except ImportError:
        return "not built here"
    if tied:  # the head is the table, which is cut once
        plan = {path: style for path, style in plan.items() if not path.startswith("lm_head")}
    apply_tensor_parallelism(model, mesh, plan)
    model.tie_weights()
    return sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())


def main() -> None:
    """All of them, one a line."""
    torch.distributed.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))
    lines = []
    for path in sorted((*CASES.glob("families/*.json"), *CASES.glob("mixtures/*.json"))):
        config = json.loads(path.read_text(encoding="utf-8")).get("config")
        if isinstance(config, dict):
            left = left_on_a_rank(config, mesh)
            lines.append(f"  {json.dumps(f'{path.parent.name}/{path.name}')}: {json.dumps(left)}")
    head = f'"transformers": "{transformers.__version__}", "ranks": {RANKS}, "left": {{\n'
    text = "{" + head + ",\n".join(lines) + "\n}}\n"
    (CASES / "tensor_ranks.json").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
