"""Command line of a benchmark: options, printed tables and files of results."""

import argparse
import fnmatch
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
IS_INSTALLED = not (HERE.parent / "setup.py").exists()  # as seemore_fast.benchmarks, outside a checkout
DEFAULT_RESULTS = Path() if IS_INSTALLED else HERE / "results"


def parser(description: str, prog: str | None) -> argparse.ArgumentParser:
    """Return an argument parser whose help is a module's docstring."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(parser: argparse.ArgumentParser, device: str, compile: bool = False):
    """Add the options of benchmarks with tables of cases; `device` and `compile` are defaults."""
    parser.add_argument("--device", default=device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compile, help="time torch.compile")
    parser.add_argument("--quick", action="store_true", help="run tiny cases, to try the benchmark itself")
    parser.add_argument("--runs", type=int, default=20, help="timed calls of each provider (default: %(default)s)")
    parser.add_argument("--case", default="", help="run the cases with this text in their titles; * is any text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--instruction-sets", action="store_true", help="time each one of the CPU library")
    parser.add_argument("--results", type=Path, help="folder to write to (by default, only a complete run writes)")
    parser.add_argument("--name", help="name of the file of results, without .json")


def add_turn_options(parser: argparse.ArgumentParser, turns: int):
    """Add the options of benchmarks that time whole programs in turns."""
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--turns", type=int, default=turns, help="timed turns of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="run a tiny case, to try the benchmark itself")
    parser.add_argument("--results", type=Path, help="folder to write to (by default, only a complete run writes)")


def check_options(parser: argparse.ArgumentParser, options, *tables: dict[str, dict]):
    """End with a usage error if no table of cases can run with the options."""
    check_numbers(parser, options, sorted({kind for cases in tables for kind in cases} - {"quick"}))
    if not any(choose(options, cases) for cases in tables):
        parser.error(f"no case has {options.case!r} in its title")


def check_numbers(parser: argparse.ArgumentParser, options, kinds: list[str]):
    """End with a usage error for less than one run or thread, or for a device that is missing or not of these kinds."""
    check_counts(parser, options)
    try:
        kind = find_device(options.device).type
    except ValueError as error:
        parser.error(f"--{error}; --device cpu --quick tries the benchmark itself")
    if kind not in kinds:
        parser.error(f"--device is {options.device!r}, this benchmark runs on {' or '.join(kinds)}")


def check_counts(parser: argparse.ArgumentParser, options):
    """End with a usage error for less than one run, turn, step or thread."""
    for name in ("runs", "turns", "steps", "threads"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")


def choose(options, cases: dict[str, dict]) -> dict:
    """Return the requested cases by title."""
    kind = "quick" if options.quick else torch.device(options.device).type
    return {title: cases[kind][title] for title in fnmatch.filter(cases[kind], f"*{options.case}*")}


def run(
    name: str,
    parser: argparse.ArgumentParser,
    cases: dict[str, dict],
    build: Callable,
    arguments: list[str] | None = None,
    draw: Callable | None = None,
):
    """Parse the command line and run all its cases; see `run_cases`."""
    options = parser.parse_args(arguments)
    check_options(parser, options, cases)
    if not run_cases(options.name or name, options, cases, build, draw):
        raise SystemExit("seemore-fast is wrong or fails: see above")


def run_cases(name: str, options, cases: dict[str, dict], build: Callable, draw: Callable | None = None) -> bool:
    """Run build(cases["quick" | "cpu" | "cuda"][title], device, options), a table's Case or Cases, for every title.

    Tables are printed and, for a complete run, written as <name>.json; draw(facts, path) draws a chart of that file.
    Return whether ours is correct and runs in all of them.
    """
    device, results = torch.device(options.device), {}
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    chosen = choose(options, cases)
    writes = options.results or not (options.quick or options.case)
    facts = facts_of(device, options.runs, results)
    path = path_of(name, options.results, facts)
    for title, setting in chosen.items():
        if options.compile:
            torch.compiler.reset()  # otherwise later cases are compiled for dynamic shapes, or not at all
        results[title] = harness.run_case(build(setting, device, options), device, options.runs)
        print_table(title, results[title])
        if writes:  # after every case: an interrupted run keeps its figures
            write(path, facts | {"cases_left_out": len(chosen) - len(results)})
    if writes:
        print(f"\nfigures in {path}")
        if draw:
            draw(facts, path.with_suffix(".png"))
    bad = [key for rows in results.values() for key in rows if {"wrong", "failed"} & set(rows[key])]
    return not any(key.startswith(harness.OURS) for key in bad)


def time_in_turns(turns: dict[str, Callable], count: int, parts: int = 1) -> dict[str, dict]:
    """Return every name's row of figures from `count` turns after a warm-up; a turn's time is divided by its parts."""
    times = {name: [] for name in turns}
    for turn in range(1 + count):
        for name, take in turns.items():
            begin = time.perf_counter()
            take()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin) / parts)
    return {name: harness.summary(values) for name, values in times.items()}


# Tables and files


def print_table(title: str, rows: dict[str, dict]):
    shown = {key: form for key, form in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())}
    widths = {key: int(form.split(".")[0]) for key, form in shown.items()}
    print(f"\n{title}\n{'':34}" + "".join(f"{key:>{width}}" for key, width in widths.items()))
    for name, row in rows.items():
        reason = next((f"  {key}: {row[key]}" for key in ("absent", "failed", "wrong") if key in row), None)
        cells = (" " * widths[key] if row.get(key) is None else f"{row[key]:{form}}" for key, form in shown.items())
        print(f"  {name:32}" + (reason or "".join(cells)))


def facts_of(device: torch.device, runs: int, cases: dict[str, dict]) -> dict:
    return {**machine_facts(device, not IS_INSTALLED), "runs": runs, "cases": cases}


def path_of(name: str, results: Path | None, facts: dict) -> Path:
    """Return the file of results in its machine's folder: below `results`, the checkout's results, or here."""
    return (results or (Path() if IS_INSTALLED else DEFAULT_RESULTS)) / folder_name(facts) / f"{name}.json"


def write(path: Path, facts: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def write_tables(name: str, results: Path | None, device: torch.device, runs: int, cases: dict[str, dict]):
    """Write the tables of a complete run; see `path_of`."""
    facts = facts_of(device, runs, cases)
    path = path_of(name, results, facts)
    write(path, facts)
    print(f"figures in {path}")


def read_figures(path: Path) -> dict:
    """Return the contents of a file of results; ValueError, with the file's name, for any other file."""
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("cases"), dict) or "backend_info" not in facts:
        hint = ": compare files of pytest-benchmark with pytest-benchmark compare" if "benchmarks" in facts else ""
        raise ValueError(f"{path} was not written by `seemore-fast benchmark`{hint}")
    if "device" not in facts:
        raise ValueError(f"{path} names no device: it was written by another version of seemore-fast")
    return facts
