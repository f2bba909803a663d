"""A step from its first tensor to its last: the batch, the stages, the loss, the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import KeptStates
from ftplan.memory.blocks import ask_for_gradient, run_stage
from ftplan.memory.env import Environment
from ftplan.memory.families.native import Native
from ftplan.memory.families.native.base import without_bytes
from ftplan.memory.flat import Flat
from ftplan.memory.fsdp import Fsdp
from ftplan.memory.job import ShardingSpec
from ftplan.memory.log_probs import log_probs
from ftplan.memory.loss import classify_loss, compute_loss, model_outputs
from ftplan.memory.nn import Network, Shared
from ftplan.memory.pipeline import PipelineStage
from ftplan.memory.record import Recorder, Recording, States, run_backward
from ftplan.memory.tape import BATCH, ITEM_BYTES, TOKENS, Parameter, Played, Size, Tape, Tensor
from ftplan.memory.tasks import Objective
from ftplan.memory.zero import Zero, layout_of

__all__ = ["record_evaluation", "record_scoring", "record_serving", "record_step"]


def record_step(
    network: Network,
    env: Environment,
    *,
    checkpoint_every: int = 0,
    input_grads: bool = False,
    share: PipelineStage | None = None,
    accumulated: bool = False,
    ahead: int = 0,
    sharding: ShardingSpec | None = None,
    objective: Objective | None = None,
    step_of: Callable[[Parameter], int | None] | None = None,
) -> Recording:
    """Forward, loss and backward of one micro batch.

    ``checkpoint_every`` n > 0 recomputes every n-th block. ``input_grads`` makes the embedding's
    output ask for a gradient (``enable_input_require_grads``). ``share``: a rank's of a
    pipeline, where what enters may come from another rank, and what leaves go to one.
    ``accumulated``: gradients of earlier micro batches are there already. ``ahead``: further micro
    batches that the loop has fetched. ``sharding``: by FSDP or ZeRO. ``objective``: the task,
    where it is another one than a language model's own loss. ``step_of``: a hook that takes each
    parameter's gradient as it arrives (an optimizer that steps in backward), and needs so many
    bytes for it; None: it leaves the gradient.
    """
    recorder = Recorder(network, env)
    tape = recorder.tape
    tape.step_of = step_of
    received = share is not None and not share.first
    if input_grads and not received:
        _ask_for_input_grads(network)
    input_grads = input_grads or received
    if sharding is not None:
        sharded = _sharded(network, tape, sharding, accumulated=accumulated, objective=objective)
        if isinstance(sharded, Zero):
            sharded.input_grads = input_grads
        recorder.shard(sharded)
    elif isinstance(network, Native) or accumulated:
        _hold_gradients(network, tape, idle=not accumulated)
    if objective is not None and objective.before:
        _score_before(recorder, objective)
    if share is not None and share.buffered:
        _receive(recorder, share)
    batch = [*_inputs(tape), *network.inputs(tape)]
    further = [
        tape.tensor(t.rows * ahead, t.width, t.dtype, "batches ahead") for t in batch if ahead
    ]
    recorder.recording.batch = [*batch, *further, *network.tables(tape)]
    before = _left_over(recorder, objective, ahead) if objective is not None else []
    values = _run_critic(recorder, objective, accumulated) if objective is not None else []
    recorder.begin_root()
    recorder.order.append(recorder.cut("inputs"))
    shared = Shared(checkpointed=checkpoint_every > 0)
    x: Tensor | None = None
    if objective is not None and objective.all_states:
        recorder.states = States(recorder)
        if not checkpoint_every:  # transformers' GradientCheckpointingLayer turns the cache off
            _fill_cache(tape)
    for number, stage in enumerate(network.stages):
        if x is not None:
            shared.memory = x
        x = run_stage(recorder, stage, shared, checkpoint_every, input_grads and number == 0)
    assert x is not None
    if share is not None and not share.last:
        if (
            not share.buffered
        ):  # Megatron lets go of what it has sent (``deallocate_output_tensor``)
            x = without_bytes(x, x.dtype)
        root = recorder.end_root(x)
        del x
        recorder.order.append(recorder.cut("the stage returns"))
        recorder.end_autocast()
    elif objective is None or objective.inside:
        states = [x]
        del x
        root, outputs = _loss(recorder, states, objective)
        if shared.memory is not None:  # ``encoder_last_hidden_state``
            outputs.append(shared.memory)
            shared.memory = None
        root = recorder.end_root(root)
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast(outputs)
    elif objective.kind == "weighted":
        recorder.recording.names_loss = True
        states = [x]
        del x
        own, held = _loss(recorder, states, objective)
        held = [recorder.end_root(held.pop()), own]
        del own
        shared.memory = None
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
        root = _task_loss(recorder, held, objective)
    elif objective.kind == "values":
        states = [x]
        del x
        held = [recorder.end_root(_values(recorder, states))]
        shared.memory = None
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
        root = objective.loss(network, held, _never)
    else:
        held = [x]
        del x
        held = _outputs(recorder, held, objective)
        shared.memory = None
        held.append(recorder.end_root(held.pop()))
        held += values
        values.clear()
        before.clear()
        if recorder.critic_states is not None:
            recorder.order.append(recorder.cut("the critic's outputs"))
            recorder.critic_states.drop()
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
        root = _task_loss(recorder, held, objective)
    recorder.recording.saved = _alive(tape)
    if root.requires_grad:
        run_backward(recorder, root)
    recorder.end_step(shared)
    return recorder.recording


def _receive(recorder: Recorder, share: PipelineStage) -> None:
    """Buffers for what other ranks send: those of inputs that have come are block inputs.

    torch/distributed/pipelining/stage.py 2.13: ``_prepare_forward_infra`` and
    ``_setup_backward_recv_info`` make one for each micro batch.
    """
    count = 0 if share.first else share.micro_batches - share.in_flight
    count += 0 if share.last else share.micro_batches
    table = recorder.network.child(recorder.network.embedding_names[0]).weight  # type: ignore[attr-defined]
    size = TOKENS * (table.shape[-1] * ITEM_BYTES[table.dtype] * count)
    with recorder.tape.scoped("temporary"):
        recorder.recording.buffers.append(recorder.tape.allocate(size, "receive buffers"))
    recorder.recording.once.append(recorder.cut("receive buffers"))


def _sharded(
    network: Network,
    tape: Tape,
    spec: ShardingSpec,
    *,
    accumulated: bool,
    objective: Objective | None = None,
) -> Fsdp:
    if spec.kind == "fsdp":
        kind = Flat if spec.version == 1 else network.fsdp_kind or Fsdp
        return kind(tape, spec, accumulated=accumulated)
    layout = layout_of(network, spec, objective.critic if objective is not None else None)
    unseen = objective is not None and objective.unseen
    return Zero(tape, spec, layout, accumulated=accumulated, unseen=unseen)


def record_serving(network: Network, env: Environment) -> Recording:
    """One prompt through the model without a graph; logits of its last token only."""
    recorder = Recorder(network, env)
    tape = recorder.tape
    order = recorder.order
    with tape.no_grad():
        inputs = [tape.tensor(TOKENS, 1, "int64", "token ids")]
        order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        with tape.scoped("logits"):
            logits = network.head(x.alias(rows=BATCH))
            del logits, x
        order.append(recorder.cut("last logits"))
    recorder.end_autocast()
    recorder.recording.saved = _alive(tape)
    del inputs, shared
    return recorder.recording


def record_scoring(
    network: Network,
    env: Environment,
    completion: int,
    *,
    sharding: ShardingSpec | None = None,
    whole: bool = False,
) -> Recording:
    """A batch through a model without a graph, its hidden states kept; then log-probabilities.

    As PPO scores a rollout: with all logits of the reference, or a head of one number a token.
    ``sharding``: by ZeRO-3. ``whole``: the engine is called, not the modules in it.
    """
    recorder = Recorder(network, env)
    tape = recorder.tape
    if sharding is not None:
        recorder.shard(_sharded(network, tape, sharding, accumulated=False))
    recorder.states = States(recorder)
    _fill_cache(tape)
    with tape.no_grad():
        inputs = _inputs(tape)
        if whole:
            recorder.begin_root()
        recorder.order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            x = run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        with tape.scoped("logits"):
            logits = network.head(x)
            del x
            scores = log_probs(logits, completion, how="rows", scaled=True)
        recorder.order.append(recorder.cut("scores"))
        del logits, scores
    recorder.end_autocast()
    recorder.recording.saved = _alive(tape)
    del inputs
    if recorder.fsdp is not None:
        recorder.recording.gathered = recorder.fsdp.played()
    return recorder.recording


def record_evaluation(
    network: Network,
    env: Environment,
    *,
    sharding: ShardingSpec | None = None,
    trained: Played | None = None,
) -> Recording:
    """A batch that is evaluated: loss and logits without a graph, the logits kept for metrics.

    ``sharding``: by FSDP or ZeRO-3. ``trained``: what ZeRO-3 gathers in training.
    """
    # Liger leaves out the logits in training only (liger_kernel: skip_logits = self.training)
    loss = "full" if env.loss == "fused" else env.loss
    env = replace(env, training=False, keep_outputs=True, loss=loss)
    recorder = Recorder(network, env)
    tape = recorder.tape
    if sharding is not None:
        recorder.shard(_sharded(network, tape, sharding, accumulated=False))
    with tape.no_grad():
        inputs = [*_inputs(tape), *network.inputs(tape), *network.tables(tape)]
        recorder.begin_root()
        recorder.order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        states = [x]
        del x
        loss_value, outputs = _loss(recorder, states, None)
        loss_value = recorder.end_root(loss_value)
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast(outputs)
    recorder.recording.saved = _alive(tape)
    del inputs, loss_value
    recorder.end_step(shared, trained)
    return recorder.recording


def _ask_for_input_grads(network: Network) -> None:
    """``enable_input_require_grads``: what the word embedding returns asks for a gradient."""
    for name in network.embedding_names:
        embedding = network.child(name)
        if "prompt_encoder" in embedding.children:
            embedding = embedding.children["base_layer"]

        def asked(
            tape: Tape, rows: Size = TOKENS, forward: Callable[..., Any] = embedding.forward
        ) -> Tensor:
            out: Tensor = forward(tape, rows)
            if not out.requires_grad:
                ask_for_gradient(out)
            return out

        embedding.forward = asked
    for module in network.further_inputs():

        def asked_too(x: Tensor, forward: Callable[..., Any] = module.forward) -> Tensor:
            out: Tensor = forward(x)
            if not out.requires_grad:
                ask_for_gradient(out)
            return out

        module.forward = asked_too


def _hold_gradients(network: Network, tape: Tape, *, idle: bool = False) -> None:
    """Gradients of earlier micro batches: static bytes, added to in place.

    ``idle``: only those that nothing clears.
    """
    for _, parameter in network.all_parameters():
        if parameter.trainable and (parameter.idle or not idle):
            parameter.grad = tape.leaf(parameter)


def _inputs(tape: Tape) -> list[Tensor]:
    ring = tape.env.ring
    names = ["token ids", "labels"]
    names += ["padding mask"] if tape.env.padding_mask else []
    names += ["positions"] if tape.env.packed or ring > 1 else []
    names += ["shifted labels"] if ring > 1 else []
    rows = TOKENS * ring  # ``context_parallel`` makes buffers shorter, not their storages
    with tape.scoped("activations"):
        return [tape.tensor(rows, 1, "int64", name) for name in names]


def _alive(tape: Tape) -> set[int]:
    alive: set[int] = set()
    for event in tape.events:
        alive.add(event) if event > 0 else alive.discard(-event)
    return alive


def _left_over(recorder: Recorder, objective: Objective, ahead: int) -> list[Tensor]:
    """What PPO's loop still names when a micro batch begins.

    The scores of the rollout, always; after another micro batch of the same step its outputs,
    until the model has run, and the softmax of its logits, until the next one is made.
    """
    if not objective.all_states:
        return []
    tape, recording = recorder.tape, recorder.recording
    network, steps = recorder.network, ahead + 1
    vocabulary = network.head_parameters()[0].shape[0]
    computed = tape.env.autocast or network.head_parameters()[0].dtype
    dtype = "fp32" if tape.env.outputs_to_fp32 else computed
    rows = BATCH * objective.completion
    with tape.scoped("logits"):
        recording.batch.append(tape.tensor(rows * steps, vocabulary, "fp32", "scores"))
        if not ahead:
            return []
        recording.batch.append(tape.tensor(rows, vocabulary, dtype, "softmax of the last batch"))
        layers = sum(stage.stack.count for stage in network.stages)
        hidden = network.head_parameters()[0].shape[-1]
        return [
            tape.tensor(TOKENS, vocabulary, dtype, "outputs of the last batch"),
            tape.tensor(TOKENS, hidden * (layers + 1), dtype, "outputs of the last batch"),
        ]


def _fill_cache(tape: Tape) -> None:
    """PPO's trainer is no Trainer: nobody turns the models' caches off."""
    if tape.prefix is None:
        tape.prefix = KeptStates()


def _run_critic(recorder: Recorder, objective: Objective, accumulated: bool) -> list[Tensor]:
    """The value of every token, with a graph of its own; its hidden states go before the policy's
    outputs are there."""
    critic = objective.critic
    if critic is None:
        return []
    if accumulated and recorder.fsdp is None:
        _hold_gradients(critic, recorder.tape)
    shared = Shared()
    x: Tensor | None = None
    states = recorder.states = States(recorder)
    _fill_cache(recorder.tape)
    with recorder.apart(critic, beside=True, trained=True):
        recorder.begin_root()
        for stage in critic.stages:
            x = run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        values = recorder.end_root(critic.head(x))
    del x
    recorder.critic_states = states
    recorder.order.append(recorder.cut("values"))
    return [values]


def _loss(
    recorder: Recorder, states: list[Tensor], objective: Objective | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the logits, as the model class computes them inside its forward.

    ``states`` holds the last hidden states, which go when that forward returns.
    """
    tape = recorder.tape
    logits: Tensor | None
    with tape.scoped("logits"):
        x = states.pop()
        if objective is not None and objective.kind == "labels":
            loss, logits = classify_loss(recorder.network, x)
        else:
            loss, logits = compute_loss(recorder.network, x)
        del x
    outputs = [] if logits is None else [logits]
    del logits
    recorder.order.append(recorder.cut("loss"))
    return loss, outputs


