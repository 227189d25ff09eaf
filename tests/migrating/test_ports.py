"""The training scripts that the page for those who come from JaxPruner ports: they train, they prune, the lines are as many."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxprune

PAGE = (Path(__file__).parents[2] / "docs" / "migrating" / "jaxpruner.md").read_text()
PORTS = PAGE.partition("## Three scripts, ported")[2]


def marked(code: str) -> int:
    return len(re.findall(r"# <$", code, re.MULTILINE))


def test_the_table_counts_the_lines_that_are_marked() -> None:
    stated = re.findall(r"\| (\d+) \([^|]*\) \| (\d+) \|", PORTS)
    before, after = (re.findall(rf"```{kind}\n(.*?)```", PORTS, re.DOTALL) for kind in ("text", "python"))
    assert len(stated) == 3
    assert [(marked(a), marked(b)) for a, b in zip(before, after, strict=True)] == [(int(a), int(b)) for a, b in stated]


@pytest.mark.slow
def test_they_train_and_prune() -> None:
    names: dict[str, Any] = {}
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
        images, labels = names["images"], names["labels"]
        logits = names["model"].apply({"params": names["state"].params}, images)
        federated = names["forward"](names["federated"], images.reshape(-1, 64))
    accuracies = [float(jnp.mean(found.argmax(-1) == labels)) for found in (logits, federated)]
    assert accuracies[0] > 0.8, accuracies
    assert accuracies[1] > 0.6, accuracies
    assert names["losses"][-1] < 0.4 * names["losses"][0]

    trained = [
        (names["state"].params, jaxprune.masks_in(names["state"].opt_state), 0.95),
        (names["federated"], jaxprune.masks_in(names["server_state"]), 0.8),
        (names["sparse_rnn"], names["masked"](names["rnn_state"].params, names["rnn_state"].step), 0.9),
    ]
    for params, masks, expected in trained:
        assert float(jaxprune.sparsity(masks)) == pytest.approx(expected, abs=1e-3)
        jaxprune.algebra.require_pruned(params, masks)
