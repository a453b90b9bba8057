"""Measure how a call's work on a CPU grows with its threads: processor time, whatever the number of cores.

    python benchmarks/threads.py            T x4, prepared, float32: 320x180 and 1280x720 by 1 to 32 threads
    python benchmarks/threads.py --json     the same as JSON
    python benchmarks/threads.py --quick    a tiny image, to try the benchmark itself

Counts of threads take turns; the minimum of the runs counts. `work` is the processor time over that of one thread.
Waiting threads of OpenMP sleep, so that they take none.
"""

import argparse
import json
import os
import time

os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported

import torch

COUNTS = (1, 2, 4, 8, 16, 32)
SIZES = ((320, 180, 8), (1280, 720, 3))  # width, height, runs


def measure(width: int, height: int, runs: int) -> dict[int, dict[str, float]]:
    """Return the processor time of a call in seconds, and its ratio to that of one thread, by the number of threads."""
    from seemore_fast import seemore_t

    torch.manual_seed(0)
    model, x = seemore_t(scale=4).eval().prepare(), torch.rand(1, 3, height, width)
    seconds = dict.fromkeys(COUNTS, float("inf"))
    for run in range(runs + 1):
        for count in COUNTS:
            torch.set_num_threads(count)
            start = time.process_time()
            with torch.inference_mode():
                model(x)
            if run:  # the first ones warm up
                seconds[count] = min(seconds[count], time.process_time() - start)
    return {count: {"cpu_s": found, "work": found / seconds[1]} for count, found in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="run a tiny image, to try the benchmark itself")
    options = parser.parse_args()
    sizes = ((40, 32, 1),) if options.quick else SIZES
    found = {f"T x4 {width}x{height}": measure(width, height, runs) for width, height, runs in sizes}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for title, rows in found.items():
        print(title, " threads    cpu s    work", sep="\n")
        for count, row in rows.items():
            print(f"{count:8} {row['cpu_s']:8.3f} {row['work']:7.2f}")


if __name__ == "__main__":
    main()
