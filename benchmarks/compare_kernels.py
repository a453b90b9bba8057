"""Time every operator: each backend here, eager PyTorch in two layouts, and what this machine reaches at best.

    seemore-fast benchmark kernels          (or: python benchmarks/compare_kernels.py)

Results and gradients of all are compared with the reference in float64 before any timing. A complete run writes a file
of figures for each operator; `pytest benchmarks/` times the same cases with pytest-benchmark.
"""

import argparse
import importlib

import torch

from seemore_fast import ops
from seemore_fast.benchmarks import command


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="time torch.compile")
    parser.add_argument(
        "--operators", nargs="+", choices=ops.__all__, default=ops.__all__, metavar="NAME", help="default: all"
    )
    command.add_options(parser)
    options, wrong = parser.parse_args(arguments), []
    modules = {stem: importlib.import_module(f"seemore_fast.benchmarks.bench_{stem}") for stem in options.operators}
    command.check(parser, options, *(module.CASES for module in modules.values()))
    modules = {stem: module for stem, module in modules.items() if command.choose(options, module.CASES)}
    for stem, module in modules.items():
        print(f"\n{stem}")
        if not command.run_cases(stem, options, module.CASES, module.build):
            wrong.append(stem)
    if wrong:
        raise SystemExit(f"seemore-fast is wrong or fails in {', '.join(wrong)}: see above")


if __name__ == "__main__":
    main()