def _values(recorder: Recorder, states: list[Tensor]) -> Tensor:
    """A number a token, out of a wrapper that computes logits and their loss and casts the logits.

    trl/models/modeling_value_head.py 0.24; the trainer names the loss until its own returns.
    """
    tape = recorder.tape
    with tape.scoped("logits"):
        x = states.pop()
        loss, logits = compute_loss(recorder.network, x)
        values = recorder.network.values(x)
        cast = ops.to(logits, "fp32") if logits is not None else None
        if tape.env.outputs_to_fp32:
            values = ops.to(values, "fp32")
        recorder.order.append(recorder.cut("values"))
        assert recorder.states is not None
        recorder.states.drop()
        del x, logits, cast, loss
    return values


def _never(_network: Network) -> Tensor:
    raise AssertionError("no other network runs")


def _outputs(recorder: Recorder, states: list[Tensor], objective: Objective) -> list[Tensor]:
    """What the model returns where the loss is computed outside it; it empties ``states``."""
    network = recorder.network
    with recorder.tape.scoped("logits"):
        if isinstance(network, Native):
            outputs = network.returned(network.outputs(states.pop()))
        else:
            scored = 0 if objective.all_states else objective.completion
            x = states.pop()
            outputs = [model_outputs(network, x, scored, states=objective.states)]
            del x
    recorder.order.append(recorder.cut("logits"))
    return outputs


