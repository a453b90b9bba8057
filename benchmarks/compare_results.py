"""Tell what got slower from one file of figures to another of the same benchmark.

    seemore-fast benchmark compare before.json after.json       (or: python benchmarks/compare_results.py ...)

A provider is slower, or faster, where its median changed by more than `--threshold` and the middle halves of its runs
do not overlap: what lies within the noise is told as the same. Exit status: 0, nothing got slower; 1, something of ours
did, or is wrong or gone; 2, the files cannot be compared. Machines, versions and threads that differ are named first.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from seemore_fast.benchmarks import command, harness

SLOWER, FASTER, SAME, GONE, NEW = "slower", "faster", "same", "gone", "new"
UNFIT = 2


class Change(NamedTuple):
    """What happened to a provider in a case: ratio is the new median over the old one, None where there is not both."""

    case: str
    provider: str
    kind: str
    ratio: float | None = None
    before: float | None = None
    after: float | None = None


def read(path: Path) -> dict:
    """Return a file's facts; SystemExit tells what is wrong with it."""
    try:
        return command.read_figures(path)
    except ValueError as error:
        fail(str(error))


def fail(message: str):
    print(message, file=sys.stderr)
    raise SystemExit(UNFIT)


def differences(before: dict, after: dict) -> list[str]:
    """Return lines on what makes figures hard to compare: another machine, other versions, other threads."""

    def told(facts: dict) -> dict[str, object]:
        info, versions, build = facts["backend_info"], facts.get("versions", {}), facts["backend_info"].get("build", {})
        return {
            "device": facts.get("device"),
            "processor": facts.get("processor"),
            "instruction set": info.get("cpu", {}).get("instruction_set"),
            "threads": info.get("cpu", {}).get("threads"),
            "torch": info.get("torch"),
            "python": info.get("python"),
            "compiler": build.get("compiler") if isinstance(build, dict) else build,  # a text where nothing is built
            "seemore-fast": info.get("seemore_fast"),
            **versions,
        }

    old, new = told(before), told(after)
    return [f"{name}: {old.get(name)} before, {new[name]} after" for name in new if old.get(name) != new[name]]


def changes(before: dict, after: dict, threshold: float) -> list[Change]:
    """Return what became of every provider that was timed in either file."""
    found = []
    for case in dict.fromkeys([*before["cases"], *after["cases"]]):
        old, new = before["cases"].get(case, {}), after["cases"].get(case, {})
        for provider in dict.fromkeys([*old, *new]):
            was, is_now = old.get(provider, {}), new.get(provider, {})
            if "ms" not in was and "ms" not in is_now:
                continue
            if "ms" not in was or "ms" not in is_now:
                found.append(
                    Change(case, provider, GONE if "ms" in was else NEW, None, was.get("ms"), is_now.get("ms"))
                )
                continue
            ratio, (low, high) = is_now["ms"] / was["ms"], spread(was)
            now_low, now_high = spread(is_now)
            kind = SAME
            if ratio > 1 + threshold and now_low > high:
                kind = SLOWER
            elif ratio < 1 / (1 + threshold) and now_high < low:
                kind = FASTER
            found.append(Change(case, provider, kind, ratio, was["ms"], is_now["ms"]))
    return found


def spread(line: dict) -> tuple[float, float]:
    """Return the quartiles of a provider's runs; of old files the fastest and the slowest, or the median alone."""
    return tuple(line.get("ms_quartiles") or (line.get(key, line["ms"]) for key in ("ms_min", "ms_max")))


def print_changes(found: list[Change], every: bool):
    """Print what changed, case by case; with `every`, also what did not."""
    for case in dict.fromkeys(change.case for change in found):
        shown = [change for change in found if change.case == case and (every or change.kind != SAME)]
        if shown:
            print(f"\n{case}")
        for change in shown:
            old, new = (f"{ms:10.3f}" if ms is not None else f"{'':10}" for ms in (change.before, change.after))
            ratio = f"{change.ratio:8.2f}x" if change.ratio else f"{'':9}"
            print(f"  {change.provider:32}{old} ms {new} ms {ratio}  {change.kind}")


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="change of a median that counts (default: 0.1)")
    parser.add_argument("--all", action="store_true", help="print what is the same, too")
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:
        parser.error(f"--threshold is {options.threshold}, expected 0 or more")
    before, after = read(options.before), read(options.after)
    for path, facts in ((options.before, before), (options.after, after)):
        if left := facts.get("cases_left_out"):
            print(f"not complete: {path} lacks {left} cases, its run was stopped")
    for line in differences(before, after):
        print(f"not the same: {line}")
    if not set(before["cases"]) & set(after["cases"]):
        fail(f"{options.before} and {options.after} have no case in common: they are of different benchmarks")
    found = changes(before, after, options.threshold)
    print_changes(found, options.all)
    count = {kind: sum(change.kind == kind for change in found) for kind in (SLOWER, FASTER, SAME, GONE, NEW)}
    print("\n" + ", ".join(f"{number} {kind}" for kind, number in count.items() if number))
    missed = [c for c in found if c.provider.startswith(harness.OURS) and c.kind in (SLOWER, GONE)]
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
