"""Every public function under each of JAX's flags, and on Auto and Explicit meshes: what it returns without, on one device.

A public function without an entry in `tests/support/every_function.py` fails here.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.support.every_function import CALLS, Problem
from tests.test_public_names import public


@contextlib.contextmanager
def checks() -> Iterator[None]:
    # At once: which of them it was that failed is soon seen, and each alone would compile everything again.
    with jax.enable_x64(True), jax.debug_nans(True), jax.checking_leaks():
        yield


# All of them, and the meshes, where dtypes and ranks are never promoted: so says `conftest.py`.
FLAGS = {
    "x64, NaN and leaks": checks,
    "no jit": jax.disable_jit,
}
MESHES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A problem for each setting, whose evidence its functions share."""

    @functools.cache
    def problem(setting: str) -> Problem:
        mesh = None
        if setting in MESHES:
            mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(MESHES[setting],) * 2)
        return Problem(tmp_path_factory.mktemp(setting.replace(", ", "_").replace(" ", "_")), mesh)

    return problem


@pytest.fixture(scope="module")
def expected(folders: Any) -> Any:
    """What each function returns without flags, on one device."""

    @functools.cache
    def of(name: str) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return read(CALLS[name](folders("expected")))

    return of


def read(result: Any) -> list[Any]:
    """The numbers of a result, as NumPy has them; what is no number as it is."""
    return [np.asarray(leaf) if hasattr(leaf, "dtype") else leaf for leaf in jax.tree.leaves(result)]


def test_every_public_function_has_an_entry() -> None:
    functions = {name for name, thing in public().items() if callable(thing) and not inspect.isclass(thing)}
    assert functions - {"jaxprune.jaxtyping"} == set(CALLS)  # which the hook that checks shapes puts there


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("setting", [*FLAGS, *MESHES])
def test_the_same_under_every_flag_and_on_every_mesh(setting: str, name: str, folders: Any, expected: Any) -> None:
    wanted = expected(name)
    problem = folders(setting)
    # JAX itself takes gradients on an Explicit mesh only where it is set.
    entered = jax.set_mesh(problem.mesh) if problem.mesh is not None else FLAGS[setting]()
    with entered:
        found = read(CALLS[name](problem))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, np.ndarray | float):
            assert a == b
        elif np.asarray(b).dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            assert np.shape(a) == np.shape(b)
            np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-4, atol=1e-5)
