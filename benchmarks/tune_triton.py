"""Choose the tiles of Triton's kernels and write them to kernels/configurations.json.

    python benchmarks/tune_triton.py                            on a GPU: the fastest configurations for it
    python benchmarks/tune_triton.py --seconds 300              the same, the most important ones first, in that time
    python benchmarks/tune_triton.py --architectures 80 90      anywhere: the first configurations that fit the
                                                                registers, by compilation alone

The table is written after each kernel, whose configurations compile in parallel. Without timing, the order of
preference is an estimate: tiles as large as registers allow, two warps each.
"""

import argparse
import importlib
import json
import math
import os
import pkgutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from seemore_fast import kernels
from seemore_fast.io.atomic import replacing
from seemore_fast.kernels import configurations
from seemore_fast.kernels.configurations import Configuration
from seemore_fast.kernels.launch import Launch

PREFERRED = [
    Configuration(*c) for c in [(128, 2), (64, 2), (32, 2), (32, 2, 1, 255), (16, 2), (32, 4), (16, 4), (32, 8)]
]
TIMED = [
    Configuration(pixels, warps, stages)
    for pixels in (16, 32, 64, 128)
    for warps in (2, 4, 8)
    for stages in (1, 2)
    if pixels >= 8 * warps
]
MAX_SHARED = 99 * 1024  # bytes per block on every architecture
DTYPES = {"2 bytes": torch.bfloat16, "4 bytes": torch.float32}
CHANNELS = {"": 36, ", many channels": 64}
SIZE = (480, 640)
FIRST = ("gated_ffn forward", "norm_conv3x3 forward", "norm_pointwise forward")  # most of the time of inference


@contextmanager
def override(name: str, chosen: Configuration):
    """Replace the table's configuration of kernel `name`."""
    choose = configurations.choose
    configurations.choose = lambda kernel, *rest: chosen if kernel == name else choose(kernel, *rest)
    try:
        yield
    finally:
        configurations.choose = choose


def launches(x: torch.Tensor) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of all operators for images like x, by name."""
    for module in pkgutil.iter_modules(kernels.__path__):
        loaded = importlib.import_module(f"seemore_fast.kernels.{module.name}")
        if hasattr(loaded, "specializations"):
            yield from ((f"{module.name} {name}", launch) for name, launch in loaded.specializations(x))


def launches_of(name: str, chosen: Configuration, x: torch.Tensor) -> list[Launch]:
    """Return the different launches that use the configuration of kernel `name`."""
    found = {}
    with override(name, chosen):
        chosen_launches = list(launches(x))
    with override(name, Configuration(chosen.pixels * 2, chosen.warps * 2)):  # launches that differ use it
        for (_, launch), (_, other) in zip(chosen_launches, launches(x), strict=True):
            if (launch.num_warps, launch.arguments.get("PIXELS")) != (other.num_warps, other.arguments.get("PIXELS")):
                found.setdefault(repr((launch.kernel.__name__, launch.specialization())), launch)
    return list(found.values())


def fits(launch: Launch, architecture: int) -> bool:
    """Return whether a kernel compiles, does not spill and fits the shared memory.

    Products have to be mma.sync: for matrices this small wgmma and tcgen05 gain nothing, and compilers err in them.
    """
    try:
        compiled = launch.compile_for(architecture)
    except Exception as error:  # of the compiler, whose type depends on its version
        print(f"  {launch.kernel.__name__}: {error}".splitlines()[0])
        return False
    resources = compiled.resources()
    uses_mma = not any(name in compiled.ptx for name in ("wgmma", "tcgen05"))
    return resources.local == 0 and resources.shared <= MAX_SHARED and uses_mma


def first_that_fits(name: str, x: torch.Tensor, architecture: int, current: Configuration) -> Configuration | None:
    for chosen in PREFERRED:
        if all(fits(launch, architecture) for launch in launches_of(name, chosen, x)):
            return chosen
    return None


def fastest(name: str, x: torch.Tensor, architecture: int, current: Configuration) -> Configuration | None:
    """Return the configuration with the smallest sum of times, among them the current one; None if none fits."""
    from triton.testing import do_bench

    candidates = {chosen: launches_of(name, chosen, x) for chosen in dict.fromkeys([current, *TIMED])}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fitting = {c: [pool.submit(fits, launch, architecture) for launch in candidates[c]] for c in candidates}
    times = {}
    for chosen, found in fitting.items():
        if all(future.result() for future in found):
            timed = (do_bench(launch.run, warmup=5, rep=20, return_mode="median") for launch in candidates[chosen])
            times[chosen] = sum(timed)
    print("  ", {tuple(chosen): round(ms, 4) for chosen, ms in sorted(times.items(), key=lambda item: item[1])[:4]})
    return min(times, key=times.get, default=None)


def by_value(entries: dict[str, dict], names: list[str] | None) -> list[tuple[str, str, str]]:
    """Return (kernel, size, tier) of all entries, the most important first: 16 bits, T's channels and forward."""
    rank = {name: number for number, name in enumerate(FIRST)}
    ordered = sorted(names or entries, key=lambda name: (rank.get(name, len(rank)), not name.endswith("forward")))
    keys = [(size, tier) for tier in CHANNELS for size in DTYPES]
    return [(name, *key) for key in keys for name in ordered if "".join(key) in entries[name]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures", type=int, nargs="*", help="90, for example: choose by compilation, without a GPU"
    )
    parser.add_argument("--kernels", nargs="*", help="names in the table (default: all)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit, after which no kernel is started")
    parser.add_argument("--output", type=Path, default=configurations.FILE, help="default: %(default)s")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    table = json.loads(configurations.FILE.read_text())
    measured = options.architectures is None
    if measured:
        major, minor = torch.cuda.get_device_capability()
        options.architectures = [10 * major + minor]
    nearest = {a: str(max((int(k) for k in table if int(k) <= a), default=min(table))) for a in options.architectures}
    for architecture in options.architectures:
        entries = table.setdefault(str(architecture), json.loads(json.dumps(table[nearest[architecture]])))
        configurations.MEANT = architecture
        for name, size, tier in by_value(entries, options.kernels):
            if time.monotonic() > deadline:
                print(f"no time left for sm_{architecture} {name}, {size}{tier}")
                continue
            x = torch.empty(1, CHANNELS[tier], *SIZE, dtype=DTYPES[size], device="cuda" if measured else "meta")
            current = Configuration(*entries[name][size + tier])
            chosen = (fastest if measured else first_that_fits)(name, x, architecture, current)
            print(f"sm_{architecture} {name}, {size}{tier}: {chosen}, before: {current}", flush=True)
            if chosen:
                entries[name][size + tier] = list(chosen)
            with replacing(options.output) as temporary:
                temporary.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
