"""Make one self-contained HTML page and PNGs of the files of results that the benchmarks wrote.

    seemore-fast benchmark report [FILE or FOLDER ...] -o report       (or: python benchmarks/report.py ...)

Charts: a roofline of all operators, bars of all providers, time and memory against image size, and quality against
speed. By default, the page covers the whole folder of results. Providers that are absent, wrong or failed are listed.
"""

import base64
import html
import io
import re
from collections.abc import Iterator
from pathlib import Path

from seemore_fast.benchmarks import charts, command, harness
from seemore_fast.benchmarks.machine import folder_name
from seemore_fast.evaluation.published import PUBLISHED, published
from seemore_fast.io.atomic import replacing

NOT_OPERATORS = ("peers", "training", "model", "loop", "upscaling")  # all other files are of operators
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #212529; max-width: 62rem; margin: 0 auto; padding: 1rem }
h2 { margin-top: 2.5rem; border-top: 2px solid #d9480f; padding-top: .5rem } figcaption { color: #495057 }
figure { margin: 1.5rem 0 } .wide { overflow-x: auto } figure img { width: 100%; min-width: 34rem; display: block }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #dee2e6 }
th:first-child, td:first-child { text-align: left } code { overflow-wrap: anywhere }
"""


def read(paths: list[Path]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Return {machine: {file: contents}} of the JSON files in `paths`, and warnings about files that are left out.

    A machine is named like its folder of results; other machines of that name get a number.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    found, warnings, machines = {}, [], {}
    for file in files:
        try:
            facts = command.read_figures(file)
        except ValueError as error:
            warnings.append(f"left out: {error}")
            continue
        cpu = facts["backend_info"].get("cpu", {})
        machine = facts.get("processor"), *(cpu.get(key) for key in ("instruction_set", "threads"))
        same_name = machines.setdefault(folder_name(facts), [])
        if machine not in same_name:
            same_name.append(machine)
        number = same_name.index(machine)
        name = folder_name(facts) + (f"-{number + 1}" if number else "")
        if file.stem in found.setdefault(name, {}):
            warnings.append(f"left out: {file} is a second {file.stem} of the same machine, {name}")
            continue
        found[name][file.stem] = facts
    return found, warnings


def charts_of(files: dict[str, dict]) -> Iterator[tuple[charts.Chart, str]]:
    """Yield the charts that the files of one machine allow, each with the origin of its figures."""
    operators = {stem: facts for stem, facts in files.items() if stem not in NOT_OPERATORS}
    if chart := charts.roofline(operators):
        yield chart, origin("kernels", next(iter(operators.values())))
    for stem, title in (("peers", "SeemoRe inference"), ("training", "SeemoRe training steps")):
        if stem in files and (figure := charts.bars_of(files[stem], title)):
            yield charts.Chart(stem, figure, f"{title}: all providers, by table."), origin(stem, files[stem])
    if peers := files.get("peers"):
        for chart in filter(None, [*charts.growth(peers), charts.quality(peers)]):
            yield chart, origin("peers", peers)


def origin(benchmark: str, facts: dict) -> str:
    """Return the command, date and commit of figures."""
    commit = f", commit {facts['commit'][:10]}" if facts.get("commit") else ""
    changed = " with changes" if commit and facts.get("uncommitted") else ""
    made_by = facts.get("command") or f"seemore-fast benchmark {'inference' if benchmark == 'peers' else benchmark}"
    left = facts.get("cases_left_out")
    stopped = f" Stopped: {left} cases are missing." if left else ""
    date = facts.get("date", "undated")[:10]
    return f"Made by `{made_by}`, {date}{commit}{changed}, {facts.get('runs', '?')} runs.{stopped}"


# The page


def operator_table(operators: dict[str, dict]) -> str:
    """Return a table of every operator and case: ours, and the faster of eager PyTorch's layouts."""
    rows = []
    for stem, facts in operators.items():
        for title, providers in facts["cases"].items():
            timed = {name: row for name, row in providers.items() if "ms" in row}
            ours = [row for name, row in timed.items() if name.startswith(harness.OURS)]
            eager = [row["ms"] for name, row in timed.items() if name.startswith("torch eager")]
            if not ours or not eager:
                continue
            best = min(ours, key=lambda row: row["ms"])
            cells = [f"{stem} {title}", f"{best['ms']:.2f}", f"{min(eager):.2f}", f"{min(eager) / best['ms']:.1f}x"]
            rows.append(cells + [f"{best[key]:.0%}" if best.get(key) else "" for key in ("of_copy", "of_matmul")])
    head = ["operator and case", "ours, ms", "PyTorch eager, ms", "", "of a copy", "of a matrix product"]
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def not_timed(files: dict[str, dict]) -> list[list[str]]:
    """Return a row for each provider that was not timed: file, case, provider and reason."""
    return [
        [stem, title, name, f"{kind}: {row[kind]}"]
        for stem, facts in files.items()
        for title, rows in facts["cases"].items()
        for name, row in rows.items()
        for kind in ("wrong", "failed", "absent")
        if kind in row and (kind != "absent" or "no kernel" not in row[kind])
    ]


def section(folder: str, files: dict[str, dict], output: Path) -> str:
    """Write the PNGs of one machine and return its part of the page."""
    import matplotlib

    facts = max(files.values(), key=lambda facts: facts.get("date", ""))
    info = facts["backend_info"]
    software = (
        f"torch {info['torch']}, Python {info['python']}, {info['platform']}, seemore-fast {info['seemore_fast']}"
    )
    parts = [f"<h2>{html.escape(charts.machine_of(facts))}</h2>", f"<p>{html.escape(software)}</p>"]
    for chart, source in charts_of(files):
        png = io.BytesIO()
        with matplotlib.rc_context({"axes.formatter.min_exponent": 6}):  # 0.6, not 6 times a power of ten
            chart.figure.savefig(png, dpi=120)
        with replacing(output / f"{folder}_{chart.name}.png") as temporary:
            temporary.write_bytes(png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        caption = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(f"{chart.caption} {source}"))
        parts.append(
            f'<figure><div class="wide"><img alt="{html.escape(chart.name)}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    if operators := {stem: facts for stem, facts in files.items() if stem not in NOT_OPERATORS}:
        parts += ["<h3>Operators</h3>", operator_table(operators)]
    if rows := not_timed(files):
        head = ["file", "case", "provider", "reason"]
        parts += ["<details><summary>Not timed</summary>", table(head, rows), "</details>"]
    return "\n".join(parts)


def page(found: dict[str, dict[str, dict]], output: Path) -> str:
    sections = "\n".join(section(folder, files, output) for folder, files in found.items())
    names = list(next(iter(PUBLISHED.values())))
    quality = [
        [f"{network} x{scale}", *(published(network, scale, name) for name in names)] for network, scale in PUBLISHED
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>seemore-fast: benchmarks</title><style>{STYLE}</style></head><body>
<h1>seemore-fast: benchmarks</h1>
<p>Every result was compared with a reference before it was timed, in float64 except for the largest image. All
providers took turns in one process. Bars and points are medians.</p>
{sections}
<h2>Published figures</h2>
<p>Y-PSNR in dB and SSIM.</p>
{table(["", *names], quality)}
</body></html>
"""


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    default = [command.DEFAULT_RESULTS]
    parser.add_argument("paths", nargs="*", type=Path, default=default, metavar="FILE", help="or folder (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if absent := harness.missing("matplotlib"):
        raise SystemExit(absent)
    if missing := [path for path in options.paths if not path.exists()]:
        parser.error(f"{missing[0]} does not exist")
    found, warnings = read(options.paths)
    for line in warnings:
        print(line)
    if not found:
        parser.error(f"no file of results in {', '.join(map(str, options.paths))}: run `seemore-fast benchmark` first")
    options.output.mkdir(parents=True, exist_ok=True)
    with replacing(options.output / "report.html") as temporary:
        temporary.write_text(page(found, options.output))
    print(f"page in {options.output / 'report.html'}")


if __name__ == "__main__":
    main()
