"""Choose the tiles of Triton's kernels and write them to kernels/configurations.json.

    python benchmarks/tune_triton.py                            on a GPU: the quickest of all, timed there, for it
    python benchmarks/tune_triton.py --architectures 80 90      anywhere: the first that fits the registers, by what the
                                                                compiler says; nothing is timed

What `fits` prefers is an estimate until a GPU has timed it: tiles as large as registers allow, two warps each.
"""

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seemore_fast import kernels
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
SHARED = 99 * 1024  # bytes that a block can have on every architecture
DTYPES = {"2 bytes": torch.bfloat16, "4 bytes": torch.float32}
CHANNELS = {"": 36, ", many channels": 64}
SIZE = (480, 640)


@contextmanager
def override(name: str, chosen: Configuration):
    """Give kernel `name` a configuration, whatever stands in the table."""
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
    """Return the different launches that the configuration of kernel `name` is for."""
    found = {}
    with override(name, chosen):
        mine = list(launches(x))
    with override(name, Configuration(chosen.pixels * 2, chosen.warps * 2)):  # what differs is its
        for (_, launch), (_, other) in zip(mine, launches(x), strict=True):
            if (launch.num_warps, launch.arguments.get("PIXELS")) != (other.num_warps, other.arguments.get("PIXELS")):
                found.setdefault(repr((launch.kernel.__name__, launch.specialization())), launch)
    return list(found.values())


def fits(launch: Launch, architecture: int) -> bool:
    """Return whether a kernel does not spill, has the shared memory that it takes, and multiplies by mma.sync alone."""
    code = launch.compile_for(architecture)
    takes = code.resources()
    of_warp_groups = "wgmma" in code.ptx or "tcgen05" in code.ptx
    return takes.local == 0 and takes.shared <= SHARED and not of_warp_groups


def first_that_fits(name: str, x: torch.Tensor, architecture: int) -> Configuration | None:
    for chosen in PREFERRED:
        if all(fits(launch, architecture) for launch in launches_of(name, chosen, x)):
            return chosen
    return None


def quickest(name: str, x: torch.Tensor, architecture: int) -> Configuration | None:
    from triton.testing import do_bench

    times = {}
    for chosen in TIMED:
        every = launches_of(name, chosen, x)
        if all(fits(launch, architecture) for launch in every):
            times[chosen] = sum(do_bench(launch.run, return_mode="median") for launch in every)
    print("  ", {tuple(chosen): round(ms, 4) for chosen, ms in sorted(times.items(), key=lambda item: item[1])[:4]})
    return min(times, key=times.get, default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures", type=int, nargs="*", help="such as 90: by the compiler alone, no GPU is used"
    )
    parser.add_argument("--kernels", nargs="*", help="the names in the table to choose for; all are the default")
    options = parser.parse_args()
    table = json.loads(configurations.FILE.read_text())
    measured = options.architectures is None
    if measured:
        major, minor = torch.cuda.get_device_capability()
        options.architectures = [10 * major + minor]
    nearest = {a: str(max((int(k) for k in table if int(k) <= a), default=min(table))) for a in options.architectures}
    for architecture in options.architectures:
        entries = table.setdefault(str(architecture), json.loads(json.dumps(table[nearest[architecture]])))
        for name in options.kernels or entries:
            for size, dtype in DTYPES.items():
                for tier, channels in CHANNELS.items():
                    device = "cuda" if measured else "meta"
                    x = torch.empty(1, channels, *SIZE, dtype=dtype, device=device)
                    configurations.MEANT = architecture
                    chosen = (quickest if measured else first_that_fits)(name, x, architecture)
                    print(f"sm_{architecture} {name}, {size}{tier}: {chosen}", flush=True)
                    if chosen:
                        entries[name][size + tier] = list(chosen)
                    configurations.FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
