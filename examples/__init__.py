"""Examples: one script each, run as `python examples/cnn.py` or `python -m examples.cnn`."""
