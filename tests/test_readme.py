"""README's code runs as it stands there."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_has_code():
    assert len(BLOCKS) == 6


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z]{5,}$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=["use", "write", "model", "experts", "weights", "predictors"])
def test_code_runs_in_a_users_settings(code):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, str(README), "exec"), {"__name__": "readme"})  # the blocks hold their own assertions
