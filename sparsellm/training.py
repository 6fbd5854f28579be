"""Training of a language model that survives being killed: the same command continues it, with the same bits.

All of a run's state is the parameters, the optimizer's moments and the step; batches are a pure function of the step
(`text.ShuffledBatches`). A checkpoint appears under its name only when it is whole.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int32
from orbax.checkpoint import v1 as ocp

from sparsellm import determinism
from sparsellm.checkpoint import no_space, quiet
from sparsellm.objectives import Objective, next_token_objective

COMPILER_OPTIONS = determinism.COMPILER_OPTIONS | {
    # By cuBLAS alone, which adds biases and takes ReLUs within its products: of OPT-125M's step on an H200, 5%.
    "xla_gpu_enable_triton_gemm": False,
    # Products that share an operand stay apart: their operands are not copied together, nor their results apart. 1%.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with linear warm-up, cosine decay to a tenth, and clipping by global norm.

    Attributes:
        steps: optimizer steps in all.
        batch: windows a step.
        accumulate: micro-batches that a step's batch is cut into, whose gradients are added up: the memory of
            activations and logits is that of one of them. Must divide `batch`.
        learning_rate: at the end of the warm-up.
        warmup_steps: from 0 to the full learning rate.
        weight_decay: on matrices; biases and norms are left alone.
        clip_norm: largest global norm of a gradient.
        checkpoint_steps: steps from one checkpoint to the next: what a kill costs at most.
    """

    steps: int
    batch: int
    accumulate: int = 1
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_steps: int = 50

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch; got accumulate={self.accumulate}, batch={self.batch}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps must be less than steps; got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )


type Metrics = dict[str, int | float]


class TrainState(NamedTuple):
    """What a training step changes."""

    params: nnx.State
    opt_state: optax.OptState


@runtime_checkable
class Batches(Protocol):
    """Random access by step to windows of tokens, [batch, length + 1]."""

    def __getitem__(self, step: int) -> np.ndarray: ...


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The learning rate as a function of the step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )


@functools.cache  # jit knows it by identity: the same config compiles one step
def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW as `config` describes it."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b2=0.98,  # hundreds of steps, not hundreds of thousands
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "transformation", "objective", "accumulate"),
    donate_argnames="state",
    compiler_options=COMPILER_OPTIONS,
)
def train_step(
    graphdef: nnx.GraphDef,
    transformation: optax.GradientTransformation,
    state: TrainState,
    windows: Int32[Array, "batch length_plus_1"],
    objective: Objective = next_token_objective,
    *,
    step: Int[Array, ""] | int = 0,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step; `state` is donated.

    Args:
        graphdef: of the model (static).
        transformation: the optimizer (static).
        state: before the step.
        windows: inputs and, one further on, their targets.
        objective: what to minimise (static).
        step: the steps before this one, for an objective whose weights are scheduled.
        accumulate: micro-batches to go through one after the other (static); must divide the batch.

    Returns:
        The state after the step; the objective's metrics and the gradient's norm before it.
    """
    with determinism.distinct_calls():
        gradient, metrics = accumulated_gradient(
            graphdef, state.params, windows, objective, jnp.asarray(step, jnp.int32), accumulate
        )
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its int32 count
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(gradient)}
    params = cast(nnx.State, optax.apply_updates(state.params, updates))
    return TrainState(params, opt_state), metrics


def accumulated_gradient(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    windows: Int32[Array, "batch length_plus_1"],
    objective: Objective,
    step: Int[Array, ""],
    accumulate: int,
) -> tuple[nnx.State, dict[str, Float[Array, ""]]]:
    """The mean over micro-batches of the objective's gradient, added up in float32, and of its metrics.

    Args:
        graphdef: of the model.
        params: its parameters.
        windows: the batch.
        objective: what to minimise.
        step: the steps before this one.
        accumulate: how many micro-batches.

    Raises:
        ValueError: `accumulate` does not divide the batch.
    """
    if windows.shape[0] % accumulate:
        raise ValueError(f"accumulate must divide the batch; got accumulate={accumulate}, batch={windows.shape[0]}")

    def loss(params: nnx.State, windows: Int32[Array, "batch length_plus_1"]):
        return objective(nnx.merge(graphdef, params), windows, step)

    def add(total, windows):
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, windows)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), total, gradient), metrics

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, metrics = lax.scan(add, zero, windows.reshape(accumulate, -1, windows.shape[1]))
    gradient = jax.tree.map(lambda x, total: (total / accumulate).astype(x.dtype), params, total)
    return gradient, jax.tree.map(lambda values: values.mean(axis=0), metrics)


def train(
    model: nnx.Module,
    batches: Batches,
    config: TrainConfig,
    folder: str | Path,
    *,
    objective: Objective = next_token_objective,
    report: Callable[[Metrics], None] | None = None,
) -> list[Metrics]:
    """Trains `model` in place, from the last checkpoint in `folder` if there is one.

    Leaves `folder/checkpoints/<step>/` (the last two) and `folder/metrics.jsonl`, a line a step. Killed at any moment
    and called again with the same arguments, it ends with the same parameters and the same losses. Ended by an error or
    an interrupt instead, it leaves the model with the parameters of the last step; a call with this same model goes on
    from the last checkpoint, and where there is none begins anew with these.

    Args:
        model: maps tokens [batch, length] to logits [batch, length, vocab]; all its state is `nnx.Param`.
        batches: the windows of each step.
        config: how.
        folder: of this training run.
        objective: what to minimise; its metrics hold the "loss" that has to stay finite.
        report: called after every step with its metrics, and once with the last ones of a training that is continued.

    A checkpoint that cannot be read is said on stderr and removed, and the one before it continued.

    Returns:
        The metrics of every step from the first: step (from 1), the objective's (loss), gradient_norm, seconds (since
        the end of the step before).

    Raises:
        OSError: no disk space is left for a checkpoint (the one before it is kept).
        FloatingPointError: the loss is not finite.
        ValueError: no checkpoint in `folder` can be read.
    """
    folder = Path(folder).absolute()
    graphdef, params = nnx.split(model, nnx.Param)
    transformation = optimizer(config)
    state = TrainState(params, transformation.init(params))
    with _checkpointer(folder / "checkpoints") as checkpointer:
        done = 0
        if checkpointer.latest is not None:
            state, done = _restore(checkpointer, state)
        metrics = _continued_metrics(folder / "metrics.jsonl", done)
        if report and metrics:
            report(metrics[-1])
        with open(folder / "metrics.jsonl", "a") as file:
            journal = _Journal(file, metrics)
            running: tuple[int, dict[str, Array]] | None = None
            try:
                for step in range(done + 1, config.steps + 1):
                    state, values = train_step(
                        graphdef,
                        transformation,
                        state,
                        jnp.asarray(batches[step - 1]),
                        objective,
                        step=jnp.int32(step - 1),
                        accumulate=config.accumulate,
                    )
                    # A step is waited for while the next one runs: else the device is idle while the host prepares it.
                    before, running = running, (step, values)
                    rows = [] if before is None else [journal.finish(*before)]
                    if step % config.checkpoint_steps == 0 or step == config.steps:
                        rows, running = [*rows, journal.finish(*running)], None
                        file.flush()  # before the checkpoint: a checkpoint's metrics are always there
                        with uninterrupted():
                            checkpointer.save(step, _named(state))
                        journal.start = time.perf_counter()  # no step's time
                    if report:
                        for row in rows:
                            report(row)
            finally:  # what it had is donated: whatever ends the loop, it can be used
                nnx.update(model, state.params)
    return metrics


class _Journal:
    """Writes down what came of each step, and how long it took.

    Attributes:
        file: a line a step.
        metrics: of all steps so far.
        start: when the step before ended.
    """

    def __init__(self, file: IO[str], metrics: list[Metrics]):
        self.file, self.metrics, self.start = file, metrics, time.perf_counter()

    def finish(self, step: int, values: dict[str, Array]) -> Metrics:
        """Waits for a step; its row.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        row: Metrics = {"step": step, **{name: float(x) for name, x in jax.device_get(values).items()}}
        end = time.perf_counter()
        row["seconds"], self.start = end - self.start, end
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss must be finite; got {row['loss']} at step {step}")
        self.metrics.append(row)
        self.file.write(json.dumps(row) + "\n")
        return row


