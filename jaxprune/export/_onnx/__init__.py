"""ONNX files: a function made simpler, converted, and what its runtime refuses changed."""
