"""What a function does with its parameters, read from its jaxpr; the only package that knows jaxprs."""