@contextlib.contextmanager
def _checkpointer(folder: Path) -> Iterator[ocp.training.Checkpointer]:
    """Opens a folder of checkpoints, without what an interrupted save has left in it."""
    try:
        with (
            quiet(),
            ocp.training.Checkpointer(
                str(folder),
                # Orbax's own policies do not match its own annotations.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore
                preservation_policy=ocp.training.preservation_policies.LatestN(2),  # pyright: ignore
                cleanup_tmp_directories=True,
            ) as checkpointer,
        ):
            yield checkpointer
    except Exception as error:
        if not no_space(error):
            raise
        for path in folder.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(path, ignore_errors=True)
        whole = max((int(path.name) for path in folder.glob("*")), default=None)
        kept = "there is none yet" if whole is None else f"the one of step {whole} is kept"
        sentence = (
            f"no disk space is left for a checkpoint in {folder} ({kept}): free some and run the same command again"
        )
        raise OSError(errno.ENOSPC, sentence) from error


def _named(state: TrainState) -> dict[str, jax.Array]:
    """The arrays by their path: what a checkpoint holds."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}


def _restore(checkpointer: ocp.training.Checkpointer, state: TrainState) -> tuple[TrainState, int]:
    """The latest checkpoint that can be read, in the place of `state`, and its step; later ones are removed.

    Raises:
        ValueError: none can be read; none is removed.
    """
    named = _named(state)
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in named.items()}
    damaged: list[tuple[int, Exception]] = []
    for step in sorted((found.step for found in checkpointer.checkpoints), reverse=True):
        try:
            arrays = checkpointer.load(step, like)
        except (jax.errors.JaxRuntimeError, MemoryError):  # the device's, the host's
            raise
        except Exception as error:  # Orbax raises no class of its own for a file that cannot be read
            damaged.append((step, error))
            continue
        for later, error in damaged:
            said = f"the checkpoint of step {later} cannot be read ({str(error)[:200]}): going on from that of {step}"
            print(said, file=sys.stderr, flush=True)
            checkpointer.delete(later)
        return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in named]), step
    latest, error = damaged[0]
    said = f"no checkpoint in {checkpointer.directory} can be read, that of step {latest} for {str(error)[:500]}"
    raise ValueError(f"{said}: is it of this model? Without the folder, training starts anew") from error


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back an interrupt or a termination until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # only that one is interrupted
        yield
        return
    held: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: held.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _continued_metrics(path: Path, done: int) -> list[Metrics]:
    """The metrics of the first `done` steps; those of steps that a kill has undone are removed from the file."""
    lines = path.read_text().splitlines()[:done] if path.exists() else []
    if len(lines) < done:
        raise ValueError(f"{path} must hold the metrics of the {done} steps of its checkpoint; got {len(lines)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)
    return [json.loads(line) for line in lines]
