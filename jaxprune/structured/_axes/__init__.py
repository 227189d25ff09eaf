"""What a function does along each axis of its parameters, read from its jaxpr. Private."""
