"""What is collected and counted, against a forward pass written out with numpy."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from models import OPT, Mixtral, MixtralConfig, OPTConfig
from sparsellm.activations import KINDS, Activations, collect, collection, fingerprint, measure
from sparsellm.evaluation import perplexity
from sparsellm.pruning import WANDA, prune, prune_structures
from sparsellm.unstructured import Treatment, compress

CONFIG = OPTConfig(vocab_size=61, layers=2, d_model=16, heads=2, d_ff=24, max_length=32, init_std=0.3)
BATCH, WINDOWS, LENGTH = 2, 6, 12


@pytest.fixture(scope="module")
def model() -> OPT:
    model = OPT(CONFIG, rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):  # so that layers differ in how sparse they are
        layer.fc1.bias[...] = jnp.linspace(-2.0, 1.0 - i, CONFIG.d_ff)
    return model


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (WINDOWS, LENGTH))


@pytest.fixture(scope="module")
def whole(model, windows, tmp_path_factory) -> Activations:
    return collect(model, windows, tmp_path_factory.mktemp("activations") / "all", batch=BATCH)


@pytest.fixture(scope="module")
def expected(model, windows) -> list[dict[str, np.ndarray]]:
    """What each block sees, in float64."""
    return forward(model, windows)


def forward(model: OPT, windows: np.ndarray) -> list[dict[str, np.ndarray]]:
    get = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731
    linear = lambda module, x: x @ get(module.kernel) + get(module.bias)  # noqa: E731

    def norm(module, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * get(module.scale) + get(module.bias)

    count, length = windows.shape
    x = get(model.embed_tokens.embedding)[windows] + get(model.embed_positions.embedding)[2 : length + 2]
    seen = []
    for layer in model.layers:
        hidden, attention = x, layer.self_attn
        split = lambda y, heads=attention.heads: y.reshape(count, length, heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
        y = norm(layer.self_attn_layer_norm, x)
        q, k, v = (split(linear(proj, y)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
        x = x + linear(attention.out_proj, outputs.reshape(count, length, -1))
        inputs = norm(layer.final_layer_norm, x)
        activation = np.maximum(linear(layer.fc1, inputs), 0)
        x = x + linear(layer.fc2, activation)
        norms = np.sqrt((outputs**2).sum(-1))
        rows = {"hidden": hidden, "ffn_inputs": inputs, "activation": activation, "head_norms": norms}
        seen.append({name: value.reshape(count * length, -1) for name, value in rows.items()})
    return seen


def test_experts_see_the_tokens_that_came_to_them(tmp_path):
    """Of a Mixtral: every expert's neurons, those of a token's own experts from what entered the mixture."""
    config = MixtralConfig(
        vocab_size=61, layers=2, d_model=16, heads=4, kv_heads=2, d_ff=24, experts=3, top_k=2, init_std=0.3
    )
    model = Mixtral(config, rngs=nnx.Rngs(0))
    windows = np.random.default_rng(0).integers(0, 61, (4, 6))
    found = collect(model, windows, tmp_path / "mixtral", batch=2)
    assert (found.neurons, found.heads, found.tokens) == ((72, 72), (4, 4), 24)
    embedded = np.asarray(model.embed_tokens.embedding[...])[windows].reshape(24, 16)
    np.testing.assert_allclose(found.read("hidden", 0), embedded, rtol=1e-6)
    for i, layer in enumerate(model.layers):
        mixture, x = layer.block_sparse_moe, np.asarray(found.read("ffn_inputs", i), np.float64)
        chosen = np.argsort(-(x @ np.asarray(mixture.router.kernel[...], np.float64)), axis=1)[:, :2]
        fires = np.zeros((24, 3, 24), bool)
        for token, experts in enumerate(chosen):
            for expert in experts:
                gate, up = np.split(x[token] @ np.asarray(mixture.wi[...], np.float64)[expert], 2)
                fires[token, expert] = gate / (1 + np.exp(-gate)) * up != 0
        np.testing.assert_array_equal(found.fires(i), fires.reshape(24, 72))
    assert measure(model, windows, spans=[1, 6], batch=2).union[1] == pytest.approx([2 / 3] * 2)


def test_what_is_read_back_is_what_the_blocks_see(whole, expected):
    assert (whole.layers, whole.neurons, whole.tokens, whole.kinds) == (2, (24, 24), WINDOWS * LENGTH, KINDS)
    for layer, seen in enumerate(expected):
        for kind in ("hidden", "ffn_inputs", "head_norms"):
            np.testing.assert_allclose(whole.read(kind, layer), seen[kind], rtol=2e-4, atol=2e-4)
        surely = np.abs(seen["activation"]) > 1e-4
        np.testing.assert_array_equal(whole.fires(layer)[surely], (seen["activation"] > 0)[surely])
        assert 0.05 < whole.fires(layer).mean() < 0.9
        assert whole.read("fires", layer).shape == (WINDOWS * LENGTH, 3)  # a bit a neuron


def test_counts_are_those_of_a_loop(model, windows, expected):
    spans = (1, 4, 5, 12)
    found = measure(model, windows, spans=spans, batch=3)
    assert found.tokens == WINDOWS * LENGTH
    for layer, seen in enumerate(expected):
        fires = seen["activation"].reshape(WINDOWS, LENGTH, -1) > 0
        np.testing.assert_array_equal(found.fires[layer], fires.sum((0, 1)))
        for span in spans:
            live = [
                window[start : start + span].any(axis=0).mean()
                for window in fires
                for start in range(0, LENGTH - span + 1, span)
            ]
            assert found.union[span][layer] == pytest.approx(np.mean(live))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_collection_goes_on_after_its_last_whole_shard(stop, model, windows, whole, tmp_path, monkeypatch):
    written = []
    save = collection.save_file

    def killed(tensors, path):
        written.append(path.name)
        if len(written) == stop + 1:
            path.write_bytes(b"half")
            monkeypatch.setattr(collection.Path, "unlink", lambda *_, **__: None)  # kill -9 tidies nothing up
            raise KeyboardInterrupt
        save(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collection, "save_file", killed)
        collect(model, windows, tmp_path / "there", batch=BATCH)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"is not whole \\({stop} of 3 shards are there\\)"):
        Activations.open(tmp_path / "there")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").glob("shard_*")}
    done: list[tuple[int, int]] = []
    again = collect(model, windows, tmp_path / "there", batch=BATCH, report=lambda *shards: done.append(shards))
    assert done == [(1, 3), (2, 3), (3, 3)] and len(before) == stop
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert sorted(path.name for path in again.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())
    for path in again.folder.iterdir():
        assert path.read_bytes() == (whole.folder / path.name).read_bytes()


@pytest.mark.parametrize("says", [OSError(errno.ENOSPC, "x"), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_is_told_and_nothing_half_written_stays(says, model, windows, tmp_path, monkeypatch):
    save = collection.save_file

    def full(tensors, path):
        if path.name.startswith(".shard_00001"):
            path.write_bytes(b"half")
            raise says
        save(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="1 of 3 shards are there.*: free some") as raised:
        patch.setattr(collection, "save_file", full)
        collect(model, windows, tmp_path, batch=BATCH)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection.json", "shard_00000.safetensors"]
    assert collect(model, windows, tmp_path, batch=BATCH).tokens == WINDOWS * LENGTH


def test_a_full_disk_before_the_first_byte(model, windows, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "x")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="nothing is there"):
        patch.setattr(collection.Path, "write_text", full)
        collect(model, windows, tmp_path, batch=BATCH)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_refused_by_name(model, windows, tmp_path):
    broken = nnx.clone(model)
    broken.layers[1].fc1.kernel[...] = broken.layers[1].fc1.kernel[...].at[0, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="layers.1.fires is not in windows 0 to 1"):
        collect(broken, windows, tmp_path, batch=BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["collection.json"]
    with pytest.raises(ValueError, match="activations must be finite; layers.1.fires"):
        measure(broken, windows, spans=(1,), batch=BATCH)


def test_a_folder_of_something_else_is_left_alone(model, windows, whole, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        collect(model, windows, tmp_path, batch=BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="differs in windows"):
        collect(model, (windows + 1) % 61, whole.folder, batch=BATCH)
    other = nnx.clone(model)
    other.layers[0].fc2.bias[...] += 1
    with pytest.raises(ValueError, match="differs in weights"):
        collect(other, windows, whole.folder, batch=BATCH)
    with pytest.raises(FileNotFoundError, match="must hold collection.json"):
        Activations.open(tmp_path)


def test_only_what_is_asked_for_is_kept(model, windows, tmp_path):
    some = collect(model, windows[:2], tmp_path, kinds=("fires", "hidden"), batch=BATCH)
    with safe_open(some.folder / "shard_00000.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {f"layers.{i}.{kind}" for i in (0, 1) for kind in ("hidden", "fires")}
    with pytest.raises(ValueError, match="head_norms must be collected to be read; .* holds hidden, fires"):
        some.read("head_norms", 0)


def test_a_damaged_shard_is_named_and_made_again(model, windows, whole, tmp_path):
    there = collect(model, windows, tmp_path, batch=BATCH)
    shard = there.folder / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard_00001.safetensors is damaged .*: delete it, and the same `collect`"):
        there.read("hidden", 0)
    shard.unlink()
    again = collect(model, windows, tmp_path, batch=BATCH)
    np.testing.assert_array_equal(again.read("hidden", 0), whole.read("hidden", 0))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batch": 4}, "batch must divide the number of windows; got batch=4, 6 windows"),
        ({"batch": 0}, "batch must divide"),
        (
            {"kinds": ("fires", "heat"), "batch": 2},
            "kinds must be some of hidden, ffn_inputs, fires, head_norms; got heat",
        ),
    ],
)
def test_what_cannot_be_collected_is_refused(options, message, model, windows, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect(model, windows, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("token", [-1, 61, 2**31 - 1])
def test_tokens_that_the_model_does_not_know_are_refused(token, model, windows, tmp_path):
    """Its embedding would answer with another token's row, or with NaN."""
    outside = windows.astype(np.int32)
    outside[3, 4] = token
    for use in (
        lambda: collect(model, outside, tmp_path / "new"),
        lambda: measure(model, outside, spans=(1,)),
        lambda: prune(model, WANDA, sparsity=0.5, windows=outside),
        lambda: perplexity(model, outside),
        lambda: prune_structures(model, outside, heads=0.5, layers=[0, 1]),
    ):
        with pytest.raises(ValueError, match=rf"token ids must be in \[0, 61\); windows hold {token}: were they made"):
            use()
    assert not (tmp_path / "new").exists()


