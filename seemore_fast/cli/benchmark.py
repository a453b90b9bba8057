"""``seemore-fast benchmark``: the comparisons that come with the package."""

import argparse
import importlib

from .exits import DONE

HELP = "Measure speeds on this machine, compare and report them; or tune: find the quickest backends of this GPU."
KINDS = {
    "kernels": "compare_kernels",
    "inference": "compare_peers",
    "training": "compare_training",
    "loop": "training_loop",
    "upscaling": "upscaling",
    "compare": "compare_results",
    "report": "report",
    "tune": "tune_backends",
}  # the modules of seemore_fast.benchmarks


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments: the comparison's own are its module's."""
    parser.add_argument("kind", choices=KINDS, help="what to measure, or what to do with the figures")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options: add --help for a list")


def run(options: argparse.Namespace) -> int:
    """Run one comparison; it ends the process itself where ours is wrong."""
    module = importlib.import_module(f"seemore_fast.benchmarks.{KINDS[options.kind]}")
    module.main(options.arguments, prog=f"seemore-fast benchmark {options.kind}")
    return DONE
