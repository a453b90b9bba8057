"""``seemore-fast benchmark``: the package's own comparisons."""

import argparse
import importlib

from .exits import DONE

HELP = "Measure speeds on this machine, compare and report them, or tune the choice of backends for this GPU."
KINDS = {
    "kernels": "operators",
    "inference": "inference",
    "training": "training",
    "loop": "loop",
    "upscaling": "upscaling",
    "compare": "compare",
    "report": "report",
    "tune": "tune_backends",
}  # the modules of seemore_fast.benchmarks


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the kinds of comparison; their modules declare the other arguments."""
    parser.add_argument("kind", choices=KINDS, help="measurement, or use of its results")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options: see KIND --help")


def run(options: argparse.Namespace) -> int:
    """Run one comparison, which ends the process itself if it fails."""
    module = importlib.import_module(f"seemore_fast.benchmarks.{KINDS[options.kind]}")
    module.main(options.arguments, prog=f"seemore-fast benchmark {options.kind}")
    return DONE
