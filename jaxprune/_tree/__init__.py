"""Any pytree read once: paths, which leaves, which axes, sharding. Private."""
