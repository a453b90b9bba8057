"""Make one HTML page, which needs nothing else, and PNGs of the files of figures that the benchmarks wrote.

    seemore-fast benchmark report [FILE or FOLDER ...] -o report       (or: python benchmarks/report.py ...)

Pictures: a roofline with every operator on it, peers as bars, time and memory against image size, and quality against
speed. By default of all that lies in the folder of results. Who was wrong, failed or is absent is listed.
"""

import argparse
import base64
import html
import io
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seemore_fast.analysis.operations import PUBLISHED as OPERATIONS
from seemore_fast.benchmarks import chart, command, gpu_peers, harness
from seemore_fast.benchmarks.machine import folder_name
from seemore_fast.evaluation.published import PUBLISHED, published
from seemore_fast.io.atomic import replacing

OTHER_BENCHMARKS = ("peers", "training", "model", "loop", "upscaling")  # the rest of the files are of operators
MARKERS = {"forward": "o", "backward": "s", "both": "D"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #212529; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 2px solid #d9480f; padding-top: .5rem }
figure { margin: 1.5rem 0 } .wide { overflow-x: auto } figure img { width: 100%; min-width: 34rem; display: block }
figcaption, .quiet { color: #495057; font-size: .9rem } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #dee2e6 }
th:first-child, td:first-child { text-align: left }
code { background: #f1f3f5; padding: 0 .3em; overflow-wrap: anywhere }
"""


class Picture(NamedTuple):
    """A figure of matplotlib, what it is called as a file, and what is written below it."""

    name: str
    figure: object
    caption: str


def read(paths: list[Path]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Return {machine: {file: facts}} of the JSON files that are or lie in `paths`, and complaints about the others.

    A machine is called as its folder of results; another of that name gets a number.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    found, complaints, machines = {}, [], {}
    for file in files:
        try:
            facts = command.read_figures(file)
        except ValueError as error:
            complaints.append(f"left out: {error}")
            continue
        cpu = facts["backend_info"].get("cpu", {})
        machine = facts.get("processor"), *(cpu.get(key) for key in ("instruction_set", "threads"))
        of_that_name = machines.setdefault(folder_name(facts), [])
        if machine not in of_that_name:
            of_that_name.append(machine)
        number = of_that_name.index(machine)
        name = folder_name(facts) + (f"-{number + 1}" if number else "")
        if file.stem in found.setdefault(name, {}):
            complaints.append(f"left out: {file} is a second {file.stem} of the same machine, {name}")
            continue
        found[name][file.stem] = facts
    return found, complaints


# Pictures


def pictures(files: dict[str, dict]) -> Iterator[Picture]:
    """Yield what can be drawn of the files of one machine."""
    operators = {stem: facts for stem, facts in files.items() if stem not in OTHER_BENCHMARKS}
    if picture := roofline(operators):
        yield picture
    peers = files.get("peers")
    for stem, title in (("peers", "SeemoRe inference"), ("training", "SeemoRe training steps")):
        if stem in files and (figure := chart.bars_of(files[stem], title)):
            yield Picture(stem, figure, f"{title}: who is timed, table by table. {how(stem, files[stem])}")
    if peers:
        yield from growth(peers)
        if picture := quality(peers):
            yield picture


def roofline(operators: dict[str, dict]) -> Picture | None:
    """Draw each operator's GFLOP/s over its operations per byte, below what a copy and a product of matrices reach."""
    from matplotlib.figure import Figure

    points, copies, products = [], [], []
    for stem, facts in operators.items():
        for title, lines in facts["cases"].items():
            own = [line for name, line in lines.items() if name.startswith(harness.OURS) and line.get("gflop_s")]
            copies += [line["gb_s"] for name, line in lines.items() if name == "clone"]
            products += [line["gflop_s"] for name, line in lines.items() if name == f"{harness.MATMUL}fp32"]
            if own and "fp32" in title and all(line.get("gb_s") for line in own):
                best = min(own, key=lambda line: line["ms"])
                points.append((stem, title.split()[0], best["gflop_s"] / best["gb_s"], best["gflop_s"]))
    if not points or not copies or not products:
        return None
    bandwidth, peak = statistics.median(copies), max(products)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    low, high = min(point[2] for point in points) / 2, max(peak / bandwidth, *(point[2] for point in points)) * 3
    ridge = peak / bandwidth
    axis.loglog([low, ridge, high], [low * bandwidth, peak, peak], color=chart.INK, linewidth=1.5)
    middle = (low * ridge) ** 0.5
    above = {"textcoords": "offset points", "va": "bottom", "color": chart.QUIET, "fontsize": 9}
    axis.annotate(f"a copy: {bandwidth:.1f} GB/s", (middle, middle * bandwidth), (-6, 0), ha="right", **above)
    axis.annotate(f"a product of matrices: {peak:.0f} GFLOP/s", (ridge, peak), (0, 3), **above)
    colours = dict(zip(dict.fromkeys(point[0] for point in points), COLOURS * 2, strict=False))
    for stem, mode, intensity, rate in points:
        axis.plot(intensity, rate, MARKERS[mode], color=colours[stem], markersize=7, alpha=0.85)
    for stem, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=stem)
    for mode, marker in MARKERS.items():
        axis.plot([], [], marker, color=chart.INK, fillstyle="none", label=mode)
    axis.legend(fontsize=8, ncols=2, loc="lower right")
    axis.set(xlabel="operations per byte that has to move", ylabel="GFLOP/s", xlim=(low, high))
    axis.grid(alpha=0.25, which="both")
    facts = next(iter(operators.values()))
    axis.set_title(f"Operators below the roofs of {chart.machine_of(facts)}, float32", loc="left", weight="bold")
    caption = (
        "Each operator at each of its sizes, on the quickest backend. The roofs are the median of the copies and the "
        "best of the products that were timed beside them. Operations are those of the plain formulas: 3x3 layers need "
        f"fewer by Winograd's method, and may lie above. {how('kernels', facts)}"
    )
    return Picture("roofline", figure, caption)


# Distinct in hue and in lightness (Paul Tol's "muted", and three more)
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777",
           "#1F77B4", "#8C564B", "#B5BD00"]  # fmt: skip


def growth(facts: dict) -> Iterator[Picture]:
    """Draw time and memory of a call over the pixels of the image, of tables that have several sizes."""
    from matplotlib.figure import Figure

    for title, lines in facts["cases"].items():
        series = {}
        for name, line in lines.items():
            if line.get("ns_pixel"):
                provider, size = name.rsplit(" ", 1)
                series.setdefault(provider, []).append((line["ms"] / line["ns_pixel"], size, line))
        for key, name, label in (("ms", "time", "ms a call"), ("step_mb", "memory", "MB that a call adds")):
            drawn = {provider: sorted(p for p in points if p[2].get(key)) for provider, points in series.items()}
            if max(map(len, drawn.values()), default=0) < 2:
                continue
            figure = Figure(figsize=(9, 5), layout="constrained")
            axis = figure.subplots()
            widest = max(pixels for points in drawn.values() for pixels, _, _ in points)
            for provider, points in drawn.items():
                colour = chart.OURS if provider.startswith(harness.OURS) else chart.QUIET
                values = [line[key] for _, _, line in points]
                axis.loglog([p[0] for p in points], values, "o-", color=colour, label=provider)
                for (pixels, size, _), value in zip(points, values, strict=True):
                    place = ((4, -12), "left") if pixels < widest else ((-6, 4), "right")
                    axis.annotate(
                        size, (pixels, value), place[0], ha=place[1],
                        textcoords="offset points", fontsize=8, color=colour,
                    )  # fmt: skip
            axis.set(xlabel="megapixels of the input", ylabel=label)
            axis.grid(alpha=0.25, which="both")
            axis.legend()
            axis.set_title(
                f"{name.capitalize()} against image size, {title.removeprefix('growth ')}", loc="left", weight="bold"
            )
            caption = f"On {chart.machine_of(facts)}, a batch of one. {how('peers', facts)}"
            yield Picture(f"{name}_{slug(title)}", figure, caption)


def quality(facts: dict) -> Picture | None:
    """Draw the published PSNR of T, B and L over images per second: ours, and those that run the published code."""
    from matplotlib.figure import Figure

    tables = {}
    for title, lines in facts["cases"].items():
        found = re.match(r"([TBL]) x(\d) (.+)", title)
        sets = PUBLISHED.get((f"SeemoRe-{found[1]}", int(found[2])), {}) if found else {}
        psnr = sets.get("Urban100", (None,))[0]
        if psnr:
            tables.setdefault((found[2], found[3]), []).append((found[1], psnr, lines))
    if not tables:
        return None
    (scale, size), networks = max(tables.items(), key=lambda item: len(item[1]))
    timed = dict.fromkeys(name for _, _, lines in networks for name, line in lines.items() if "max_error" in line)
    timed = [name for name in timed if name.split()[0] not in gpu_peers.OTHERS]  # networks of another quality
    timed = [name for name in timed if not name.endswith(("portable", "avx2", "avx512"))]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(
        sorted(timed, key=lambda name: not name.startswith(harness.OURS)), COLOURS * 2, strict=False
    ):
        points = [(1000 / lines[name]["ms"], psnr) for _, psnr, lines in networks if "ms" in lines.get(name, {})]
        own, line = name.startswith(harness.OURS), ":" if "bf16" in name else "-"
        style, colour = (f"D{line}", chart.OURS) if own else ("o--", colour)
        axis.semilogx(*zip(*points, strict=True), style, color=colour, label=name)
    for label, psnr, _ in networks:
        axis.axhline(psnr, color=chart.OTHERS, linewidth=0.6, zorder=0)
        axis.annotate(label, (0.01, psnr), xycoords=("axes fraction", "data"), va="bottom", weight="bold")
    axis.set(xlabel="images per second", ylabel=f"published PSNR on Urban100, dB, scale {scale}")
    axis.set_ylim(min(n[1] for n in networks) - 0.1, max(n[1] for n in networks) + 0.15)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.25, which="both")
    title = f"Quality against speed, {size}, on {chart.machine_of(facts)}"
    axis.set_title(title, loc="left", weight="bold")
    caption = "The same network gives the same picture wherever it runs: a row is one network. The quality is what was "
    caption += f"published for the weights of the paper's authors, not that of the shipped ones. {how('peers', facts)}"
    return Picture("quality", figure, caption)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


