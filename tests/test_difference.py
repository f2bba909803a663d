"""Two jobs side by side: what each change does, and the answer on one screen."""

from __future__ import annotations

from ftplan.difference import difference
from ftplan.front.comparing import steps_between
from ftplan.front.jobs import diff
from ftplan.render.difference import render, render_markdown
from ftplan.spec import Batch, Method, Model, Plan, Precision

LORA = Plan(
    model=Model(name="llama-3.1-8b"),
    method=Method(kind="lora"),
    precision=Precision(weights="bf16", mixed="bf16"),
    batch=Batch(micro=1, seq_len=4096),
)
QLORA = Plan(
    model=LORA.model,
    method=Method(kind="qlora"),
    precision=Precision(weights="nf4", mixed="bf16"),
    batch=LORA.batch,
)
"""huggingface/transformers' Trainer: QLoRA takes more than LoRA where sequences are long
(bitsandbytes-foundation/bitsandbytes#1569, meta-pytorch/torchtune#2255)."""


def test_steps_add_up_to_the_change() -> None:
    """One change after another leads from the first peak to the second, to the byte."""
    change = diff(LORA, QLORA)
    assert len(change.steps) >= 2
    assert sum(step.delta for step in change.steps) == change.totals[0].delta
    keys = {key.key for step in change.steps for key in step.keys}
    assert {"method.kind", "precision.weights", "method.prepare_kbit"} <= keys


def test_why_qlora_is_bigger_is_answered_on_one_screen() -> None:
    """The format saves, the k-bit preparation costs more: that is the first line of 40."""
    change = diff(LORA, QLORA)
    effects = {key.key: step.delta for step in change.steps for key in step.keys}
    assert effects["precision.weights"] < 0 < effects["method.prepare_kbit"]
    lines = render(change, width=80).splitlines()
    assert "more than" in lines[0] and "method.prepare_kbit" in lines[0]
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "One change after another" in render_markdown(change)


def test_keys_that_make_no_job_alone_change_together() -> None:
    """A quantised format without an adapter is no job: it changes with the method."""
    steps = steps_between(LORA, QLORA)
    together = next(s for s in steps if any(k.key == "precision.weights" for k in s.keys))
    assert "method.kind" in {key.key for key in together.keys}


def test_one_change_needs_no_steps() -> None:
    """Where one key differs, the totals say it."""
    longer = Plan(
        model=LORA.model, method=LORA.method, precision=LORA.precision,
        batch=Batch(micro=1, seq_len=2048),
    )  # fmt: skip
    assert steps_between(LORA, longer) == ()
    assert difference.__doc__
