"""Compare two files of results of the same benchmark and report what got slower.

    seemore-fast benchmark compare before.json after.json       (or: python benchmarks/compare.py ...)

A provider is slower, or faster, if its median changed by more than `--threshold` and the interquartile ranges of its
runs do not overlap; otherwise it is the same. Exit status: 0, nothing got slower; 1, one of ours got slower, is wrong
or is gone; 2, the files cannot be compared. Differences in machine, versions and threads are printed first.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from seemore_fast.benchmarks import command, harness

SLOWER, FASTER, SAME, GONE, NEW = "slower", "faster", "same", "gone", "new"
NOT_COMPARABLE = 2  # exit status


class Change(NamedTuple):
    """A provider's two medians in a case; `ratio` is the new one over the old one, if there are both."""

    case: str
    provider: str
    kind: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before and self.after else None


def read(path: Path) -> dict:
    try:
        return command.read_figures(path)
    except ValueError as error:
        fail(str(error))


def fail(message: str):
    print(message, file=sys.stderr)
    raise SystemExit(NOT_COMPARABLE)


def conditions(facts: dict) -> dict[str, object]:
    """Return what figures depend on besides the code: machine, versions and threads."""
    info = facts["backend_info"]
    cpu, build = info.get("cpu", {}), info.get("build", {})
    return {
        "device": facts.get("device"),
        "processor": facts.get("processor"),
        "instruction set": cpu.get("instruction_set"),
        "threads": cpu.get("threads"),
        "torch": info.get("torch"),
        "python": info.get("python"),
        "compiler": build.get("compiler") if isinstance(build, dict) else build,  # a message if nothing is built
        "seemore-fast": info.get("seemore_fast"),
        **facts.get("versions", {}),
    }


def changes(before: dict, after: dict, threshold: float) -> list[Change]:
    """Return the change of every provider that was timed in either file."""
    found = []
    for case in dict.fromkeys([*before["cases"], *after["cases"]]):
        old_rows, new_rows = before["cases"].get(case, {}), after["cases"].get(case, {})
        for provider in dict.fromkeys([*old_rows, *new_rows]):
            old, new = old_rows.get(provider, {}), new_rows.get(provider, {})
            if "ms" in old or "ms" in new:
                found.append(Change(case, provider, kind_of(old, new, threshold), old.get("ms"), new.get("ms")))
    return found


def kind_of(old: dict, new: dict, threshold: float) -> str:
    if "ms" not in old or "ms" not in new:
        return GONE if "ms" in old else NEW
    ratio, (old_low, old_high), (new_low, new_high) = new["ms"] / old["ms"], spread(old), spread(new)
    if ratio > 1 + threshold and new_low > old_high:
        return SLOWER
    return FASTER if ratio < 1 / (1 + threshold) and new_high < old_low else SAME


def spread(row: dict) -> tuple[float, float]:
    """Return the quartiles of a provider's runs; for old files the fastest and the slowest run, or the median."""
    return tuple(row.get("ms_quartiles") or (row.get(key, row["ms"]) for key in ("ms_min", "ms_max")))


def print_changes(found: list[Change], all_of_them: bool):
    for case in dict.fromkeys(change.case for change in found):
        shown = [change for change in found if change.case == case and (all_of_them or change.kind != SAME)]
        if shown:
            print(f"\n{case}")
        for change in shown:
            old, new = (f"{ms:10.3f}" if ms is not None else f"{'':10}" for ms in (change.before, change.after))
            ratio = f"{change.ratio:8.2f}x" if change.ratio else f"{'':9}"
            print(f"  {change.provider:32}{old} ms {new} ms {ratio}  {change.kind}")


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="change of a median that counts (default: 0.1)")
    parser.add_argument("--all", action="store_true", help="print unchanged providers, too")
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:
        parser.error(f"--threshold is {options.threshold}, expected 0 or more")
    before, after = read(options.before), read(options.after)
    for path, facts in ((options.before, before), (options.after, after)):
        if left := facts.get("cases_left_out"):
            print(f"incomplete: {path} lacks {left} cases, its run was stopped")
    old, new = conditions(before), conditions(after)
    for name in new:
        if old.get(name) != new[name]:
            print(f"different: {name}: {old.get(name)} before, {new[name]} after")
    if not set(before["cases"]) & set(after["cases"]):
        fail(f"{options.before} and {options.after} have no case in common: they are of different benchmarks")
    found = changes(before, after, options.threshold)
    print_changes(found, options.all)
    count = {kind: sum(change.kind == kind for change in found) for kind in (SLOWER, FASTER, SAME, GONE, NEW)}
    print("\n" + ", ".join(f"{number} {kind}" for kind, number in count.items() if number))
    if any(change.provider.startswith(harness.OURS) and change.kind in (SLOWER, GONE) for change in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
