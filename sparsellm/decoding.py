"""The two compiled programs behind every text: prefill reads prompts, decode adds a token to each row, step by step.

Rows are independent of each other. Each has its own place in the cache and its own number of tokens left to add, and
may be taken over by a new prompt between two runs of either program: `generate` starts all rows at once, `serve` keeps
refilling them. Prompts are prefilled packed (`sparsellm.packing`).

The loop is a scan over a static number of steps: a `while_loop` that asks the device whether all rows have ended would
wait for the host at every step. The cache is donated, so it stays where it is. Where somebody reads along, every step
hands its tokens to a host callback, which finds their reader by number.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from sparsellm.packing import Packing
from sparsellm.sharding import mesh_of

GREEDY = (None, None, None)  # temperature, top_k, top_p

# For XLA, which else ends a CUDA graph at each sum over devices: NCCL's sums, captured, on the stream of the kernels
# before and behind them. Six layers of OPT-30B's on two H200s (then with the whole embedding gathered at every step)
# took 2.57 ms a step, with XLA's defaults 2.91; over listed neurons 2.20 and 2.50. The first option is XLA's default
# and COLLECTIVES. Their names are jaxlib 0.11.2's, which is why one device does without them.
GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,COLLECTIVES"
    ),
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_disable_async_collectives": "ALLREDUCE",
    "xla_gpu_experimental_use_collective_kernels": "",
}

_NUMBERS = itertools.count()
_READERS: dict[int, Callable[[np.ndarray], None]] = {}  # who takes the tokens of the loops now running


@runtime_checkable
class LanguageModel(Protocol):
    """What text is made with: an `nnx.Module` with these, and `config.vocab_size` and `config.max_length`.

    `hidden_states` takes prompts packed, with an empty row where the cache's stays as it is, and later one token a row,
    behind those of the cache; where the mask is False, a row gets none. `sparsellm.serving` also needs a cache whose
    rows are filled each for itself (`models.attention.KVCache`).
    """

    config: Any

    def init_cache(self, batch: int, length: int) -> Any: ...
    def hidden_states(
        self, tokens: Array, *, mask: Array | None = None, packing: Packing | None = None, cache: Any = None
    ) -> tuple[Array, Any]: ...
    def logits(self, hidden: Array) -> Array: ...


class Rows(NamedTuple):
    """The texts of a batch, as they are between two steps."""

    token: Int[Array, " batch"]  # the last one of each
    left: Int[Array, " batch"]  # how many more it may get; 0 where it has ended
    step: Int[Array, ""]
    cache: Any


@partial(jax.jit, static_argnames=("graphdef", "slots"), donate_argnames=("rows",))
def prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    rows: Rows | None,
    tokens: Int[Array, "1 packed"],
    packing: Packing,
    limits: Int[Array, " batch"],
    key: Array,
    sampling: tuple,
    eos_id: Int[Array, "..."],
    *,
    slots: int,
) -> Rows:
    """Reads prompts, each into its row, and draws the first token of each.

    Args:
        graphdef: of the model.
        state: of the model.
        rows: those that have no prompt here stay as they are; None for an empty batch. Donated.
        tokens: the packed prompts.
        packing: where they belong; a row that is to stay as it is has length 0.
        limits: the most new tokens of each prompt.
        key: PRNG key.
        sampling: temperature, top_k and top_p, as for `sample`.
        eos_id: the token that ends a text, of all rows or of each.
        slots: of a new cache, for each row.
    """
    model = nnx.merge(graphdef, state)
    if rows is None:
        none = jnp.zeros(packing.batch, jnp.int32)
        rows = Rows(none, none, jnp.int32(0), model.init_cache(packing.batch, slots))
    hidden, cache = model.hidden_states(tokens, packing=packing, cache=rows.cache)
    token = sample(model.logits(hidden[0, packing.last]), jax.random.fold_in(key, rows.step), *sampling)
    left = jnp.where(token == eos_id, 0, limits - 1)
    new = packing.lengths > 0
    return Rows(jnp.where(new, token, rows.token), jnp.where(new, left, rows.left), rows.step + 1, cache)


def _loop(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    rows: Rows,
    key: Array,
    sampling: tuple,
    eos_id: Int[Array, "..."],
    reader: Int[Array, ""] | None,
    *,
    steps: int,
) -> tuple[Rows, Int[Array, "steps batch"]]:
    """`decode`: `steps` tokens for every row; one that has ended is padding, and repeats end-of-text.

    With a `reader` (a number, traced), the tokens of each step pass through the host on their way to the next: that
    orders the callbacks on any number of devices, and leaves none running when the tokens are there.
    """
    model = nnx.merge(graphdef, state)

    def step(rows, _):
        live = rows.left > 0
        hidden, cache = model.hidden_states(rows.token[:, None], mask=live[:, None], cache=rows.cache)
        token = sample(model.logits(hidden[:, -1]), jax.random.fold_in(key, rows.step), *sampling)
        shown = jnp.where(live, token, eos_id)
        if reader is not None:
            shown = io_callback(_deliver, shown, reader, shown)
        token = jnp.where(live, shown, rows.token)
        left = jnp.where(live & (token != eos_id), rows.left - 1, 0)
        return Rows(token, left, rows.step + 1, cache), shown

    return lax.scan(step, rows, length=steps)


_jit_loop = partial(jax.jit, _loop, static_argnames=("graphdef", "steps"), donate_argnames=("rows",))
decode, decode_over_mesh = _jit_loop(), _jit_loop(compiler_options=GRAPH_OPTIONS)


def decode_program() -> Callable[..., tuple[Rows, Int[Array, "steps batch"]]]:
    """`decode`, or the same compiled for several devices where a mesh is set."""
    return decode if jax.sharding.get_abstract_mesh().empty else decode_over_mesh


def sample(
    logits: Float[Array, "batch vocab"],
    key: Array,
    temperature: Float[Array, ""] | None,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """Draws a token for each row: temperature, then top-k, then top-p; the likeliest where `temperature` is None.

    Source: top-p is nucleus sampling (Holtzman et al., 2020), section 3.1; top-k is Fan et al. (2018), section 5.4.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # so that none overflows
    if top_k is not None or top_p is not None:
        logits = jnp.where(logits < _threshold(logits, top_k, top_p), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _threshold(logits: Float[Array, "batch vocab"], top_k, top_p) -> Float[Array, "batch 1"]:
    """The smallest logit that may be drawn. Equal logits stand or fall together."""
    descending = -jnp.sort(-logits, axis=-1)
    if top_k is not None:
        kth = lax.dynamic_slice_in_dim(descending, top_k - 1, 1, axis=1)
        descending = jnp.where(descending < kth, -jnp.inf, descending)
    if top_p is None:
        return kth
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (probabilities > 0)
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)


