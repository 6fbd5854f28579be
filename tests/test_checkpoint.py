import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsellm import checkpoint
from sparsellm.checkpoint import load_checkpoint, load_config, save_checkpoint

FULL_DISK = "RESOURCE_EXHAUSTED: Failed writing: \".../d/61d9\": No space left on device [os_error_code='28']"


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training_state():
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5, jnp.bfloat16)}
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": 3}


def test_training_state_comes_back(tmp_path):
    state = training_state()
    save_checkpoint(tmp_path / "a" / "b", {"x": [1, 2]}, state)
    loaded = load_checkpoint(tmp_path / "a" / "b", state | {"step": 0})
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    assert load_config(tmp_path / "a" / "b") == {"x": [1, 2]}
    assert os.listdir(tmp_path / "a") == ["b"]


def test_arrays_are_cast_as_they_are_loaded(tmp_path):
    save_checkpoint(tmp_path / "a", {}, {"w": jnp.arange(5.0)})
    loaded = load_checkpoint(tmp_path / "a", {"w": jax.ShapeDtypeStruct((5,), jnp.bfloat16)})
    assert loaded["w"].dtype == jnp.bfloat16 and loaded["w"].tolist() == [0, 1, 2, 3, 4]


def test_every_wrong_array_is_named(tmp_path):
    save_checkpoint(tmp_path / "a", {}, training_state()["params"] | {"old": jnp.ones(2)})
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "a", {"w": jnp.ones((4, 3)), "b": jnp.ones(5), "new": jnp.ones(7)})
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == ["missing new (7,)", "extra old (2,)", "misshapen w: expected (4, 3), found (3, 4)"]


def test_an_existing_folder_is_kept(tmp_path):
    save_checkpoint(tmp_path / "a", {"n": 1}, {"w": jnp.ones(3)})
    with pytest.raises(FileExistsError, match="must be new or empty; .*/a is not"):
        save_checkpoint(tmp_path / "a", {"n": 2}, {"w": jnp.ones(3)})
    assert load_config(tmp_path / "a") == {"n": 1}
    save_checkpoint(tmp_path / "a", {"n": 3}, {"v": jnp.zeros(3)}, overwrite=True)
    assert load_config(tmp_path / "a") == {"n": 3}
    assert load_checkpoint(tmp_path / "a", {"v": jnp.ones(3)})["v"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == ["a"]


def test_only_a_checkpoint_is_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="holds no config.json"):
        save_checkpoint(tmp_path, {}, {"w": jnp.ones(3)}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder .*nowhere"):
        load_checkpoint(tmp_path / "nowhere", {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold config.json and orbax/"):
        load_checkpoint(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must hold JSON"):
        load_config(tmp_path)


def test_a_truncated_checkpoint(tmp_path, abandoned_reads):
    save_checkpoint(tmp_path / "a", {}, {"w": jax.random.normal(jax.random.key(0), (1000,))})
    for path in (tmp_path / "a" / "orbax").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_checkpoint(tmp_path / "a", {"w": jnp.ones(1000)})


@pytest.mark.parametrize("failure", [ValueError(FULL_DISK), OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, failure):
    """With what Orbax raised on a full tmpfs, in the middle of writing."""
    save_checkpoint(tmp_path / "a", {"n": 1}, {"w": jnp.ones(3)})
    before = everything_in(tmp_path)

    def fail(path, state):
        Path(path).mkdir()
        (Path(path) / "half").write_text("written")
        raise failure

    monkeypatch.setattr(checkpoint.ocp, "save", fail)
    with pytest.raises(OSError, match="no space left on the device for .*/a; .* Free some space") as error:
        save_checkpoint(tmp_path / "a", {"n": 2}, {"w": jnp.ones(3)}, overwrite=True)
    assert error.value.errno == errno.ENOSPC
    assert everything_in(tmp_path) == before


KILLED = """
import os, signal
from sparsellm.checkpoint import whole_folder
with whole_folder(folder, overwrite=True) as temporary:
    (temporary / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_writing(tmp_path):
    save_checkpoint(tmp_path / "a", {"n": 1}, {"w": jnp.ones(3)})
    script = f"folder = {str(tmp_path / 'a')!r}\n" + KILLED
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert load_config(tmp_path / "a") == {"n": 1}
    assert load_checkpoint(tmp_path / "a", {"w": jnp.zeros(3)})["w"].tolist() == [1, 1, 1]
    save_checkpoint(tmp_path / "a", {"n": 2}, {"w": jnp.ones(3)}, overwrite=True)
    assert load_config(tmp_path / "a") == {"n": 2} and os.listdir(tmp_path) == ["a"]


def test_killed_between_the_two_renames(tmp_path):
    """The old checkpoint has been moved aside and the new one is not in its place yet."""
    save_checkpoint(tmp_path / "a", {"n": 1}, {"w": jnp.ones(3)})
    (tmp_path / "a").rename(tmp_path / ".a.replaced")
    assert load_config(tmp_path / "a") == {"n": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_killed_while_removing_what_was_replaced(tmp_path, monkeypatch):
    """What is left of it neither stands in the way nor comes back."""
    save_checkpoint(tmp_path / "a", {"n": 1}, {"w": jnp.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
        save_checkpoint(tmp_path / "a", {"n": 2}, {"w": jnp.ones(3)}, overwrite=True)
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert not checkpoint.is_checkpoint(tmp_path / "a")
    (tmp_path / "elsewhere").rename(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / ".a.replaced")  # killed before it had another name
    save_checkpoint(tmp_path / "a", {"n": 3}, {"w": jnp.ones(3)}, overwrite=True)
    assert load_config(tmp_path / "a") == {"n": 3} and os.listdir(tmp_path) == ["a"]


def test_interrupted_while_writing(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint.whole_folder(tmp_path / "a") as temporary:
        (temporary / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