def _task_loss(recorder: Recorder, held: list[Tensor], objective: Objective) -> Tensor:
    """The trainer's loss function: it holds the model's outputs until it returns."""
    tape, recording = recorder.tape, recorder.recording
    recorder.order = recording.tail_order
    with tape.scoped("logits"):
        if tape.env.outputs_to_fp32:
            held[0] = ops.to(held[0], "fp32")
    if recorder.states is not None:
        recorder.states.return_them()

    def again(network: Network) -> Tensor:
        recorder.order.append(recorder.cut("the policy's part"))
        return _run_again(recorder, network, objective)

    with tape.scoped("logits"):
        loss = objective.loss(recorder.network, held, again)
    if tape.env.keep_outputs:
        recording.outputs += held
    if recorder.states is not None:  # the names of the loop's body outlive the optimizer's step
        recording.batch += held
    held.clear()
    recorder.order.append(recorder.cut("the task's loss"))
    return loss


def _run_again(recorder: Recorder, network: Network, objective: Objective) -> Tensor:
    """Another network's outputs on the same batch; the caller has turned the graph off."""
    begun = len(recorder.order)
    with recorder.apart(network, beside=objective.beside):
        outputs = _run_forward(recorder, network, objective)
    recorder.order.append(recorder.cut("the other model's head"))
    recorder.drop_casts(begun)
    if recorder.tape.env.outputs_to_fp32:
        outputs = ops.to(outputs, "fp32")
    recorder.order.append(recorder.cut("the other model's logits"))
    return outputs


