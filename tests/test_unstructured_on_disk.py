"""Compressed models on their way to disk and back: to the bit, or refused by name."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressed_models import MIXTRAL_TINY, OPT_TINY, SAVE, make, zero_some
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import OPT, load_mixtral, load_opt, save_hf, save_opt
from models.opt import with_sparse_rows
from sparsellm.unstructured import Treatment, check_layers, compress, compressed_layers


@pytest.fixture(scope="module")
def compressed() -> OPT:
    return compress(zero_some(make(OPT_TINY)))


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
@pytest.mark.parametrize("kind", ["opt", "mixtral"])
def test_a_compressed_model_comes_back_to_the_bit(kind, form, tmp_path, compressed):
    model = compressed if kind == "opt" else compress(zero_some(make(MIXTRAL_TINY)))
    SAVE[form][kind](model, tmp_path / "a")
    loaded = (load_opt if kind == "opt" else load_mixtral)(tmp_path / "a")
    for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, loaded)), strict=True):
        assert x[...].dtype == y[...].dtype, path
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))
    for (name, x), (_, y) in zip(compressed_layers(model), compressed_layers(loaded), strict=True):
        assert (x.shape, x.dtype, x.cut, *x.named_parts()) == (y.shape, y.dtype, y.cut, *y.named_parts()), name
    SAVE[form][kind](loaded, tmp_path / "a", overwrite=True)


def test_bfloat16_and_an_empty_layer_come_back(tmp_path):
    model = zero_some(make(dataclasses.replace(OPT_TINY, layers=1, dtype="bfloat16", param_dtype="bfloat16")))
    model.layers[0].fc1.kernel[...] = jnp.zeros((24, 24), jnp.bfloat16)
    compress(model)
    save_opt(model, tmp_path / "a")
    loaded = load_opt(tmp_path / "a")
    for (name, x), (_, y) in zip(compressed_layers(model), compressed_layers(loaded), strict=True):
        np.testing.assert_array_equal(x.weights.to_dense(), y.weights.to_dense(), err_msg=name)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="a compressed model is loaded onto one device; got .* and a mesh"):
        load_opt(tmp_path / "a", mesh=mesh)
    with pytest.raises(ValueError, match="stay in the dtype they were saved in: .* dtype=bfloat16; got float32"):
        load_opt(tmp_path / "a", dtype="float32")


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_choices_for_dense_layers_are_refused(form, tmp_path, compressed):
    SAVE[form]["opt"](compressed, tmp_path / "a")
    with pytest.raises(ValueError, match="sparse_rows is for dense layers; those of .*/a are compressed: leave it out"):
        load_opt(tmp_path / "a", sparse_rows=8)
    with pytest.raises(ValueError, match="neuron_major is for dense layers|the layout of a dense model can be changed"):
        load_opt(tmp_path / "a", neuron_major=True)
    with pytest.raises(ValueError, match="sparse_rows takes dense layers; layers.0.fc1 is a Unstructured"):
        with_sparse_rows(load_opt(tmp_path / "a"), 8)


def weights_of_k_proj(model: OPT) -> Any:
    return dict(compressed_layers(model))["layers.0.self_attn.k_proj"].weights


@pytest.mark.parametrize("value_dtype", ["int8", "float8_e4m3fn"])
def test_eight_bits_come_back(value_dtype, tmp_path):
    model = zero_some(make(dataclasses.replace(OPT_TINY, layers=1)))
    compress(model, [("k_proj", Treatment(value_dtype=value_dtype, max_density=1.0))])
    save_opt(model, tmp_path / "a")
    before, after = (weights_of_k_proj(m) for m in (model, load_opt(tmp_path / "a")))
    assert after.values.dtype == value_dtype and after.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, before, after)
    save_hf(model, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, before, weights_of_k_proj(load_opt(tmp_path / "b")))


@pytest.mark.parametrize("save", [save_opt, save_hf])
def test_pairs_come_back(save, tmp_path):
    model = zero_some(make(dataclasses.replace(OPT_TINY, layers=1)))
    compress(model, [("k_proj", Treatment(paired=True))])
    save(model, tmp_path / "a")
    before, after = (weights_of_k_proj(m) for m in (model, load_opt(tmp_path / "a")))
    assert before.paired and after.paired
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(("paired", "found"), [(None, [False, True]), (True, [True, True]), (False, [False, False])])
def test_few_non_zeros_are_stored_in_pairs_unless_told_otherwise(paired, found):
    model = make(dataclasses.replace(OPT_TINY, layers=1, dtype="bfloat16"))
    layers = model.layers[0].fc1, model.layers[0].fc2
    for layer, every in zip(layers, (3, 5), strict=True):  # a third and a fifth of the weights are left
        kernel = layer.kernel[...]
        layer.kernel[...] = jnp.where(jnp.arange(kernel.size).reshape(kernel.shape) % every == 0, kernel, 0)
    compress(model, [("fc", Treatment(paired=paired))])
    assert [model.layers[0].fc1.paired, model.layers[0].fc2.paired] == found


def test_eight_bits_are_compressed_wherever_others_are():
    """In pairs they were timed up to that density. A given limit holds."""
    for treatment in Treatment(), Treatment(value_dtype="int8"):
        assert treatment.compresses(0.5) and not treatment.compresses(0.7)
    assert Treatment(value_dtype="int8", max_density=0.7).compresses(0.7)


def test_eight_bits_are_stored_in_pairs_unless_single_ones_are_asked_for():
    for density in (0.1, 0.5):
        assert Treatment(value_dtype="int8").pairs(density, "float16")
        assert not Treatment(value_dtype="int8", paired=False).pairs(density, "float16")


@pytest.mark.parametrize("value_dtype", [None, "int8"])
def test_what_no_kernel_takes_is_stored_in_pairs_only_when_asked_for(value_dtype):
    """Pairs take more bytes, and XLA does not gain by them."""
    kernel = np.zeros((64, 64), np.float32)
    kernel[::8] = 1
    for dtype, paired, found in ((None, None, False), (jnp.bfloat16, None, True), (None, True, True)):
        layer = nnx.Linear(64, 64, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))
        layer.kernel[...] = jnp.asarray(kernel)
        model = compress(nnx.List([layer]), [("", Treatment(value_dtype=value_dtype, paired=paired))])
        assert [layer.paired for _, layer in compressed_layers(model)] == [found]


def test_transformers_is_not_led_to_believe_that_it_can_load_it(tmp_path, compressed):
    save_hf(compressed, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "opt-unstructured"


@pytest.fixture
def saved(tmp_path, compressed) -> Path:
    save_hf(compressed, tmp_path / "a")
    return tmp_path / "a"


def edit_layout(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["unstructured"]["layers.1.fc2"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [-1, 1 << 20, np.iinfo(np.int32).max])
def test_counts_and_offsets_are_checked_before_a_kernel_reads_them(saved, damage):
    tensors = load_file(saved / "model.safetensors")
    prefix = "model.decoder.layers.1.fc2.parts."
    kinds = {name: x for name, x in tensors.items() if name.startswith(prefix) and x.dtype.kind == "i"}
    assert kinds
    for name, array in kinds.items():
        broken = array.copy()
        broken.reshape(-1)[-1] = damage
        save_file(tensors | {name: broken}, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"compressed layer layers.1.fc2 in .* is damaged: "):
            load_opt(saved)


def test_missing_and_shortened_arrays_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    name = "layers.1.fc2.parts.values"
    values = tensors.pop("model.decoder." + name)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing {name}"):
        load_opt(saved)
    short = tensors | {"model.decoder." + name: values[:1]}
    save_file(short, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"misshapen {name}"):
        load_opt(saved)
    edit_layout(saved, lambda layout: layout["arrays"]["values"].__setitem__(1, [1, 64]))
    with pytest.raises(ValueError, match=r"layers.1.fc2 in .* is damaged"):
        load_opt(saved)


@pytest.mark.parametrize("part", ["values", "masks", "rows", "lags"])
def test_a_part_that_layout_and_file_both_lack_is_named(saved, part):
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"model.decoder.layers.1.fc2.parts.{part}"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    edit_layout(saved, lambda layout: layout["arrays"].pop(part))
    with pytest.raises(ValueError, match=rf"layers.1.fc2 in .* is damaged: {part} must be there"):
        load_opt(saved)


def test_values_that_were_changed_are_found(saved):
    """Any of them is as sound as another; but not what was saved. Without a checksum, as older files, it is taken."""
    tensors, name = load_file(saved / "model.safetensors"), "model.decoder.layers.1.fc2.parts.values"
    tensors[name].reshape(-1)[0] += 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.fc2 in .* is damaged: its arrays have the checksum"):
        load_opt(saved)
    edit_layout(saved, lambda layout: layout.pop("checksum"))
    load_opt(saved)


def test_arrays_of_another_dtype_are_not_cast(saved, tmp_path, compressed):
    """Bits are no numbers; and what wraps around may be sound again."""
    tensors, name = load_file(saved / "model.safetensors"), "model.decoder.layers.1.fc2.parts.lags"
    tensors[name] = tensors[name].astype(np.int32) + 256
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.fc2.parts.lags in .* must be of dtype U8; got I32"):
        load_opt(saved)
    edit_layout(saved, lambda layout: layout["arrays"]["lags"].__setitem__(0, "int16"))  # which no array of one has
    with pytest.raises(ValueError, match=r"layers.1.fc2.parts.lags in .* must be of dtype I16; got I32"):
        load_opt(saved)
    save_opt(compressed, tmp_path / "native")
    edit_layout(tmp_path / "native", lambda layout: layout["arrays"]["rows"].__setitem__(0, "int16"))
    with pytest.raises(ValueError, match=r"layers.1.fc2.parts.rows in .* must be of dtype int16; got int32"):
        load_opt(tmp_path / "native")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_files_of_orbax_that_are_lost_are_said(tmp_path, compressed, damage, abandoned_reads):
    save_opt(compressed, tmp_path / "a")
    lost = list((tmp_path / "a").glob("orbax/**/ocdbt.process_0/d/*"))
    assert lost
    for path in lost:
        damage(path)
    with pytest.raises(ValueError, match="the checkpoint .* is damaged or incomplete"):
        load_opt(tmp_path / "a")


def test_a_truncated_file_is_refused(saved):
    path = saved / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_opt(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: layout.pop("shape"),
        lambda layout: layout.update(arrays=[]),
        lambda layout: layout["arrays"].update(more=["int32", [3]]),
        lambda layout: layout["arrays"].update(values=["floaty", [3]]),
        lambda layout: layout["arrays"].update(values=["float32", [-3]]),
        lambda layout: layout.update(shape="24x24"),
        lambda layout: layout.update(paired="yes"),
    ],
)
def test_a_damaged_layout_is_named(saved, change):
    edit_layout(saved, change)
    with pytest.raises(ValueError, match=r"layers.1.fc2 in .* (is damaged|must be of shape)"):
        load_opt(saved)


@pytest.mark.parametrize("layouts", [["layers.1.fc2"], "none", 3])
def test_layouts_that_are_none(saved, layouts):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"unstructured": layouts}))
    with pytest.raises(ValueError, match="layouts of compressed layers in .* must be an object by layer; got"):
        load_opt(saved)


def test_a_layout_of_another_model(saved):
    config = json.loads((saved / "config.json").read_text())
    layouts = config["unstructured"]
    layouts["layers.1.fc2"]["shape"] = [24, 25]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers.1.fc2 in .* must be of shape \(24, 24\); got \(24, 25\)"):
        load_opt(saved)
    layouts.clear()
    layouts["layers.7.fc2"] = {}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be linear layers of the model; got layers.7.fc2"):
        load_opt(saved)


def test_a_wrong_part_in_memory_is_found(compressed):
    model = nnx.merge(*nnx.split(compressed))
    check_layers(model, {}, "memory")
    array = model.layers[0].fc1.parts.values
    array.set_value(array[...][:1])
    with pytest.raises(ValueError, match="compressed layer layers.0.fc1 in memory is damaged"):
        check_layers(model, {}, "memory")
