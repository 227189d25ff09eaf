"""Keep results sharded as the arrays they belong to, on Auto and on Explicit meshes."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharded_as(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Return `mask`, sharded as `like`, an array of the same shape.

    Under jit on an Auto mesh the compiler shards each result as the arrays it is made from. A mask made from few
    numbers (one a channel, or none) would come out replicated; this choice between the mask and itself ties it to
    `like` and is gone from the compiled program.
    """
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(mask, sharding)
    return jnp.where(like != like, mask, mask)


def without_explicit_axes(
    function: Callable[..., Any], like: Any, shape: tuple[int, ...] | None = None
) -> Callable[..., Any]:
    """Let `function` regroup the entries of an array whose axes are sharded explicitly.

    Reshapes and windows of a sharded axis are refused on an Explicit mesh; there the function runs with the axes
    given to the compiler, and its result (or each of several) gets the sharding of `like`. Where the result has another `shape`, an axis
    that cannot be divided in the same way stays whole, and so does one behind those of `like`.
    """
    sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like).sharding
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=_fitted(sharding, like.shape if shape is None else shape))


def through_compiler(function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function of trees of arrays; where any of them has explicit axes, with all axes given to the compiler.

    What mixes axes in ways that sharding in types does not follow runs there as on an Auto mesh. Its results are then the
    same on every device.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    explicit = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if explicit is None:
        return function(*operands)
    return jax.sharding.auto_axes(function, out_sharding=NamedSharding(explicit, PartitionSpec()))(*operands)


def _fitted(sharding: Any, shape: tuple[int, ...]) -> NamedSharding:
    def parts(axes: Any) -> int:
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        return math.prod(sharding.mesh.shape[name] for name in names)

    known = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    spec = [axes if n % parts(axes) == 0 else None for axes, n in zip(known, shape, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def whole(array: jax.Array) -> jax.Array:
    """Return a small array that can be regrouped: not sharded, where shards are explicit."""
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*[None] * array.ndim)))
    return array
