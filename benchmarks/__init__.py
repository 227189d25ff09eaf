"""Benchmarks: they measure and print ratios, each run as `python -m benchmarks.masks`; never part of the tests."""
