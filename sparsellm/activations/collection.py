"""Activations on disk: a folder with collection.json and a shard for every batch of windows, each file whole.

A collection takes tokens * (2 * d_model * size of a dtype + neurons / 8 + 4 * heads) bytes a layer.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsellm.activations.recording import all_finite, check_finite, check_windows, fingerprint, see
from sparsellm.checkpoint import no_space
from sparsellm.checksum import checksum

KINDS = ("hidden", "ffn_inputs", "fires", "head_norms")
DESCRIPTION = "collection.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """A whole collection; made by `collect`, opened again by `Activations.open`.

    Attributes:
        folder: where it lies.
        model: the fingerprint of the model.
        kinds: what was collected, of `KINDS`: the hidden states that enter each layer, the inputs of its feed-forward
            block, which neurons fire (are not 0), and the norm of each head's output.
        neurons: of each layer.
        heads: of each layer.
        tokens: in all, window after window.
        length: tokens in a window.
    """

    folder: Path
    model: dict[str, Any]
    kinds: tuple[str, ...]
    neurons: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: int
    length: int

    @classmethod
    def open(cls, folder: str | Path) -> "Activations":
        """Opens what `collect` has written.

        Raises:
            FileNotFoundError: there is no collection.
            ValueError: it is not whole yet.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"a collection of activations must hold {DESCRIPTION}; {folder} does not")
        described = json.loads((folder / DESCRIPTION).read_text())
        there = sum(path.is_file() for path in _shards(folder, described["shards"]))
        if there < described["shards"]:
            shards = f"{there} of {described['shards']} shards are there"
            raise ValueError(f"the collection {folder} is not whole ({shards}): the same `collect` goes on with it")
        lists = {name: tuple(described[name]) for name in ("kinds", "neurons", "heads")}
        others = {name: described[name] for name in ("model", "tokens", "length")}
        return cls(folder=folder, **lists, **others)

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self.neurons)

    def read(self, kind: str, layer: int) -> Shaped[np.ndarray, "tokens width"]:
        """One kind of one layer, of all tokens; neurons that fire as bits, eight a byte (see `fires`).

        Raises:
            ValueError: it was not collected, or a shard is damaged.
        """
        if kind not in self.kinds:
            raise ValueError(f"{kind} must be collected to be read; {self.folder} holds {', '.join(self.kinds)}")
        parts = []
        for path in sorted(self.folder.glob("shard_*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as file:
                    parts.append(file.get_tensor(f"layers.{layer}.{kind}"))
            except SafetensorError as error:
                sentence = f"{path} is damaged ({error}): delete it, and the same `collect` writes it again"
                raise ValueError(sentence) from error
        return np.concatenate(parts)

    def fires(self, layer: int) -> Bool[np.ndarray, "tokens neurons"]:
        """Which neurons fire for each token."""
        return np.unpackbits(self.read("fires", layer), axis=1, count=self.neurons[layer]).astype(bool)


@functools.partial(jax.jit, static_argnums=1)
def unpack_bits(bits: UInt8[Array, "tokens bytes"], width: int) -> Bool[Array, "tokens {width}"]:
    """What `read` gives of neurons that fire, as `Activations.fires` does: on the device, which is quicker."""
    return jnp.unpackbits(bits, axis=1, count=width).astype(bool)


def collect(
    model: Any,
    windows: Int[np.ndarray, "windows length"],
    folder: str | Path,
    *,
    kinds: Sequence[str] = KINDS,
    batch: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Activations:
    """Runs a model over windows of tokens and leaves what its blocks see in `folder`.

    Killed at any moment or out of disk space, the same call goes on after the last whole shard.

    Args:
        model: see the module.
        windows: tokens, no padding.
        folder: new, empty, or of the same call.
        kinds: what to collect, some of `KINDS`.
        batch: windows in a shard, a divisor of their number.
        report: called with the shards done and in all, after each.

    Raises:
        ValueError: the folder is of another collection, an argument is out of range, or activations are not finite.
        OSError: no disk space is left (`errno.ENOSPC`); nothing half-written stays.
    """
    check_windows(windows, batch, model)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(unknown)}")
    folder, kinds = Path(folder), tuple(kind for kind in KINDS if kind in kinds)
    graphdef, state = nnx.split(model)
    seen = jax.eval_shape(functools.partial(see, graphdef), state, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    described = {
        "model": fingerprint(model),
        "weights": checksum(state),
        "windows": hashlib.sha256(np.ascontiguousarray(windows, np.int64)).hexdigest(),
        "kinds": list(kinds),
        "neurons": [layer["fires"].shape[-1] for layer in seen],
        "heads": [layer["head_norms"].shape[-1] for layer in seen],
        "tokens": windows.size,
        "length": windows.shape[1],
        "shards": len(windows) // batch,
    }
    _begin(folder, described)
    paths = _shards(folder, described["shards"])
    for done, (path, part) in enumerate(zip(paths, np.split(windows, len(paths)), strict=True)):
        if not path.exists():
            layers, finite = _record(graphdef, kinds, state, jnp.asarray(part, jnp.int32))
            check_finite(jax.device_get(finite), f"windows {done * batch} to {(done + 1) * batch - 1}")
            tensors = {f"layers.{i}.{kind}": x for i, layer in enumerate(layers) for kind, x in layer.items()}
            save = functools.partial(save_file, jax.device_get(tensors))
            _write(path, save, f"{done} of {len(paths)} shards are there")
        if report:
            report(done + 1, len(paths))
    return Activations.open(folder)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _record(graphdef: nnx.GraphDef, kinds: tuple[str, ...], state: nnx.State, tokens: Int[Array, "batch length"]):
    """What is kept of each layer; and of what everything in it is finite."""
    seen = see(graphdef, state, tokens)
    pack = lambda kind, x: jnp.packbits(x != 0, axis=1) if kind == "fires" else x  # noqa: E731
    return [{kind: pack(kind, layer[kind]) for kind in kinds} for layer in seen], all_finite(seen)


def _shards(folder: Path, count: int) -> list[Path]:
    return [folder / f"shard_{i:05d}.safetensors" for i in range(count)]


def _begin(folder: Path, described: Mapping[str, Any]) -> None:
    """Writes what the collection will be, or checks that what is there is the same."""
    path = folder / DESCRIPTION
    for partial in (*folder.glob(".shard_*"), *folder.glob(f".{DESCRIPTION}.*")):  # what a killed process left
        partial.unlink()
    if path.is_file():
        there = json.loads(path.read_text())
        if different := [name for name in described if there.get(name) != described[name]]:
            raise ValueError(f"the folder must be of the same collection; {folder} differs in {', '.join(different)}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"the folder must be new, empty or of the same collection; {folder} holds something else")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(described), indent=2) + "\n"
    _write(path, lambda partial: partial.write_text(text), "nothing is there")


def _write(path: Path, write: Callable[[Path], object], kept: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not no_space(error):
            raise
        sentence = f"no space left on the device for {path} ({kept}): free some, and the same call goes on"
        raise OSError(errno.ENOSPC, sentence) from error
