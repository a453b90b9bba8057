"""Predict the time of the GPU's network from its compiled code and from bytes, without a GPU.

    python benchmarks/gpu_model.py          each launch of T, B and L
    python benchmarks/gpu_model.py --json   {"T x4 480x640 bf16": {"ms", "launches", "mb_per_group", ...}, ...}

A training step, of which Triton computes the operators, is in there, too: `gpu_model_training`.

The code for sm_90 is read off the CUDA library by cuobjdump. A warp's instructions are those of the kernel, its loops
times their trips, which follow from the image's cut into blocks. Of each launch:

| figure | meaning                                                                                     |
|--------|---------------------------------------------------------------------------------------------|
| issue  | time where every scheduler issues an instruction each clock, on the busiest multiprocessor  |
| bytes  | time of the bytes that have to be moved once, at the bandwidth of a copy                    |
| ms     | the larger one, over an efficiency of 0.8; ms_at_0.6: over 0.6                              |

Both are predictions. Efficiencies are stated, not measured; time between launches, some 1 us each, is not in them.
"""

import json
import math
import re
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from seemore_fast.backends import native
from seemore_fast.benchmarks import gpu_model_training
from seemore_fast.network.config import PRESETS
from seemore_fast.reference.config import expert_ranks

LIBRARY = native.FOLDER / "libseemore_cuda.so"
MULTIPROCESSORS, SCHEDULERS, CLOCK, COPY = 132, 4, 1.9e9, 4.3e12  # of an H200; clock: of 1.98 GHz at most
EFFICIENCIES = (0.8, 0.6)
SIZES = {
    "T": [(128, 128), (256, 256), (480, 640), (720, 1280)],
    "B": [(480, 640), (720, 1280)],
    "L": [(480, 640), (720, 1280)],
}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)(.*?);")
STEP, UNIT_COLUMNS, AT_ONCE = 4, 16, 2 * MULTIPROCESSORS  # csrc/cuda/network/walk.h
FRONT_ROWS = 128  # of a band of front at most: kMostRows in csrc/cuda/network/front.cu
STENCIL = 3.0  # trips of a 3x3 stencil's loop over columns of taps
MOST_LEAD = 6  # rows' work before a band's first row: SEE computes ten, but half of what it does


class Code(NamedTuple):
    """A kernel's instructions, as far as its usual path goes, and its loops as (first, last) in order of the first."""

    count: int
    loops: list[tuple[int, int]]
    barriers: list[int]


class Walk(NamedTuple):
    """The cut of images into blocks; see plan_walk in csrc/cuda/network/walk.h."""

    columns: int
    inner: int
    rows: int
    blocks: int

    @property
    def threads(self) -> int:
        return self.columns // UNIT_COLUMNS * STEP // 2 * 32


class Launch(NamedTuple):
    """A launch of the network: its kernel, by a part of the name, and what it does."""

    name: str
    kernel: str
    blocks: int
    warps: int
    steps: float  # of the walk down the image; 1 where there is none
    trips: list[float]  # of the loops inside of it, in their order
    bytes: float


def read_code(library: Path = LIBRARY, architecture: int = 90) -> dict[str, Code]:
    """Return the code of the network's kernels by name."""
    from seemore_fast.kernels.launch import cuobjdump

    command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return {name: parse(sass) for name, sass in zip(parts[::2], parts[1::2], strict=True) if "seemore3gpu" in name}