# The page


def how(benchmark: str, facts: dict) -> str:
    """Return what makes these figures again, and when and of which commit they were made."""
    commit = f", commit {facts['commit'][:10]}" if facts.get("commit") else ""
    changed = " with changes" if commit and facts.get("uncommitted") else ""
    told = facts.get("command") or f"seemore-fast benchmark {'inference' if benchmark == 'peers' else benchmark}"
    left = facts.get("cases_left_out")
    stopped = f" Stopped: {left} cases are missing." if left else ""
    date = facts.get("date", "some day")[:10]
    return f"Made by `{told}`, {date}{commit}{changed}, {facts.get('runs', '?')} runs.{stopped}"


def operator_table(operators: dict[str, dict]) -> str:
    """Return a table of every operator and case: ours, and the better of eager PyTorch's layouts."""
    rows = []
    for stem, facts in operators.items():
        for title, lines in facts["cases"].items():
            own = [line for name, line in lines.items() if name.startswith(harness.OURS) and "ms" in line]
            eager = [line["ms"] for name, line in lines.items() if name.startswith("torch eager") and "ms" in line]
            if not own or not eager:
                continue
            best = min(own, key=lambda line: line["ms"])
            cells = [f"{stem} {title}", f"{best['ms']:.2f}", f"{min(eager):.2f}", f"{min(eager) / best['ms']:.1f}x"]
            for key in ("of_copy", "of_matmul"):
                cells.append(f"{best[key]:.0%}" if best.get(key) else "")
            rows.append(cells)
    head = ["operator and case", "ours, ms", "PyTorch eager, ms", "", "of a copy", "of a product of matrices"]
    return table(head, rows)


