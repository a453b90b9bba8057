"""Find out which backend is the quickest for each operator on this GPU, and note it for "auto".

    seemore-fast benchmark tune        (or: python benchmarks/tune_backends.py)

Every backend's results are checked before it is timed; one that is wrong gets no place. What counts is the time of one
forward pass at 480x640 pixels and of forward and backward of a training batch. `--output` says where the table goes
(`seemore_fast/backends/preferences.py` tells where it is looked for).
"""

import argparse
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from seemore_fast.backends import preferences
from seemore_fast.benchmarks import command, harness, operators

STEMS = (
    "striped_conv", "calibrate", "router", "norm_pointwise", "norm_conv3x3", "gated_ffn", "low_rank_experts",
)  # fmt: skip
REFERENCE = "torch eager"


def settings_of(module, quick: bool) -> list:
    """Return a benchmark's settings that count: a photo forward, training patches in both directions."""
    if quick:
        return [setting for setting in module.CASES["quick"].values() if setting.mode == "both"][:1]
    wanted = {(operators.PHOTO, "forward"), (operators.PATCHES, "both")}
    return [setting for setting in module.CASES["cuda"].values() if (setting.shape, setting.mode) in wanted]


def order(times: dict[tuple, dict[str, float]]) -> list[str]:
    """Return the backends that have a time in all settings, the smallest sum first."""
    everywhere = set.intersection(*map(set, times.values()))
    return sorted(everywhere, key=lambda name: sum(line[name] for line in times.values()))


def times_of(lines: dict[str, dict]) -> dict[str, float]:
    """Return the milliseconds of each backend in one table; of eager PyTorch, the better layout's."""
    times = {}
    for name, line in lines.items():
        is_ours = name.startswith(harness.OURS) and not name.endswith(harness.IN_A_GRAPH)
        if "ms" in line and (is_ours or name.startswith(REFERENCE)):
            backend = name.split()[1] if is_ours else "reference"
            times[backend] = min(line["ms"], times.get(backend, line["ms"]))
    return times


def measure(stems: list[str], device: torch.device, options) -> Iterator[dict[str, dict[str, list[str]]]]:
    """Yield {operator: {dtype: backends, quickest first}}, operator by operator."""
    for stem in stems:
        module, times = importlib.import_module(f"seemore_fast.benchmarks.bench_{stem}"), defaultdict(dict)
        for setting in settings_of(module, options.quick):
            lines = harness.run_case(module.build(setting, device, options), device, options.runs)
            command.print_table(f"{stem} {setting.title()}", lines)
            times[str(setting.dtype).removeprefix("torch.")][setting] = times_of(lines)
        orders = {dtype: order(of_dtype) for dtype, of_dtype in times.items()}
        print(f"{stem}: {orders}", flush=True)
        yield {stem: orders}


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--operators", nargs="*", choices=STEMS, default=list(STEMS), metavar="STEM")
    parser.add_argument("--output", type=Path, default=preferences.user_file(), help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--quick", action="store_true", help="tiny images, to see that it runs; writes to --output only"
    )
    parser.set_defaults(compile=False, instruction_sets=False)
    options = parser.parse_args(arguments)
    command.check_numbers(parser, options, ["cpu", "cuda"])
    if options.quick and options.output == preferences.user_file():
        parser.error("--quick measures nothing that should be gone by: say with --output where to write")
    if options.output is None:
        parser.error("there is no home folder to write to: give --output, or set SEEMORE_FAST_PREFERENCES")
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for operator in measure(options.operators, device, options):
        preferences.write(options.output, name, operator)  # now: whoever stops us keeps what there is
    print(f"\ntable in {options.output}")


if __name__ == "__main__":
    main()
