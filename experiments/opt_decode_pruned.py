"""How much quicker, and in how much less memory, does a pruned OPT decode?

    python -m experiments opt_decode_pruned --keep                       OPT-30B at 70%, on a GPU, in 3 minutes
    python -m experiments opt_decode_pruned --models 13b --sparsities 0 0.5 0.6 0.7 0.8 --batches 8 16 32 64
    python -m experiments opt_decode_pruned --sparsities 0 0.5 0.7 --value-dtypes dtype float8_e4m3fn
    python -m experiments opt_decode_pruned --models 175b --sparsities 0.7 --devices 2
    python -m experiments opt_decode_pruned --source FOLDER              a pruned model

A row a model, sparsity (0 is dense), kind of values and batch: milliseconds a token by the clock on the wall, around
the compiled loop that `generate` runs, after `context` tokens; tokens a second; the memory for weights, cache and
activations; and the largest batch that this device could hold, reckoned from the same bytes. Without a source, weights
are random and so are their zeros: what a token costs follows from their number. Each matrix is compressed as soon as it
is made, so OPT-66B at 70% needs no more than it is left with. transformers runs the dense model at equal batch, where
torch is there.

The check of a row: what the middle block's linear layers give for as many tokens, against the products of its weights
in float32, as they were before they were compressed. Of 8-bit values that shows their rounding, too.

Expected: a token takes as much less time as its weights have fewer bytes, less what attention, the logits and the
launches take. Seen on an H200: at 70% and batch 16, OPT-30B takes 0.72 of the dense model's time behind 128 tokens, and
0.73 behind 256 (there 0.87 before q, k and v shared a launch, 0.79 before a block's copies went on from strip to
strip, 0.75 before x came by a tensor map). Behind 128 a step takes 12.0 ms, and took 12.2 before attention had small
stages: 9.0 of these were products, 1.2 attention, 0.2 the logits, the rest 12 small launches a layer and what lies
between them. At 70% OPT-66B takes 0.63 of the time at batch 8 and 0.84 at 64, OPT-13B 0.83 and 0.94.
"""

import dataclasses
import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from experiments import opt, options, products
from experiments.headlines import headline
from experiments.runs import Row, Run, markdown_table
from models import OPT, OPTConfig
from pallas_kernels.unstructured_matmul.weights import VALUE_DTYPES
from sparsellm import memory
from sparsellm.sharding import parameter_sharding
from sparsellm.unstructured import Treatment, UnstructuredLinear, apply_all, compress, compressed_layers
from sparsellm.unstructured.rules import BREAK_EVEN

