"""OPT against files made by the original implementation (golden/make_opt.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import load_opt, save_hf, save_opt
from sparsellm.generation import generate

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ["opt_pre_norm", "opt_post_norm"]


def largest_error(model, golden) -> float:
    """Of the logits, where tokens are real."""
    run = jax.jit(lambda model, tokens, mask: model(tokens, mask=mask))
    with jax.default_matmul_precision("highest"):
        logits = run(model, jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"]))
    return np.abs(np.asarray(logits) - golden["logits"])[golden["mask"]].max()


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def golden(folder):
    return np.load(folder / "golden.npz")


@pytest.mark.parametrize("sparse_rows", [None, 8])
def test_logits(folder, golden, sparse_rows):
    """On left-padded, right-padded and unpadded batches."""
    assert largest_error(load_opt(folder, sparse_rows=sparse_rows), golden) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("sparse_rows", [None, 8, 64])
def test_logits_on_a_gpu(folder, golden, sparse_rows):
    """With 64 rows through the Mosaic kernel."""
    assert largest_error(load_opt(folder, sparse_rows=sparse_rows), golden) < 1e-4


def test_greedy_tokens(folder, golden):
    model = load_opt(folder, sparse_rows=8)
    real = golden["mask"][: len(golden["prompts"])]
    prompts = [row[mask].tolist() for row, mask in zip(golden["prompts"], real, strict=True)]
    new = golden["greedy"].shape[1]
    assert generate(model, prompts, max_new_tokens=new, eos_id=-1) == golden["greedy"].tolist()
    # With one of those tokens as end-of-text; transformers pads after it.
    eos = int(golden["eos"])
    expected = [row[: row.index(eos)] if eos in row else row for row in golden["greedy_eos"].tolist()]
    assert generate(model, prompts, max_new_tokens=new, eos_id=eos) == expected


def test_round_trips(folder, golden, tmp_path):
    """Saved in both formats (one file, shards, Orbax) and loaded again, every bit is the same."""
    model = load_opt(folder)
    save_hf(model, tmp_path / "one")
    save_hf(model, tmp_path / "shards", max_shard_bytes=20_000)
    save_opt(model, tmp_path / "native")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for name in ("one", "shards", "native"):
        again = load_opt(tmp_path / name)
        assert again.config.pre_norm == model.config.pre_norm
        for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, again)), strict=True):
            np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_bfloat16(folder, golden):
    """Weights rounded as they are loaded: near the float32 logits, relative to their size."""
    model = load_opt(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    scale = np.sqrt(np.mean(np.square(golden["logits"])))
    assert largest_error(model, golden) < 0.1 * scale