def test_compressed_models_are_refused_by_name(windows, tmp_path):
    with pytest.raises(ValueError, match="of a dense model, before it is compressed; self_attn.out_proj is a Unstruct"):
        collect(compress(OPT(CONFIG, rngs=nnx.Rngs(0)), [("", Treatment(max_density=1.0))]), windows, tmp_path / "new")


def test_a_model_of_other_blocks_is_refused(windows):
    class Other(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])

    with pytest.raises(ValueError, match="blocks must have self_attn .*, as OPT's and Mixtral's; got Linear"):
        measure(Other(), windows, spans=(1,), batch=2)


def test_spans_longer_than_a_window_and_no_windows_are_refused(model, windows):
    with pytest.raises(ValueError, match=r"spans must be 1 to 12, the length of a window; got spans=\(1, 13\)"):
        measure(model, windows, spans=(1, 13), batch=2)
    with pytest.raises(ValueError, match=r"windows must be \[windows, length\], at least one; got \[0, 12\]"):
        measure(model, windows[:0], batch=2)


def test_a_fingerprint_knows_the_model_and_not_its_dtype(model):
    found = fingerprint(model)
    assert json.loads(json.dumps(found)) == found and found["d_ff"] == 24
    pruned = nnx.clone(model)
    pruned.layers[0].fc1.kernel[...] *= 0
    assert fingerprint(pruned) == found
    assert fingerprint(OPT(CONFIG, rngs=nnx.Rngs(1))) != found
    half = nnx.clone(model)
    half.embed_tokens.embedding = nnx.Param(half.embed_tokens.embedding[...].astype(jnp.bfloat16))
    assert fingerprint(half) == found
