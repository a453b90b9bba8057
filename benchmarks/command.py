"""The command line of a benchmark: its options, its tables and its file of results."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from seemore_fast.benchmarks import harness
from seemore_fast.benchmarks.machine import HERE, folder_name, machine_facts
from seemore_fast.devices import find_device
from seemore_fast.io.atomic import replacing

COLUMNS = {
    "ms": "12.4f",
    "ms_min": "12.4f",
    "ms_max": "12.4f",
    "images_s": "10.1f",
    "x_ours": "8.2f",
    "gb_s": "8.1f",
    "of_copy": "9.0%",
    "gflop_s": "9.1f",
    "of_matmul": "11.0%",
    "ns_pixel": "10.1f",
    "x_pixel": "9.2f",
    "peak_mb": "9.0f",
    "saved_mb": "10.0f",
    "step_mb": "9.0f",
    "max_error": "11.1e",
}
IS_INSTALLED = not (HERE.parent / "setup.py").exists()  # as seemore_fast.benchmarks, outside of a checkout


def print_table(title: str, lines: dict):
    shown = {key: form for key, form in COLUMNS.items() if any(line.get(key) is not None for line in lines.values())}
    widths = {key: int(form.split(".")[0]) for key, form in shown.items()}
    print(f"\n{title}\n{'':34}" + "".join(f"{key:>{width}}" for key, width in widths.items()))
    for name, line in lines.items():
        reason = next((f"  {key}: {line[key]}" for key in ("absent", "failed", "wrong") if key in line), None)
        cells = (" " * widths[key] if line.get(key) is None else f"{line[key]:{form}}" for key, form in shown.items())
        print(f"  {name:32}" + (reason or "".join(cells)))


def main(name: str, description: str, cases: dict[str, dict], build: Callable, compiled: bool = False):
    """Run a command line with every option: see `run`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compiled, help="time torch.compile")
    run(name, parser, cases, build)


def run(
    name: str,
    parser: argparse.ArgumentParser,
    cases: dict[str, dict],
    build: Callable,
    draw: Callable | None = None,
    arguments: list[str] | None = None,
):
    """Run a command line whose `parser` gives `device` and `compile`; see `run_cases`."""
    add_options(parser)
    parser.add_argument("--name", default=name, help="of the file of results, without .json")
    options = parser.parse_args(arguments)
    check(parser, options, cases)
    if not run_cases(options.name, options, cases, build, draw):
        raise SystemExit("seemore-fast is wrong or fails: see above")


def add_options(parser: argparse.ArgumentParser):
    """Add the options that all command lines have."""
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--case", default="", help="run only the cases with this text in their titles")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--instruction-sets", action="store_true", help="time each one that the CPU library has")
    parser.add_argument("--results", type=Path, help="folder to write to (by default, only a complete run writes)")


def check(parser: argparse.ArgumentParser, options, *tables: dict[str, dict]):
    """End as the parser does where the options are none that any of the tables of cases can be run with."""
    check_numbers(parser, options, sorted({kind for cases in tables for kind in cases} - {"quick"}))
    if not any(choose(options, cases) for cases in tables):
        parser.error(f"no case has {options.case!r} in its title")


def check_numbers(parser: argparse.ArgumentParser, options, kinds: list[str]):
    """End as the parser does for less than one run or thread, or a device that is not there or not of these kinds."""
    for name in ("runs", "threads"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    try:
        kind = find_device(options.device).type
    except ValueError as error:
        parser.error(f"--{error}; --device cpu --quick tries the benchmark itself")
    if kind not in kinds:
        parser.error(f"--device is {options.device!r}, this benchmark runs on {' or '.join(kinds)}")


def choose(options, cases: dict[str, dict]) -> dict:
    """Return the cases that are asked for, by title."""
    kind = "quick" if options.quick else torch.device(options.device).type
    return {title: setting for title, setting in cases[kind].items() if options.case in title}


def run_cases(name: str, options, cases: dict[str, dict], build: Callable, draw: Callable | None = None) -> bool:
    """Run build(cases["quick" | "cpu" | "cuda"][title], device, options), a table's Case or Cases, for every title.

    Tables are printed and, of a complete run, written as <name>.json; draw(facts, path) makes a picture of that. Return
    whether ours is right and runs in all of them.
    """
    device, results = torch.device(options.device), {}
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    chosen = choose(options, cases)
    writes = options.results or not (options.quick or options.case)
    facts = {**machine_facts(device, not IS_INSTALLED), "runs": options.runs, "cases": results}
    path = path_of(name, options.results, facts)
    for title, setting in chosen.items():
        if options.compile:
            torch.compiler.reset()  # else code of an earlier case is compiled for dynamic shapes, or no more
        results[title] = harness.run_case(build(setting, device, options), device, options.runs)
        print_table(title, results[title])
        if writes:  # now: whoever stops us keeps what there is
            write(path, facts | {"cases_left_out": len(chosen) - len(results)})
    if writes:
        print(f"\nfigures in {path}")
        if draw:
            draw(facts, path.with_suffix(".png"))
    bad = [key for lines in results.values() for key in lines if {"wrong", "failed"} & set(lines[key])]
    return not any(key.startswith(harness.OURS) for key in bad)


def time_in_turns(turns: dict[str, Callable], count: int, parts: int = 1) -> dict[str, dict]:
    """Return every name's line of figures, of so many turns after one that warms up; a turn is divided by its parts."""
    times = {name: [] for name in turns}
    for turn in range(1 + count):
        for name, take in turns.items():
            begin = time.perf_counter()
            take()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin) / parts)
    return {name: harness.summary(values) for name, values in times.items()}


def write_tables(name: str, results: Path | None, device: torch.device, runs: int, cases: dict):
    """Write the tables of a complete run; see `path_of`."""
    facts = {**machine_facts(device, not IS_INSTALLED), "runs": runs, "cases": cases}
    path = path_of(name, results, facts)
    write(path, facts)
    print(f"figures in {path}")


def path_of(name: str, results: Path | None, facts: dict) -> Path:
    """Return the file of figures in the folder of their machine: of the results told, the checkout's, or here."""
    return (results or (Path() if IS_INSTALLED else HERE / "results")) / folder_name(facts) / f"{name}.json"


def write(path: Path, facts: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def read_figures(path: Path) -> dict:
    """Return the facts that a file of results holds; ValueError, with the file's name, for any other file."""
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("cases"), dict) or "backend_info" not in facts:
        hint = ": compare files of pytest-benchmark with pytest-benchmark compare" if "benchmarks" in facts else ""
        raise ValueError(f"{path} is no file that `seemore-fast benchmark` wrote{hint}")
    if "device" not in facts:
        raise ValueError(f"{path} tells no device: it is of another version of seemore-fast")
    return facts
