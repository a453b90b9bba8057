"""Helpers that several test modules share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BENCHMARKS = ROOT / "benchmarks"