def _run_forward(recorder: Recorder, network: Network, objective: Objective) -> Tensor:
    """A network's outputs, as the loss takes them."""
    shared = Shared()
    x: Tensor | None = None
    with recorder.tape.scoped("activations"):
        recorder.begin_root()
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = run_stage(recorder, stage, shared, 0, False)
    assert x is not None
    outputs = model_outputs(network, x, objective.completion, states=objective.states)
    del x
    return recorder.end_root(outputs)


def _score_before(recorder: Recorder, objective: Objective) -> None:
    """Log-probabilities that are made before the step: a forward with nothing else alive.

    The policy's own need more than its forward in the step under ZeRO-3 alone, where an earlier
    step's record says what is kept for a way back.
    """
    recorder.order = recorder.recording.before_order
    with recorder.tape.no_grad(), recorder.tape.scoped("logits"):
        if objective.scores_itself and isinstance(recorder.fsdp, Zero) and recorder.fsdp.gathers:
            held = [_run_forward(recorder, recorder.network, objective)]
            recorder.order.append(recorder.cut("logits"))
            objective.scores(held.pop())
            recorder.order.append(recorder.cut("log-probabilities"))
        if objective.other is not None:
            held = [_run_again(recorder, objective.other, objective)]
            objective.scores(held.pop())
            recorder.order.append(recorder.cut("log-probabilities"))
    recorder.order = recorder.recording.forward_order
