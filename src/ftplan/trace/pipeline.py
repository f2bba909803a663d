"""One stage of a pipeline under PyTorch's own schedules, on fake tensors.

    python -m ftplan.trace.pipeline [--out validation/pipeline.json]

The stage has real transformers blocks of a llama-like model between real embeddings and head;
``torch.distributed.pipelining`` runs it for two steps over the fake process group, which carries
nothing. Shapes are given, so that no stage asks another for them.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftplan.dataclass import dataclass
from ftplan.trace import build, cuda
from ftplan.trace.core import _quiet, versions
from ftplan.trace.job import plan_from, resolve
from ftplan.trace.ledger import Ledger

__all__ = ["JOBS", "StageJob", "main", "trace_stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """A stage to run. ``layers`` is the whole model's depth, evenly cut."""

    model: str
    layers: int
    stages: int
    rank: int
    micro_batches: int
    micro: int
    seq_len: int
    checkpointed: bool = False
    schedule: str = "1f1b"


JOBS = (
    *(
        StageJob(
            model="llama-3.1-8b", layers=8, stages=4, rank=rank, micro_batches=8, micro=1,
            seq_len=1024,
        )
        for rank in (0, 1, 2, 3)
    ),
    *(
        StageJob(
            model="llama-3.1-8b", layers=8, stages=4, rank=rank, micro_batches=8, micro=2,
            seq_len=1024, checkpointed=True,
        )
        for rank in (0, 1, 3)
    ),
    *(
        StageJob(
            model="mistral-7b-v0.1", layers=8, stages=2, rank=rank, micro_batches=4, micro=1,
            seq_len=2048, schedule="gpipe",
        )
        for rank in (0, 1)
    ),
    StageJob(
        model="qwen3-8b", layers=6, stages=3, rank=1, micro_batches=3, micro=4, seq_len=512,
    ),
    StageJob(
        model="llama-2-7b", layers=8, stages=8, rank=0, micro_batches=16, micro=1, seq_len=2048,
        checkpointed=True,
    ),
)  # fmt: skip


class _Stage(nn.Module):
    """The blocks of one stage, with what stands before and after them."""

    def __init__(self, model: Any, job: StageJob) -> None:
        super().__init__()
        each = job.layers // job.stages
        inner = model.model
        self.checkpointed = job.checkpointed
        self.embedding = inner.embed_tokens if job.rank == 0 else None
        self.blocks = nn.ModuleList(inner.layers[job.rank * each : (job.rank + 1) * each])
        self.rotary = inner.rotary_emb
        last = job.rank == job.stages - 1
        self.norm = inner.norm if last else None
        self.head = model.lm_head if last else None

    def forward(self, x: Any) -> Any:
        hidden = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        shared = {
            "position_embeddings": self.rotary(hidden, positions), "attention_mask": None,
        }  # fmt: skip
        for block in self.blocks:
            hidden = self._run(block, hidden, shared)
        return hidden if self.head is None else self.head(self.norm(hidden))

    def _run(self, block: Any, hidden: Any, shared: dict[str, Any]) -> Any:
        if self.checkpointed:
            out = torch.utils.checkpoint.checkpoint(
                block, hidden, use_reentrant=False, preserve_rng_state=False, **shared
            )
        else:
            out = block(hidden, **shared)
        return out[0] if isinstance(out, tuple) else out


def _loss(logits: Any, labels: Any) -> Any:
    flat = logits.float().view(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, labels.view(-1))


def trace_stage(job: StageJob, config: dict[str, Any]) -> int:
    """The most that is alive while the second step's micro batches run, in bytes."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    plan = {
        "model": job.model, "method": {"kind": "full"}, "stack": "pytorch",
        "batch": {"micro": job.micro, "seq_len": job.seq_len},
    }  # fmt: skip
    resolved = resolve(plan_from(plan))
    ledger = Ledger()
    dist.init_process_group("fake", rank=job.rank, world_size=job.stages, store=FakeStore())
    try:
        with _quiet():
            settings = build.model_config(config, job.layers)
            model = build.build_model(resolved, settings)
            stage = _Stage(model, job)
            del model
            gc.collect()
            with FakeTensorMode(allow_non_fake_inputs=True), ledger:
                build.materialize(stage)
                with cuda.as_on_cuda(ledger, resolved.capability):
                    _steps(job, stage, settings, ledger)
    finally:
        dist.destroy_process_group()
    begin = next(clock for clock, step, phase in ledger.marks if (step, phase) == (2, "run"))
    end = next(clock for clock, step, phase in ledger.marks if (step, phase) == (2, "step"))
    return max(live for clock, live in ledger.curve() if begin <= clock < end)


def _steps(job: StageJob, module: Any, settings: Any, ledger: Ledger) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    from torch.distributed.pipelining.stage import InferenceMode

    def example(width: int) -> Any:
        return torch.empty(job.micro, job.seq_len, width, dtype=torch.bfloat16, device="meta")

    first, last = job.rank == 0, job.rank == job.stages - 1
    hidden = settings.hidden_size
    ids = torch.zeros(job.micro * job.micro_batches, job.seq_len, dtype=torch.int64)
    entry = torch.zeros(job.micro, job.seq_len, dtype=torch.int64, device="meta")

    class Static(PipelineStage):
        """A stage whose shapes are the given ones, whatever others vote."""

        _inference_mode = property(lambda _: InferenceMode.STATIC, lambda _, __: None)

    stage = Static(
        module, job.rank, job.stages, torch.device("cpu"),
        input_args=(entry if first else example(hidden),),
        output_args=example(settings.vocab_size if last else hidden),
        input_grads=(None,) if first else (example(hidden),),
        output_grads=(None,) if last else (example(hidden),),
    )  # fmt: skip
    kind = Schedule1F1B if job.schedule == "1f1b" else ScheduleGPipe
    schedule = kind(stage, job.micro_batches, loss_fn=_loss)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for step in (1, 2):
        ledger.enter("run", step)
        targets = {"target": ids} if last else {}
        schedule.step(*((ids,) if first else ()), **targets, return_outputs=False)
        ledger.enter("step", step)
        optimizer.step()
        ledger.enter("zero_grad", step)
        optimizer.zero_grad()
    ledger.enter("end", 3)


def main() -> None:
    """Trace the stages and write what was found."""
    from ftplan.trace.bench import catalogue

    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.pipeline", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("validation/pipeline.json"))
    options = parser.parse_args()
    configs = catalogue()
    rows = []
    for job in JOBS:
        peak = trace_stage(job, configs[job.model])
        print(f"{job}: {peak:,}", file=sys.stderr, flush=True)
        rows.append({**asdict(job), "allocated_bytes": peak})
    document = {"versions": versions(), "jobs": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
