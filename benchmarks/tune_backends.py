"""Find the fastest backend of each operator on this GPU, and store the order for "auto".

    seemore-fast benchmark tune        (or: python benchmarks/tune_backends.py)

Every backend's results are checked before it is timed; a wrong one is left out. The order is by the time of a forward
pass at 480x640 pixels and of forward and backward of a training batch. `seemore_fast/backends/preferences.py` describes
the table that is written.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from seemore_fast.backends import KERNELS, preferences
from seemore_fast.benchmarks import command, harness, operators
from seemore_fast.benchmarks.cases import OPERATORS, PATCHES, PHOTO, Operator, Setting

TUNED = [name for name in OPERATORS if name in KERNELS]
REFERENCE = "torch eager"


def settings_of(operator: Operator, quick: bool) -> list[Setting]:
    """Return the settings that count: a photo forward, training patches in both directions."""
    cases = operator.cases()
    if quick:
        return [setting for setting in cases["quick"].values() if setting.mode == "both"][:1]
    wanted = {(PHOTO, "forward"), (PATCHES, "both")}
    return [setting for setting in cases["cuda"].values() if (setting.shape, setting.mode) in wanted]


def order(times: dict[tuple, dict[str, float]]) -> list[str]:
    """Return the backends that have a time in all settings, the smallest sum first."""
    everywhere = set.intersection(*map(set, times.values()))
    return sorted(everywhere, key=lambda name: sum(row[name] for row in times.values()))


def times_of(rows: dict[str, dict]) -> dict[str, float]:
    """Return the milliseconds of each backend in one table; for eager PyTorch, those of the faster layout."""
    times = {}
    for name, row in rows.items():
        is_ours = name.startswith(harness.OURS) and not name.endswith(harness.IN_A_GRAPH)
        if "ms" in row and (is_ours or name.startswith(REFERENCE)):
            backend = name.split()[1] if is_ours else "reference"
            times[backend] = min(row["ms"], times.get(backend, row["ms"]))
    return times


def measure(names: list[str], device: torch.device, options) -> Iterator[dict[str, dict[str, list[str]]]]:
    """Yield {operator: {dtype: backends, fastest first}}, operator by operator."""
    for name in names:
        times = defaultdict(dict)
        for setting in settings_of(OPERATORS[name], options.quick):
            rows = harness.run_case(operators.build(name, setting, device, options), device, options.runs)
            command.print_table(f"{name} {setting.title()}", rows)
            times[str(setting.dtype).removeprefix("torch.")][setting] = times_of(rows)
        orders = {dtype: order(of_dtype) for dtype, of_dtype in times.items()}
        print(f"{name}: {orders}", flush=True)
        yield {name: orders}


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--operators", nargs="*", choices=TUNED, default=TUNED, metavar="NAME")
    parser.add_argument("--output", type=Path, default=preferences.user_file(), help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny images, to try the command; needs --output")
    parser.set_defaults(compile=False, instruction_sets=False)
    options = parser.parse_args(arguments)
    command.check_numbers(parser, options, ["cpu", "cuda"])
    if options.quick and options.output == preferences.user_file():
        parser.error("--quick does not measure real sizes: give another file with --output")
    if options.output is None:
        parser.error("there is no home folder to write to: give --output, or set SEEMORE_FAST_PREFERENCES")
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for operator in measure(options.operators, device, options):
        preferences.write(options.output, name, operator)  # after every operator: an interrupted run keeps its orders
    print(f"\ntable in {options.output}")


if __name__ == "__main__":
    main()
