"""The README's code runs as it stands."""

import re
import warnings
from pathlib import Path

import jax
import pytest

import jaxprune

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_python_blocks_run_in_order_and_keep_pruned_weights_at_zero(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves a file
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    # As users have it.
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("error")
        exec(blocks[0], names)
        kept = jaxprune.apply_masks(names["params"], names["masks"])
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), kept, names["params"]))
        assert 0.6 < float(jaxprune.sparsity(names["masks"])) < 0.75
        for block in blocks[1:]:
            warnings.simplefilter("ignore", jaxprune.rules.PruningWarning)
            exec(block, names)


@pytest.mark.parametrize("marker", ["examples/cnn.py", "pytest"])
def test_there_is_exactly_one_command_for_each_job(marker):
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [marker in command for command in commands].count(True) == 1
