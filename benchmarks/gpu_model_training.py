"""Predict the time of a training step on a GPU from its launches, their compiled code and their bytes, without a GPU.

    python benchmarks/gpu_model_training.py          each kernel of a step of T, the slowest first
    python benchmarks/gpu_model_training.py --json   {"training T x2 32x64x64 bf16": {"ms", "launches", ...}}

The launches are those of the host's real code (`gpu_dry_run`) where Triton computes all operators. Triton compiles
their kernels for sm_90; some warps of each walk through the code (`warp`). The time of a launch is the largest of:

| figure  | meaning                                                                                           |
|---------|---------------------------------------------------------------------------------------------------|
| issue   | time where every scheduler issues an instruction each clock, on the busiest multiprocessor        |
| bytes   | time of all its tensors, moved once at the bandwidth of a copy                                    |
| latency | time of a warp that is alone, on average, times the rounds in which multiprocessors take blocks    |
| floor   | FLOOR_US, between the starts of two kernels of a stream                                           |

issue and bytes are divided by an efficiency of 0.8, or of 0.6 for `ms_at_0.6`. Operators of torch take the floor each.
All are predictions; efficiencies, latencies and the floor are stated, not measured.
"""

import json
import os
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read at imports; interpreted kernels have no code

import torch
from torch import Tensor

from seemore_fast.benchmarks import gpu_dry_run, warp

CASE = "training T x2 32x64x64 bf16"
MULTIPROCESSORS, SCHEDULERS, CLOCK, COPY = 132, 4, 1.9e9, 4.3e12  # of an H200; clock: of 1.98 GHz at most
EFFICIENCIES = (0.8, 0.6)
FLOOR_US = 2.0
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32  # of a multiprocessor
SAMPLES = 5  # blocks whose first warp walks


class Figures(NamedTuple):
    """Figures of one launch, times in microseconds."""

    kernel: str
    grid: int
    rounds: int
    instructions: float  # of a warp, on average
    issue: float
    bytes: float
    latency: float

    def us(self, efficiency: float = EFFICIENCIES[0]) -> float:
        return max(self.issue / efficiency, self.bytes / efficiency, self.latency, FLOOR_US)


class Code(NamedTuple):
    """A compiled kernel."""

    instructions: tuple[dict[int, warp.Instruction], list[int]]
    registers: int
    shared: int


def disassembled(variant: gpu_dry_run.Variant) -> Code:
    from seemore_fast.kernels.launch import Compiled

    found = variant.compile()
    compiled = Compiled(found.asm["ptx"], found.asm["cubin"], found.metadata.shared)
    takes = compiled.resources()
    return Code(warp.decode(sass(compiled.cubin)), takes.registers, takes.shared)