def parse(sass: str) -> Code:
    """Return the code of one kernel. What comes after its exit is for pixels beside the image, and rarely runs."""
    found = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(sass)]
    number = {address: i for i, (address, _, _) in enumerate(found)}
    jumps = []
    for i, (address, name, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            jumps.append((number[int(target[1], 16)], i))
    barriers = [i for i, (_, name, _) in enumerate(found) if name.startswith("BAR")]
    exits = [i for i, (_, name, _) in enumerate(found) if name == "EXIT"]
    end = max(i for i in exits if i >= (barriers[-1] if barriers else 0))
    return Code(end, sorted(jump for jump in jumps if jump[1] < end), [i for i in barriers if i < end])


def instructions(code: Code, steps: float, trips: list[float]) -> float:
    """Return the instructions of a warp: the walk is the loop with barriers, or, without one, the whole kernel."""
    walks = [loop for loop in code.loops if any(loop[0] <= i <= loop[1] for i in code.barriers)]
    first, last = max(walks, key=lambda loop: loop[1] - loop[0]) if walks else (0, code.count)
    inside = [loop for loop in code.loops if first <= loop[0] and loop[1] <= last and loop != (first, last)]
    inside = [loop for loop in inside if not any(i in range(loop[0], loop[1]) for i in code.barriers)]
    if len(inside) != len(trips):
        raise ValueError(f"{len(inside)} loops inside of the walk, expected {len(trips)}: {inside}")
    body = float(last - first + 1)
    extra = dict.fromkeys(inside, 1.0)
    for loop, count in zip(inside, trips, strict=True):
        outer = math.prod(extra[other] for other in inside if other[0] <= loop[0] and loop[1] < other[1])
        nested = sum(o[1] - o[0] + 1 for o in inside if loop[0] <= o[0] and o[1] < loop[1])
        body += (loop[1] - loop[0] + 1 - nested) * (outer * count - 1)
        extra[loop] = count
    return code.count - (last - first + 1) + steps * body


def plan_walk(
    images: int, height: int, width: int, columns: int, left: int, right: int, lead: int, most: float = math.inf
) -> Walk:
    inner = columns - left - right
    strips, best, least = math.ceil(width / inner), None, math.inf
    for bands in range(1, min(math.ceil(height / STEP), 2 * AT_ONCE) + 1):
        rows = math.ceil(math.ceil(height / bands) / STEP) * STEP
        blocks = images * strips * math.ceil(height / rows)
        time = max(blocks, math.ceil(blocks / AT_ONCE) * AT_ONCE) * (rows + lead)
        if time < least and rows <= most:
            best, least = Walk(columns, inner, rows, blocks), time
    assert best is not None
    return best


def launches(config: dict, height: int, width: int) -> Iterator[Launch]:
    """Yield the launches of the head, of one group, and of the end, for one image in bfloat16."""
    c, pixels = config["embedding_dim"], height * width
    padded = next(channels for channels in (40, 48, 64) if c <= channels)
    columns = 48 if padded <= 48 else 64  # of a strip
    of_type, feature = f"I13__nv_bfloat16Li{padded}E", 2 * padded
    ranks = sum(expert_ranks(config["lr_space"], config["num_experts"]))
    chunks = math.ceil(ranks / 16)
    outputs = config["in_chans"] * config["scale"] ** 2
    conv = [3.0] if padded == 40 else [3.0, 3.0]  # trips of conv3x3's loops

    def walking(name: str, halo: int, lead: int, trips: Callable[[Walk], list[float]], moved: float):
        most = FRONT_ROWS if name == "front_kernel" else math.inf
        walk = plan_walk(1, height, width, columns, halo, halo, lead, most)
        kernel = name if "I" in name else name + of_type
        steps = (walk.rows + min(lead, MOST_LEAD)) / STEP
        return Launch(kernel.split("_kernel")[0], kernel, walk.blocks, walk.threads // 32, steps, trips(walk), moved)

    def row_trips(walk: Walk) -> list[float]:
        warps, runs = walk.threads // 32, math.ceil(walk.inner / 8)
        return [math.ceil(STEP * words * runs / 32) / warps for words in (16, padded // 2 - 16)]

    lines = math.ceil(6 * config["in_chans"] / (columns // 8))  # of a warp, of the picture's tile
    picture = [float(lines), float(math.ceil((columns + 4) / 31)), 3.0]  # and of its pieces; rows of conv_1
    blocks = math.ceil(width / columns) * math.ceil(height / STEP)
    yield Launch(
        "head", f"head_kernelI13__nv_bfloat16fLi{padded}E", blocks, columns // 8, 1, picture, pixels * (12 + feature)
    )
    small = pixels / 16 * 4 * padded
    yield walking(
        "front_kernel",
        4,
        4,
        lambda w: [*conv, chunks, STENCIL, w.columns / 4 * padded / w.threads],
        pixels * (2 * feature + 32 * chunks) + small,
    )
    yield walking(
        f"ffn_kernelI13__nv_bfloat16Li{padded}ELb1E",
        1,
        2,
        lambda _: [chunks, STENCIL],
        pixels * (3 * feature + 32 * chunks),
    )
    yield walking("see_kernel", 5, 10, lambda w: [*row_trips(w), 5], pixels * 2 * feature)
    yield walking(f"ffn_kernelI13__nv_bfloat16Li{padded}ELb0E", 1, 2, lambda _: [STENCIL], pixels * 2 * feature)
    yield walking(
        f"tail_kernelI13__nv_bfloat16fLi{padded}E",
        2,
        4,
        lambda _: [*picture, *conv, math.ceil(outputs / 24), *conv],
        pixels * (12 + feature + 4 * outputs),
    )


def predict(code: dict[str, Code], preset: str, height: int, width: int) -> tuple[list[dict], dict]:
    """Return the figures of each launch, and those of the network."""
    config = {"in_chans": 3, "scale": 4, **PRESETS[preset.lower()]}
    groups, rows = config["num_layers"], []
    for launch in launches(config, height, width):
        names = [name for name in code if launch.kernel in name]
        if len(names) != 1:
            raise ValueError(f"{len(names)} kernels are named {launch.kernel}, expected one")
        warp = instructions(code[names[0]], launch.steps, launch.trips)
        busiest = math.ceil(launch.blocks / MULTIPROCESSORS) * launch.warps * warp
        issue, moved = busiest / (SCHEDULERS * CLOCK), launch.bytes / COPY
        count = groups if launch.name in ("front", "ffn", "see") else 1
        figures = {"launch": launch.name, "count": count, "blocks": launch.blocks, "instructions": round(warp)}
        figures |= {"issue_us": 1e6 * issue, "bytes_us": 1e6 * moved, "mb": launch.bytes / 1e6}
        rows.append(figures | {"us": 1e6 * max(issue, moved) / EFFICIENCIES[0]})
    total = sum(row["count"] * max(row["issue_us"], row["bytes_us"]) for row in rows) / 1000
    in_group = sum(row["mb"] for row in rows if row["launch"] in ("front", "ffn", "see"))
    return rows, {
        "ms": total / EFFICIENCIES[0],
        "ms_at_0.6": total / EFFICIENCIES[1],
        "launches": 6 * groups + 2,  # with the small map and the choice of experts, a few us each
        "mb_per_group": in_group,
    }


def main():
    parser = ArgumentParser(description="Predict the time of the GPU's network from its compiled code, without a GPU.")
    parser.add_argument("--json", action="store_true", help="print the networks' figures as JSON")
    options = parser.parse_args()
    code, networks = read_code(), {}
    for preset, sizes in SIZES.items():
        for height, width in sizes:
            rows, networks[f"{preset} x4 {height}x{width} bf16"] = predict(code, preset, height, width)
            if options.json:
                continue
            print(f"{preset} x4 {height}x{width} bf16")
            print("  launch     count blocks instructions  issue us  bytes us     us")
            for row in rows:
                print(
                    f"  {row['launch']:10} {row['count']:5} {row['blocks']:6} {row['instructions']:12} "
                    f"{row['issue_us']:9.1f} {row['bytes_us']:9.1f} {row['us']:6.1f}"
                )
    networks |= gpu_model_training.predictions(to_print=not options.json)
    if options.json:
        print(json.dumps(networks, indent=2))
    else:
        for name, figures in networks.items():
            print(name, {key: round(value, 2) for key, value in figures.items()})


if __name__ == "__main__":
    main()
