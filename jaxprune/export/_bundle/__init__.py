"""Bundles: a function with its parameters in one file."""