def sass(cubin: bytes) -> str:
    """Return the machine code of a kernel as text."""
    from seemore_fast.kernels.launch import cuobjdump

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [cuobjdump(), "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the types and values of the arguments that a kernel has at run time."""
    if isinstance(kind, tuple):
        for of_item, item in zip(kind, value, strict=True):
            yield from flat(of_item, item)
    elif kind != "constexpr":
        yield kind, value


def predict_launch(launch: gpu_dry_run.Launched, code: Code) -> Figures:
    variant, grid = launch.variant, launch.grid
    arguments = list(flat(tuple(variant.signature.values()), launch.arguments))
    kinds = [kind for kind, _ in arguments]
    words = warp.parameters(kinds, [0 if isinstance(value, Tensor) else value for _, value in arguments])
    blocks = sorted({grid * i // (SAMPLES - 1) for i in range(SAMPLES - 1)} | {grid - 1})
    small = {
        place
        for place, (_, value) in enumerate(arguments, start=1)
        if isinstance(value, Tensor) and value.numel() * value.element_size() <= warp.SMALL
    }
    walks = [warp.Warp(code.instructions, words, block, small=small).run() for block in blocks]
    instructions, cycles = sum(walk.instructions for walk in walks) / len(walks), [walk.cycles for walk in walks]
    warps = variant.options.num_warps
    busiest = -(-grid // MULTIPROCESSORS) * warps * instructions
    rounds = -(-grid // (MULTIPROCESSORS * resident(code, warps)))
    tensors = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for _, t in arguments if isinstance(t, Tensor)}
    return Figures(
        variant.name,
        grid,
        rounds,
        instructions,
        issue=1e6 * busiest / (SCHEDULERS * CLOCK),
        bytes=1e6 * sum(tensors.values()) / COPY,
        latency=1e6 * max(rounds * sum(cycles) / len(cycles), *cycles) / CLOCK,
    )


def resident(code: Code, warps: int) -> int:
    """Return how many blocks a multiprocessor has at a time."""
    registers = -(-code.registers // 8) * 8 * 32 * warps
    return max(1, min(REGISTERS // registers, SHARED // (code.shared + 1024), THREADS // (32 * warps), BLOCKS))


def step() -> tuple[list[gpu_dry_run.Launched], int]:
    """Return the launches of a step, and the number of torch's kernels beside them."""
    with gpu_dry_run.dry_run() as compiled:
        for variant in compiled.values():
            variant.kernel.device_caches.clear()
        case = gpu_dry_run.cases()[CASE]
        x = case.image(*case.size)
        with gpu_dry_run.launches() as found:
            case.run(x)
        return found, gpu_dry_run.torch_kernels(lambda: case.run(x)).total()


def predict_launches(launches: list[gpu_dry_run.Launched]) -> list[Figures]:
    """Return the figures of each launch; launches that are alike are looked at once."""
    codes, known, figures = {}, {}, []
    for launch in launches:
        variant = launch.variant
        if id(variant) not in codes:
            codes[id(variant)] = disassembled(variant)
        values = [
            v.shape if isinstance(v, Tensor) else v
            for _, v in flat(tuple(variant.signature.values()), launch.arguments)
        ]
        key = id(variant), launch.grid, tuple(values)
        if key not in known:
            known[key] = predict_launch(launch, codes[id(variant)])
        figures.append(known[key])
    return figures


def summary(figures: list[Figures], torch_kernels: int) -> dict[str, float]:
    floor = torch_kernels * FLOOR_US
    ms, ms_at_least = ((sum(one.us(efficiency) for one in figures) + floor) / 1000 for efficiency in EFFICIENCIES)
    found = {"ms": ms, "ms_at_0.6": ms_at_least, "launches": len(figures), "torch_kernels": torch_kernels}
    return found | {f"{name}_ms": sum(getattr(one, name) for one in figures) / 1000 for name in ("issue", "bytes")}


def predict() -> tuple[list[Figures], dict[str, float]]:
    """Return the figures of each launch of a step, and those of the step."""
    torch.set_num_threads(1)  # the host code is one thread
    launches, torch_kernels = step()
    figures = predict_launches(launches)
    return figures, summary(figures, torch_kernels)


def print_kernels(figures: list[Figures]):
    rows: dict[Figures, int] = {}
    for one in figures:
        rows[one] = rows.get(one, 0) + 1
    print(f"  {'kernel':32} count   grid rounds instructions  issue  bytes latency     us  all us")
    for one, count in sorted(rows.items(), key=lambda row: -row[1] * row[0].us()):
        what = f"{one.kernel:32} {count:5} {one.grid:6} {one.rounds:6} {one.instructions:12.0f}"
        times = f"{one.issue:6.1f} {one.bytes:6.1f} {one.latency:7.1f} {one.us():6.1f} {count * one.us():7.0f}"
        print(f"  {what} {times}")


def predictions(to_print: bool) -> dict[str, dict[str, float]]:
    """Return the figures of the step by its title; print those of its kernels on request."""
    figures, found = predict()
    if to_print:
        print(CASE)
        print_kernels(figures)
    return {CASE: found}


def main():
    parser = ArgumentParser(description="Predict the time of a training step from its compiled code, without a GPU.")
    parser.add_argument("--json", action="store_true", help="print the step's figures as JSON")
    options = parser.parse_args()
    found = predictions(to_print=not options.json)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print({name: round(value, 2) for name, value in found[CASE].items()})


if __name__ == "__main__":
    main()