def _deliver(reader: Int[Array, ""], tokens: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """The one host function that compiled loops call, so that another callback compiles nothing."""
    take = _READERS.get(int(reader))  # none where the reader was interrupted while its loop ran on
    if take is not None:
        take(np.asarray(tokens))
    return tokens


@contextmanager
def reading(collect: Callable[[np.ndarray], None]) -> Iterator[np.int32]:
    """The number under which a loop delivers its tokens to `collect`.

    What `collect` raises must not go through XLA, which would make an error of its own of it: nothing more is
    collected, and it is raised at the end.
    """
    errors: list[BaseException] = []

    def take(tokens: np.ndarray) -> None:
        if not errors:
            try:
                collect(tokens)
            except BaseException as error:
                errors.append(error)

    number = next(_NUMBERS)
    _READERS[number] = take
    try:
        yield np.int32(number)
    except jax.errors.JaxRuntimeError as error:
        if "KeyboardInterrupt" not in str(error):
            raise
        errors.append(KeyboardInterrupt())  # it came while JAX's own part of the callback ran
    finally:
        del _READERS[number]
    if errors:
        raise errors[0]


def on_mesh(state: nnx.State) -> AbstractContextManager[Any]:
    """Sets the mesh that the parameters are spread over, if there is one: see `sparsellm.sharding`."""
    mesh = mesh_of(state)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def run_chunk(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    rows: Rows,
    key: Array,
    sampling: tuple,
    eos_id: Any,
    *,
    steps: int,
    collect: Callable[[np.ndarray], None],
    streaming: bool,
) -> Rows:
    """Runs `decode` and hands each step's tokens to `collect`: at once if `streaming`, else at the end of the chunk."""
    program = decode_program()
    if streaming:
        with reading(collect) as reader:
            rows, tokens = program(graphdef, state, rows, key, sampling, eos_id, reader, steps=steps)
            np.asarray(tokens)  # waits for the chunk, and so for its callbacks
        return rows
    rows, tokens = program(graphdef, state, rows, key, sampling, eos_id, None, steps=steps)
    for step in np.asarray(tokens):
        collect(step)
    return rows
