"""What ZeRO-3 gathers: the coordinator by itself, and in the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.memory.coordinator import Coordinator, Running, Weight
from ftplan.memory.env import Environment
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import Tape
from ftplan.report import Report


def sized(**keys: Any) -> Report:
    """The answer to a plan, without remedies."""
    text = json.dumps({"version": 1, **keys})
    return estimate(parse_plan(parse_document(text, file="plan.json")), with_remedies=False)


def _weight(numel: int, *, stays: bool = False, frozen: bool = False) -> Weight:
    return Weight(numel, 2 * numel, 0, stays, frozen)


def _coordinator(trace: list[Running], **spec: Any) -> Coordinator:
    made = Coordinator(Tape(Environment()), ShardingSpec(kind="zero3", world=8, **spec), trace)
    made.gather_small({weight for running in trace for weight in running.weights})
    made.reset()
    return made


def _alive(coordinator: Coordinator) -> int:
    tape = coordinator._tape
    return sum(tape.sizes[number - 1][0] * times for number, times in coordinator.alive.items())


def test_a_module_has_its_weights_while_it_runs_and_the_next_ones_ahead() -> None:
    """Fetched alone: no buffer. Ahead: as many as it takes to reach the bucket. After: gone, where
    they are not wanted again soon."""
    first, second, third = (Running([_weight(10**9)]) for _ in range(3))
    coordinator = _coordinator(
        [first, second, third], prefetch_elements=1, max_live_elements=3 * 10**9
    )
    coordinator.fetch(first, forward=True)
    assert _alive(coordinator) == 2 * 2 * 10**9
    coordinator.release(first, forward=True)
    assert _alive(coordinator) == 2 * 10**9 and second.weights[0].flight


def test_what_comes_together_is_there_twice_until_all_of_it_was_asked_for() -> None:
    """A flat buffer of two weights stays beside both copies until the second module runs."""
    first, second = Running([_weight(100)]), Running([_weight(200)])
    start = Running([])
    coordinator = _coordinator([start, first, second], prefetch_elements=300)
    coordinator.fetch(start, forward=True)
    assert _alive(coordinator) == 600
    coordinator.fetch(first, forward=True)
    assert _alive(coordinator) == 600 + 600
    coordinator.fetch(second, forward=True)
    assert _alive(coordinator) == 600


def test_a_view_in_the_graph_outlives_the_release() -> None:
    """Bytes of a weight stay while the graph has a view of them, and it is gathered anew beside
    them (``x @ weight.T`` keeps the view, not the weight)."""
    one = Running([_weight(2 * 10**9)])
    far = Running([_weight(2 * 10**9)])
    coordinator = _coordinator([one, far, one], prefetch_elements=0)
    coordinator.fetch(one, forward=True)
    coordinator.keep(one.weights[0], True)
    coordinator.release(one, forward=True)
    assert _alive(coordinator) == 4 * 10**9
    coordinator.fetch(far, forward=True)
    coordinator.release(far, forward=True)
    coordinator.fetch(one, forward=False)
    assert _alive(coordinator) == 8 * 10**9
    coordinator.let_go(one.weights[0], False)
    assert _alive(coordinator) == 4 * 10**9


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@given(sizes, st.integers(0, 80), st.integers(1, 200), st.integers(0, 10))
def test_a_step_leaves_only_what_stays(
    numels: list[int], prefetch: int, live: int, small: int
) -> None:
    """Forward and back: never is a module without its weights, nothing dies that is not alive, and
    at the end there is what stays and what was in flight."""
    modules = [Running([_weight(n, stays=n <= small)]) for n in numels]
    coordinator = _coordinator(
        [*modules, *reversed(modules)], prefetch_elements=prefetch, max_live_elements=live
    )
    for forward, order in ((True, modules), (False, modules[::-1])):
        coordinator.in_backward = not forward
        for module in order:
            coordinator.fetch(module, forward=forward)
            assert all(w.here for w in module.weights)
            assert all(times >= 0 for times in coordinator.alive.values())
            coordinator.release(module, forward=forward)
    coordinator.leftovers()
    assert _alive(coordinator) == 2 * sum(n for n in numels if n <= small)


def test_a_forward_that_goes_another_way_throws_the_record_away() -> None:
    """Nothing is fetched ahead and everything goes with its module, small weights too, until one
    whole iteration has been recorded again."""
    first, second, third = (Running([_weight(100, stays=n == 0)]) for n in range(3))
    coordinator = _coordinator([first, second, third], prefetch_elements=100)
    ahead = []
    for way in ([first, third], [first, third], [first, third]):
        coordinator.reset()
        for module in way:
            coordinator.fetch(module, forward=True)
            ahead.append(sum(w.flight is not None for r in way for w in r.weights))
            coordinator.release(module, forward=True)
        if len(ahead) == 4:  # the first is still there when the record is thrown away
            assert _alive(coordinator) == 0
    # expected: the second; then another one came; then it is recorded; then followed
    assert ahead == [0, 0, 0, 0, 1, 0]


def test_what_stays_is_gathered_again_after_a_step() -> None:
    """``_post_step``: once, however often it was let go of."""
    small = _weight(10, stays=True)
    coordinator = _coordinator([Running([small])])
    coordinator.gather_small([small])
    assert _alive(coordinator) == 20
    coordinator.part_all([small])
    assert _alive(coordinator) == 0
    coordinator.gather_small([small])
    assert _alive(coordinator) == 20


ZERO3: dict[str, Any] = {
    "model": "llama-3.2-1b", "method": {"kind": "full"}, "gradient_checkpointing": True,
    "precision": {"weights": "bf16", "mixed": "no"}, "hardware": {"gpu": "h100-80gb", "count": 8},
}  # fmt: skip


def _peak(**sharding: Any) -> int:
    batch = {"micro": 1, "seq_len": 128}
    report = sized(**ZERO3, batch=batch, sharding={"kind": "zero3", **sharding})
    assert report.allocated_bytes is not None
    return report.allocated_bytes.expected


def test_fewer_live_weights_take_less() -> None:
    """``stage3_max_live_parameters`` bounds what is fetched ahead."""
    assert _peak(max_live_elements=100_000_000) < _peak(max_live_elements=1_000_000_000)


@pytest.mark.parametrize(
    "sharding",
    [
        {"kind": "fsdp"},
        {"kind": "fsdp", "version": 1},
        {"kind": "fsdp", "reshard_after_forward": False},
        {"kind": "zero3"},
        {"kind": "zero3", "max_live_elements": 50_000_000},
        {"kind": "zero2"},
        {"kind": "ddp"},
    ],
)
def test_evaluation_is_sized_however_weights_are_spread(sharding: dict[str, Any]) -> None:
    """A large evaluation is the worst moment, and no finding says that it was left out."""
    batch = {"micro": 1, "seq_len": 128, "eval_micro": 64}
    report = sized(**ZERO3, batch=batch, sharding=sharding)
    assert "MEM006" not in {finding.code for finding in report.findings}
    assert report.peak_phase == "evaluation"
    assert report.allocated_bytes and report.total() == report.allocated_bytes.expected
    assert not any(t.name.startswith("gradients/accum") for t in report.terms)


def test_weights_that_are_kept_after_forward_are_whole_in_an_evaluation() -> None:
    """Without resharding every block that has run stays gathered."""
    batch = {"micro": 1, "seq_len": 16, "eval_micro": 1}
    peaks = []
    for kept in (True, False):
        sharding = {"kind": "fsdp", "reshard_after_forward": not kept}
        report = sized(**ZERO3, batch=batch, sharding=sharding)
        peaks.append(next(p.peak_bytes for p in report.phases if p.name == "evaluation"))
    assert peaks[0] - peaks[1] > 10**9


TASK: dict[str, Any] = {
    **ZERO3, "model": "llama-3.1-8b", "stack": "trl", "sharding": {"kind": "zero3"},
    "precision": {"weights": "bf16", "mixed": "bf16"},
}  # fmt: skip
ROLLOUT = {"prompt_tokens": 256, "completion_tokens": 256}


def _phases(**keys: Any) -> dict[str, int]:
    report = sized(**{**TASK, "batch": {"micro": 1, "seq_len": 512}, **keys})
    assert report.allocated_bytes and report.total() == report.allocated_bytes.expected
    return {phase.name: phase.peak_bytes for phase in report.phases}


def test_a_reference_of_its_own_is_let_go_of_before_backward() -> None:
    """Beside a policy whose reference is known it costs its shards, and small weights that nothing
    parts, when it has run: its engine leaves nothing gathered."""
    with_it, without = _phases(task="dpo"), _phases(task="dpo", reference="precomputed")
    shards = 2 * 8_030_261_248 // 8
    for phase in ("backward", "step"):
        assert 0 <= with_it[phase] - without[phase] - shards < 0.002 * shards, phase


def test_adapters_that_are_off_keep_layers_gathered_to_the_end_of_backward() -> None:
    """The reference's forward through the same modules makes DeepSpeed forget what the policy's
    had still to come: no block ends backward, and all that were run again stay whole."""
    adapted = {"method": {"kind": "lora", "rank": 8}, "task": "dpo"}
    shared, known = _phases(**adapted), _phases(**adapted, reference="precomputed")
    layers = 2 * 31 * 218_103_808  # weights of all blocks but the first, whose input asks
    assert shared["backward"] - known["backward"] > 0.8 * layers


def test_grpo_has_no_record_for_backward_where_vllm_samples() -> None:
    """The policy's own log-probabilities come first (the correction of what vLLM says): with one
    micro batch a step nothing is fetched ahead on the way back; with two the second one's record
    serves from then on."""
    sampled = {"task": "grpo", "reference": "none", "rollout": {**ROLLOUT, "sampler": "server"}}
    own = {**sampled, "rollout": {**ROLLOUT, "sampler": "trainer"}}
    one, alone = _phases(**sampled), _phases(**own)
    two = _phases(**sampled, batch={"micro": 1, "seq_len": 512, "accumulation": 2})
    assert alone["backward"] - one["backward"] > 0.5e9
    assert two["backward"] - one["backward"] > 0.5e9


def test_ppo_gathers_policy_and_critic_to_generate() -> None:
    """TRL's wrapper around both is one engine: every rank has all weights of both while it
    samples, and parts of them in a step."""
    phases = _phases(task="ppo", rollout={**ROLLOUT, "sampler": "trainer"})
    both = 2 * 2 * (8_030_261_248 - 525_336_576)
    assert phases["rollout"] - phases["scoring"] > 0.7 * both
    more = _phases(
        task="ppo", rollout={**ROLLOUT, "sampler": "trainer"}, sharding={"kind": "zero2"}
    )
    assert more["step"] > phases["step"]


def test_ppo_under_fsdp_is_refused_with_the_reason() -> None:
    """TRL's loop calls what is inside the wrapper."""
    with pytest.raises(UnsupportedError, match="bare policy"):
        _phases(task="ppo", rollout={**ROLLOUT, "sampler": "trainer"}, sharding={"kind": "fsdp"})
