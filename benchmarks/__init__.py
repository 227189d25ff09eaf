"""Measurements, never part of the tests: ``python -m benchmarks.masks``. They use the examples' networks and data."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
