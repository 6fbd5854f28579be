"""What every test runs under: shapes checked, no silent promotion, CPU unless the GPU is asked for."""

import gc
import os
import sys
import time
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

PACKAGES = ("sparsellm", "pallas_kernels", "models", "experiments")

# Before any of them is imported: every jaxtyping annotation in them is checked at call time.
install_import_hook(PACKAGES, "beartype.beartype")

MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000  # a compiled program takes some, and a process may have 65,530: past that, LLVM ends with a fault

hypothesis.settings.register_profile("sparsellm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsellm")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


os.environ["NPROC"] = (
    "64"  # XLA's threads: the interpreter's wait for each other within them, more than a CI machine has
)


def _asks_for_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr.strip() == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    if not _asks_for_gpu(config):
        jax.config.update("jax_platforms", "cpu")
        os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
        # Most of what a test on a CPU waits for is XLA's compiler, and its optimizations are most of that.
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for those processes too: some compare their bits
        _keep_programs(config)


def _keep_programs(config: pytest.Config) -> None:
    """What is compiled is kept in pytest's cache, for all workers, for processes that tests start, and the next run."""
    if getattr(config, "cache", None) is None:  # -p no:cacheprovider
        return
    kept = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests are left out unless asked for, and then skip where there is no GPU."""
    if not config.option.markexpr:
        gpu_items = [item for item in items if item.get_closest_marker("gpu")]
        if gpu_items:
            config.hook.pytest_deselected(items=gpu_items)
            items[:] = [item for item in items if item not in gpu_items]
    elif _asks_for_gpu(config) and jax.default_backend() != "gpu":
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that jax can use"))


def pytest_collection_finish() -> None:
    """Python looks for cycles less often, and never again in what is imported: that took 6% of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(500_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops what was compiled once there is much of it."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def abandoned_reads(monkeypatch):
    """For tests in which Orbax fails: it closes the loop of reads that are under way, which then complain to nobody."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    time.sleep(0.3)
    gc.collect()


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks, as outside pytest: for tests of what a function itself says to wrong shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def getkey():
    """A function that gives a fresh PRNG key at every call, the same ones in every run."""
    key = jax.random.key(0)
    count = 0

    def next_key() -> jax.Array:
        nonlocal count
        count += 1
        return jax.random.fold_in(key, count)

    return next_key