def cost_table() -> str:
    rows = [
        [f"{preset.upper()} x{scale}", f"{parameters:,}", f"{giga:.1f}"]
        for (preset, scale), (parameters, giga) in OPERATIONS.items()
    ]
    return table(["published network", "parameters", "GMAC at 1280x720"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def code(text: str) -> str:
    """Return text as HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def left_out(files: dict[str, dict]) -> list[list[str]]:
    """Return a row for each provider that was not timed: file, case, provider and why."""
    return [
        [stem, title, name, f"{kind}: {line[kind]}"]
        for stem, facts in files.items()
        for title, lines in facts["cases"].items()
        for name, line in lines.items()
        for kind in ("wrong", "failed", "absent")
        if kind in line and (kind != "absent" or "no kernel" not in line[kind])
    ]


def section(folder: str, files: dict[str, dict], output: Path) -> str:
    """Write the PNGs of one machine and return its part of the page."""
    import matplotlib

    facts = max(files.values(), key=lambda facts: facts.get("date", ""))
    info = facts["backend_info"]
    told = f"torch {info['torch']}, Python {info['python']}, {info['platform']}, seemore-fast {info['seemore_fast']}"
    parts = [f"<h2>{html.escape(chart.machine_of(facts))}</h2>", f'<p class="quiet">{html.escape(told)}</p>']
    for picture in pictures(files):
        png = io.BytesIO()
        with matplotlib.rc_context({"axes.formatter.min_exponent": 6}):  # 0.6, not 6 times a power of ten
            picture.figure.savefig(png, dpi=120)
        with replacing(output / f"{folder}_{picture.name}.png") as temporary:
            temporary.write_bytes(png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        alternative = html.escape(picture.name)
        parts.append(
            f'<figure><div class="wide"><img alt="{alternative}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{code(picture.caption)}</figcaption></figure>"
        )
    operators = {stem: facts for stem, facts in files.items() if stem not in OTHER_BENCHMARKS}
    if operators:
        parts += ["<h3>Operators</h3>", operator_table(operators)]
    if rows := left_out(files):
        parts += ["<details><summary>Not timed</summary>", table(["file", "case", "who", "why"], rows), "</details>"]
    return "\n".join(parts)


def page(found: dict[str, dict[str, dict]], output: Path) -> str:
    sections = "\n".join(section(folder, files, output) for folder, files in found.items())
    names = list(next(iter(PUBLISHED.values())))
    quality_rows = [
        [f"{network} x{scale}", *(published(network, scale, name) for name in names)] for network, scale in PUBLISHED
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>seemore-fast: benchmarks</title><style>{STYLE}</style></head><body>
<h1>seemore-fast: benchmarks</h1>
<p>Every result was compared with a reference before it was timed, in float64 but for the largest image; all took turns
in one process. Bars and points are medians.</p>
{sections}
<h2>What was published</h2>
<p>Y-PSNR in dB and SSIM, then the size of the networks.</p>
{table(["", *names], quality_rows)}
<p></p>
{cost_table()}
</body></html>
"""


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [Path() if command.IS_INSTALLED else command.HERE / "results"]
    parser.add_argument("paths", nargs="*", type=Path, default=default, metavar="FILE", help="or folder, default: all")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report"), help="folder to write to (default: report)"
    )
    options = parser.parse_args(arguments)
    if absent := harness.missing("matplotlib"):
        raise SystemExit(absent)
    missing = [path for path in options.paths if not path.exists()]
    if missing:
        parser.error(f"{missing[0]} does not exist")
    found, complaints = read(options.paths)
    for line in complaints:
        print(line)
    if not found:
        parser.error(f"no file of figures in {', '.join(map(str, options.paths))}: run `seemore-fast benchmark` first")
    options.output.mkdir(parents=True, exist_ok=True)
    with replacing(options.output / "report.html") as temporary:
        temporary.write_text(page(found, options.output))
    print(f"page in {options.output / 'report.html'}")


if __name__ == "__main__":
    main()