CONDITIONS = "weights", "context"  # columns that readers have to know
TOLERANCES = {"bfloat16": 1e-2, "float16": 5e-3, "float32": 1e-5}
# A float8_e4m3fn is off by up to 1/16, 0.026 RMS; an int8 by 1/254 of its row's largest, 0.01 RMS of normal ones.
ROUNDING = {"float8_e4m3fn": 4e-2, "int8": 2e-2}
LINEARS = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "fc1", "fc2")  # of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of opt_decode_pruned.

    Attributes:
        models: presets of OPT, or tiny.
        sparsities: shares of zeros; 0 is the dense model.
        batches: sequences at once.
        source: a pruned OPT (a run, a checkpoint's folder or a hub id), in place of random ones: measured dense, then
            compressed.
        context: tokens that each sequence has.
        steps: tokens added in a timed run.
        repeats: timed runs.
        value_dtypes: what the values that are left are kept in: "dtype", "int8" or "float8_e4m3fn".
        paired: whether elements are stored two by two: more bytes, fewer instructions; None leaves it to `compress`.
        devices: to cut a random model over.
        dtype: of weights and activations.
        seed: of weights.
        no_peers: leave out what needs torch.
    """

    models: tuple[str, ...] = ("30b",)
    sparsities: tuple[float, ...] = (0.0, 0.7)
    batches: tuple[int, ...] = (16,)
    source: str | None = None
    context: int = 128
    steps: int = 32
    repeats: int = 3
    value_dtypes: tuple[str, ...] = ("dtype",)
    paired: bool | None = None
    devices: int = 1
    dtype: str = "bfloat16"
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny model."""
        options: dict[str, Any] = {"dtype": "float32", "no_peers": True}
        return cls(models=("tiny",), batches=(2,), context=16, steps=4, repeats=1, **options)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each model, sparsity, kind of values and batch; peers first, while little else is on the GPU.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: a compressed layer does not give the dense product.
    """
    _check(config)
    rows: list[Row] = []
    for model in (config.source,) if config.source is not None else config.models:
        name = f"{len(rows)}_{model.rpartition('/')[2]}"
        theirs = opt.measure_peers(config, model, run)
        sparsities = (None,) if config.source is not None else config.sparsities
        for sparsity, values in itertools.product(sparsities, config.value_dtypes):
            if sparsity == 0 and values != config.value_dtypes[0]:
                continue  # a dense model has no values of another kind
            measure = functools.partial(measure_model, config, model, sparsity, values)
            found: list[Row] = run.remembered(f"rows_{name}_{sparsity}_{values}", measure)
            rows += [row | theirs[row["batch"]] for row in found]
    run.show(*readme({"rows": rows}))
    return rows


def _check(config: Config) -> None:
    options.check_filled(config, "models", "sparsities", "batches", "value_dtypes")
    options.check_least(config, 1, "batches", "context", "steps", "repeats", "devices")
    options.check_known(config, "dtype", tuple(TOLERANCES))
    options.check_known(config, "value_dtypes", ("dtype", *VALUE_DTYPES))
    options.check_shares(config, "sparsities")
    opt.mesh_over(config.devices)  # raises where there are fewer
    for model in config.models if config.source is None else ():
        opt.check_length(config, model, opt.config_of(model, config.dtype))


def measure_model(config: Config, model: str, sparsity: float | None, values: str = "dtype") -> list[Row]:
    """Rows of one model on every batch: of a random one, or of a given one (the first time dense) and compressed."""
    treatment = Treatment(paired=config.paired, value_dtype=None if values == "dtype" else values)
    if sparsity is None:
        loaded = opt.make_model(model, config.dtype, source=model)[0]
        opt.check_length(config, model, loaded.config)
        if any(compressed_layers(loaded)):
            message = "source must be a pruned model that is not compressed, to be timed dense too; got "
            raise ValueError(message + model)
        densities = [_density(layer.kernel[...]) for block in loaded.layers for layer in _linears(block).values()]
        if not any(map(treatment.compresses, densities)):
            rule = f"source must be a pruned model: layers with at most {BREAK_EVEN:.0%} non-zeros are compressed"
            raise ValueError(f"{rule}; those of {model} have {min(densities):.0%} and more")
        named: Row = {"model": model.rstrip("/").rpartition("/")[2], "weights": "pruned"}
        dense = config.batches if values == config.value_dtypes[0] else ()
        rows = [_measure(config, loaded, named | {"variant": "dense"}, batch, {}) for batch in dense]
        found: list[Row] = []
        middle = _linears(loaded.layers[len(loaded.layers) // 2])
        kernels = {name: layer.kernel[...] for name, layer in middle.items()}
        compress(loaded, [("", treatment)], report=found.append)
        zeros = 1 - sum(r["density"] * r["dense_bytes"] for r in found) / sum(r["dense_bytes"] for r in found)
        paired = any(layer.paired for _, layer in compressed_layers(loaded))
        named |= {"variant": _variant(paired), "sparsity": round(zeros, 4), "values": values}
        errors = check_block(loaded, kernels, config, values)
        del kernels
        return rows + [_measure(config, loaded, named, batch, errors) for batch in config.batches]
    named = {"model": f"opt-{model}", "weights": "random", "sparsity": sparsity}
    how: dict[str, Any] = {"value_dtype": treatment.value_dtype, "paired": treatment.pairs(1 - sparsity, config.dtype)}
    named |= {"variant": _variant(how["paired"]), "values": values} if sparsity else {"variant": "dense"}
    sizes = opt.config_of(model, config.dtype)
    needed, has = bytes_needed(sizes, sparsity, **how), memory.capacity()
    if has is not None and needed > has * config.devices:
        said = f"{model} at {sparsity:.0%} needs {needed / 2**30:.0f} of {has * config.devices / 2**30:.0f} GiB"
        print(f"{said}: left out", flush=True)
        gib = round(needed / config.devices / 2**30, 2)
        return [named | {"batch": batch, "memory_gib": gib} for batch in config.batches]
    print(f"making {_label(named)}", flush=True)
    key, mesh = jax.random.key(config.seed), opt.mesh_over(config.devices)
    made, kernels = random_opt(sizes, sparsity, key, mesh, **how)
    errors = check_block(made, kernels, config, values)
    del kernels
    return [_measure(config, made, named, batch, errors) for batch in config.batches]


def _variant(paired: bool) -> str:
    return "paired" if paired else "unstructured"


def bytes_needed(config: OPTConfig, sparsity: float, *, value_dtype: str | None = None, paired: bool = False) -> int:
    """About what the weights take: of an element of the blocks' matrices what the format says, and a tenth on top."""
    abstract = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    total, itemsize = sum(x.size for x in jax.tree.leaves(nnx.state(abstract))), jnp.dtype(config.dtype).itemsize
    blocks = sum(x.size for x in jax.tree.leaves(nnx.state(abstract.layers)) if x.ndim == 2)
    value_bytes = jnp.dtype(value_dtype or config.dtype).itemsize
    stored = value_bytes * (1 - sparsity**2) + 1 / 16 if paired else value_bytes * (1 - sparsity) + 1 / 8
    kept = min(1.1 * stored, itemsize) if sparsity else itemsize
    return int(itemsize * (total - blocks) + kept * blocks)


def random_opt(
    config: OPTConfig,
    sparsity: float,
    key: Array,
    mesh: Mesh | None = None,
    *,
    value_dtype: str | None = None,
    paired: bool = False,
) -> tuple[OPT, dict[str, Array]]:
    """Random weights, their zeros at random places and each matrix compressed before the next is made; dense for 0.

    Also the kernels that were compressed of the middle block, by their names in it.
    """
    kernels: dict[str, Array] = {}
    model = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    keys = (jax.random.fold_in(key, i) for i in range(2**31))

    def fill(name: str, variable: nnx.Variable, sparsity: float = 0.0) -> None:
        scale, shift = {"scale": (0.0, 1.0), "bias": (0.0, 0.0)}.get(name, (config.init_std, 0.0))
        sharding = parameter_sharding(variable, mesh)
        options = {"shape": variable.shape, "dtype": variable.dtype}
        options["sharding"] = sharding if isinstance(sharding, NamedSharding) else None
        variable.set_value(_draw(next(keys), scale, shift, 1 - sparsity, **options))

    for path, parent in [(path, module) for path, module in nnx.iter_modules(model) if type(module) is not nnx.Linear]:
        for name in list(vars(parent)):
            child = getattr(parent, name)
            if isinstance(child, nnx.Variable):
                fill(name, child)
            elif type(child) is nnx.Linear:
                for part, variable in list(vars(child).items()):
                    if isinstance(variable, nnx.Variable):
                        fill(part, variable, sparsity if part == "kernel" else 0.0)
                if sparsity and path[:2] == ("layers", config.layers // 2):
                    kernels[".".join(map(str, (*path[2:], name)))] = child.kernel[...]
                if sparsity:
                    setattr(parent, name, UnstructuredLinear.from_linear(child, value_dtype=value_dtype, paired=paired))
    return model, kernels


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _draw(
    key: Array,
    scale: ArrayLike,
    shift: ArrayLike,
    density: ArrayLike,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding | None,
) -> Array:
    """Normal with this scale around this shift, but zero where it is not kept; cut over devices as it is made."""
    key_mask, key_values = jax.random.split(key)
    values = scale * jax.random.normal(key_values, shape, jnp.float32) + shift
    drawn = jnp.where(jax.random.uniform(key_mask, shape, jnp.float32) < density, values, 0).astype(dtype)
    return drawn if sharding is None else jax.lax.with_sharding_constraint(drawn, sharding)


def _measure(config: Config, model: OPT, named: Row, batch: int, errors: dict[int, float]) -> Row:
    """A row; `errors` are those of every batch, by `check_block`."""
    slots = config.context + config.steps
    size = memory.estimate(model, rows=batch, slots=slots, tokens=batch)
    has = memory.capacity()
    row = (
        {"sparsity": 0.0}
        | named
        | {"batch": batch, "dtype": config.dtype, "context": config.context, "devices": config.devices}
    )
    row |= {"weights_gib": round(size.parameters / 2**30, 3), "memory_gib": round(size.total / 2**30, 3)}
    row["largest_batch"] = None
    if has is not None:
        row["largest_batch"] = max(has - size.parameters, 0) * batch // max(size.cache + size.activations, 1)
    if has is not None and size.total > has:
        print(f"{_label(row)}, batch {batch} does not fit", flush=True)
        return row
    row["error"] = errors.get(batch)
    timed: dict[str, Any] = {name: getattr(config, name) for name in ("context", "steps", "repeats", "seed")}
    row["time_ms"], _ = opt.time_decode(model, batch, **timed)
    row["tokens_per_second"] = round(1e3 * batch / row["time_ms"], 1)
    print(f"{_label(row)}, batch {batch}: {row['time_ms']} ms a token, {row['memory_gib']} GiB", flush=True)
    return row


def check_block(model: OPT, kernels: dict[str, Array], config: Config, values: str = "dtype") -> dict[int, float]:
    """By batch, the largest relative error of what the middle block's compressed layers give for so many tokens.

    Args:
        model: the model.
        kernels: those of the middle block before they were compressed, by the layers' names in it.
        config: says the batches, and the dtype.
        values: what the layers' are kept in.

    Raises:
        RuntimeError: an error is above what rounding explains.
    """
    errors: dict[int, float] = {}
    tolerance = TOLERANCES[config.dtype] + ROUNDING.get(values, 0.0)
    block = model.layers[len(model.layers) // 2]
    for batch in config.batches if any(compressed_layers(block)) else ():
        keys = jax.random.split(jax.random.key(config.seed), len(LINEARS))
        x = {
            name: jax.random.normal(key, (batch, layer.in_features), config.dtype)
            for key, (name, layer) in zip(keys, _linears(block).items(), strict=True)
        }
        errors[batch] = float(_error(*nnx.split(block), kernels, x))
        if not errors[batch] <= tolerance:
            rule = f"what compressed layers give must have an error of {tolerance} at most"
            raise RuntimeError(f"{rule}; got {errors[batch]:.1e} for {batch} tokens")
    return errors


@functools.partial(jax.jit, static_argnums=0)
def _error(graphdef, state, kernels: dict[str, Array], x: dict[str, Array]) -> Float[Array, ""]:
    """Of the products as the block makes them: those of queries, keys and values in one launch."""
    layers, joint = _linears(nnx.merge(graphdef, state)), LINEARS[:3]
    x |= dict.fromkeys(joint, x[joint[0]])
    outputs = {name: layers[name](x[name]) for name in LINEARS[3:]}
    outputs |= zip(joint, apply_all([layers[name] for name in joint], x[joint[0]]), strict=True)
    errors = []
    for name, kernel in kernels.items():
        wide, bias = (a.astype(jnp.float32) for a in (kernel, layers[name].bias[...]))
        expected = jnp.dot(x[name].astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST) + bias[None]
        errors.append(products.relative_error(outputs[name], expected))
    return jnp.stack(errors).max()


def _density(kernel: Float[Array, "in out"]) -> float:
    return int(jnp.count_nonzero(kernel)) / kernel.size


def _linears(block: Any) -> dict[str, Any]:
    """The linear layers of a block by their names in it."""
    return {name: operator.attrgetter(name)(block) for name in LINEARS}


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of 16 sequences, 70% zeros."""
    rows = [row for row in result["rows"] if row["batch"] == 16 and row.get("time_ms")]
    dense = {row["model"]: row["time_ms"] for row in rows if row["variant"] == "dense"}
    return [
        headline(
            f"{row['model']} with 70% zeros anywhere{_kind(row)}, a token of 16 texts",
            row["time_ms"],
            "ms",
            dense.get(row["model"]),
            {"transformers, dense": row.get("transformers_time_ms")},
        )
        for row in rows
        if row["sparsity"] == 0.7
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Time, speed and memory of every model next to the dense one's and transformers'; and a figure."""
    from experiments import figures

    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(map(_zeros, result["rows"])))}
    rows = sorted(
        result["rows"],
        key=lambda row: (models.index(row["model"]), row["sparsity"], order[_zeros(row)], row["batch"]),
    )
    dense = {(row["model"], row["batch"]): row.get("time_ms") for row in rows if row["variant"] == "dense"}
    cells = []
    for row in rows:
        base, own = dense.get((row["model"], row["batch"])), row.get("time_ms")
        ratio = f"{own / base:.2f}" if own and base else "–"
        cells.append([row["model"], _zeros(row), row["batch"], _number(own), ratio])
        cells[-1] += [_number(row.get(key)) for key in ("tokens_per_second", "transformers_time_ms", "memory_gib")]
        cells[-1] += [row.get("largest_batch") or "–"]
    header = ["model", "zeros", "batch", "ms a token", "of dense", "tokens/s", "transformers (ms)", "GiB"]
    header += ["largest batch"]
    kinds, contexts = (" and ".join(sorted({str(row[key]) for row in rows if key in row})) for key in CONDITIONS)
    said = f"Weights: {kinds}; {contexts} tokens of context. GiB are weights, cache and activations."
    text = f"{said}\n\n{markdown_table(cells, header)}"
    timed = [row for row in rows if row.get("time_ms")]
    return text, {"opt_decode_pruned.png": figures.draw(lambda axes: _plot(axes, timed))} if timed else {}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _label(row: Row) -> str:
    return f"{row['model']}, zeros: {_zeros(row)}"


def _zeros(row: Row) -> str:
    if row["variant"] == "dense":
        return "dense"
    return f"{row['sparsity']:.0%}{_kind(row)}{', paired' * (row['variant'] == 'paired')}"


def _kind(row: Row) -> str:
    """Of the values, where it is another than the activations'; older rows do not say."""
    values = row.get("values", "dtype")
    return "" if values == "dtype" else f", {values}"


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        kind = _zeros(row) if row["variant"] == "dense" else _zeros(row).replace("%", "% zeros")
        lines.setdefault(f"{row['model']}, {kind}", []).append((row["batch"], row["time_ms"]))
    for colour, (label, points) in zip(figures.ordered_colours(len(lines)), lines.items(), strict=True):
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, markersize=4, label=label)
    axes.set(title="Decoding with unstructured weights", xlabel="batch", ylabel="time a token (ms)", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
