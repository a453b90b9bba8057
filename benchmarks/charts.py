"""Charts of results: bars of providers, a roofline of operators, growth with image size, quality against speed."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seemore_fast.benchmarks import harness
from seemore_fast.evaluation.published import PUBLISHED

OURS, OTHERS, INK, QUIET = "#d9480f", "#adb5bd", "#343a40", "#868e96"
# Distinct in hue and in lightness (Paul Tol's "muted", and three more)
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777",
           "#1F77B4", "#8C564B", "#B5BD00"]  # fmt: skip
MARKERS = {"forward": "o", "backward": "s", "both": "D"}
LONGEST_BAR = 12  # times the shortest one of a table
OTHER_NETWORKS = ("SPAN", "SAFMN")


class Chart(NamedTuple):
    """A figure of matplotlib, the name of its file, and its caption."""

    name: str
    figure: object
    caption: str


def axes_of(title: str, **labels):
    """Return a figure with one set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")  # drawn by Agg: needs no display
    axes = figure.subplots()
    axes.set(**labels)
    axes.set_title(title, loc="left", weight="bold")
    axes.grid(alpha=0.25, which="both")
    return figure, axes


def machine_of(facts: dict) -> str:
    """Return the GPU's name, or the processor's and its number of threads."""
    info = facts["backend_info"]
    if facts["device"] not in info["platform"]:  # on a CPU, `device` is the architecture that the platform contains
        return facts["device"]
    threads = info["cpu"]["threads"]
    return f"{facts.get('processor') or facts['device']}, {threads} thread{'s'[: threads - 1]}"


# Bars


def draw(facts: dict, path: Path):
    """Write `bars_of` as a PNG, if matplotlib is installed."""
    if absent := harness.missing("matplotlib"):
        print(f"no chart: {absent}")
    elif figure := bars_of(facts, "SeemoRe inference"):
        figure.savefig(path, dpi=150)
        print(f"chart in {path}")


def bars_of(facts: dict, title: str):
    """Return a figure with a panel per table: medians as bars, and lines from the fastest to the slowest run.

    None if nothing was timed.
    """
    from matplotlib.figure import Figure

    tables = {name: found for name, rows in facts["cases"].items() if (found := bars(rows))}
    if not tables:
        return None
    heights = [len(found) for found in tables.values()]
    figure = Figure(figsize=(9, 0.26 * sum(heights) + 0.45 * len(heights) + 1), layout="constrained")
    figure.suptitle(f"{title} on {machine_of(facts)}", color=INK, weight="bold")
    panels = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, found) in zip(panels, tables.items(), strict=True):
        names, values, spreads, labels = zip(*found, strict=True)
        end = LONGEST_BAR * min(values)
        labels = [label if value <= end else f"cut: {label}" for value, label in zip(values, labels, strict=True)]
        colours = [OURS if provider.startswith(harness.OURS) else OTHERS for provider in names]
        shown = [min(value, end) for value in values]
        least, most = ([min(end, spread[side]) for spread in spreads] for side in (0, 1))
        errors = [[b - a for a, b in zip(low, high, strict=True)] for low, high in ((least, shown), (shown, most))]
        container = axes.barh(names, shown, xerr=errors, ecolor=INK, color=colours, height=0.75)
        axes.bar_label(container, labels, padding=5, color=INK, fontsize=8)
        for tick, colour in zip(axes.get_yticklabels(), colours, strict=True):
            tick.set(color=OURS if colour == OURS else INK, weight="bold" if colour == OURS else "normal")
        axes.set_title(name, loc="left", color=INK, fontsize=10, weight="bold")
        axes.margins(x=0.2)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.tick_params(left=False, bottom=False, labelbottom=False, labelsize=8)
        axes.spines[:].set_visible(False)
    note = f"median, fastest and slowest of up to {facts.get('runs', '?')} runs; in brackets: relative to ours"
    figure.supxlabel(f"{note} in the same precision", color=QUIET, fontsize=8)
    return figure


def bars(rows: dict[str, dict]) -> list[tuple[str, float, tuple[float, float], str]]:
    """Return (name, value, (least, most), label) of what was timed: the fastest first, or sizes in their order."""
    found = []
    for name, row in rows.items():
        if "ms" not in row or "max_error" not in row:  # wrong, or a limit of the machine
            continue
        if row.get("ns_pixel"):
            unit, label = row["ns_pixel"] / row["ms"], f"{row['ns_pixel']:.0f} ns per pixel ({row['x_pixel']:.2f}x)"
        else:
            unit, ms, ratio = 1, row["ms"], row.get("x_ours")
            label = f"{ms:,.{0 if ms >= 100 else 1}f} ms" + (f" ({ratio:.2f}x)" if ratio else "")
        spread = tuple(unit * row.get(key, row["ms"]) for key in ("ms_min", "ms_max"))
        found.append((name, unit * row["ms"], spread, label))
    return found if any(row.get("ns_pixel") for row in rows.values()) else sorted(found, key=lambda bar: bar[1])


# Curves


def roofline(operators: dict[str, dict]) -> Chart | None:
    """Plot each operator's GFLOP/s over its operations per byte, below the rates of a copy and of a matrix product."""
    points, copies, products = [], [], []
    for name, facts in operators.items():
        for title, rows in facts["cases"].items():
            ours = [row for provider, row in rows.items() if provider.startswith(harness.OURS) and row.get("gflop_s")]
            copies += [row["gb_s"] for provider, row in rows.items() if provider == harness.COPY]
            products += [row["gflop_s"] for provider, row in rows.items() if provider == f"{harness.MATMUL}fp32"]
            if ours and "fp32" in title and all(row.get("gb_s") for row in ours):
                best = min(ours, key=lambda row: row["ms"])
                points.append((name, title.split()[0], best["gflop_s"] / best["gb_s"], best["gflop_s"]))
    if not points or not copies or not products:
        return None
    bandwidth, peak = statistics.median(copies), max(products)
    ridge = peak / bandwidth
    low, high = min(point[2] for point in points) / 2, max(ridge, *(point[2] for point in points)) * 3
    title = f"Operators below the roofs of {machine_of(next(iter(operators.values())))}, float32"
    labels = {"xlabel": "operations per byte that has to move", "ylabel": "GFLOP/s"}
    figure, axes = axes_of(title, xlim=(low, high), **labels)
    axes.loglog([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linewidth=1.5)
    middle = (low * ridge) ** 0.5
    above = {"textcoords": "offset points", "va": "bottom", "color": QUIET, "fontsize": 9}
    axes.annotate(f"a copy: {bandwidth:.1f} GB/s", (middle, middle * bandwidth), (-6, 0), ha="right", **above)
    axes.annotate(f"a matrix product: {peak:.0f} GFLOP/s", (ridge, peak), (0, 3), **above)
    colours = dict(zip(dict.fromkeys(point[0] for point in points), COLOURS * 2, strict=False))
    for name, mode, intensity, rate in points:
        axes.plot(intensity, rate, MARKERS[mode], color=colours[name], markersize=7, alpha=0.85)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for mode, marker in MARKERS.items():
        axes.plot([], [], marker, color=INK, fillstyle="none", label=mode)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    caption = (
        "Each operator at each of its sizes, on the fastest backend. The roofs are the median of the copies and the "
        "best of the matrix products that were timed with them. Operations are those of the plain formulas: 3x3 layers "
        "need fewer with Winograd's method, and may lie above."
    )
    return Chart("roofline", figure, caption)


def growth(facts: dict) -> Iterator[Chart]:
    """Plot time and memory of a call over the pixels of the image, for tables with several sizes."""
    for title, rows in facts["cases"].items():
        series = {}
        for name, row in rows.items():
            if row.get("ns_pixel"):
                provider, size = name.rsplit(" ", 1)
                series.setdefault(provider, []).append((row["ms"] / row["ns_pixel"], size, row))
        for key, name, label in (("ms", "time", "ms per call"), ("step_mb", "memory", "MB added by a call")):
            plotted = {provider: sorted(p for p in points if p[2].get(key)) for provider, points in series.items()}
            if max(map(len, plotted.values()), default=0) < 2:
                continue
            heading = f"{name.capitalize()} against image size, {title.removeprefix('growth ')}"
            figure, axes = axes_of(heading, xlabel="megapixels of the input", ylabel=label)
            for provider, points in plotted.items():
                colour = OURS if provider.startswith(harness.OURS) else QUIET
                axes.loglog([p[0] for p in points], [p[2][key] for p in points], "o-", color=colour, label=provider)
                style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
                for pixels, size, row in points:
                    axes.annotate(size, (pixels, row[key]), (4, -12), **style)
            axes.margins(x=0.12)
            axes.legend()
            yield Chart(f"{name}_{slug(title)}", figure, f"On {machine_of(facts)}, a batch of one.")


def quality(facts: dict) -> Chart | None:
    """Plot the published PSNR of T, B and L over images per second: ours, and other ways to run the published code."""
    tables = {}
    for title, rows in facts["cases"].items():
        found = re.match(r"([TBL]) x(\d) (.+)", title)
        sets = PUBLISHED.get((f"SeemoRe-{found[1]}", int(found[2])), {}) if found else {}
        if psnr := sets.get("Urban100", (None,))[0]:
            tables.setdefault((found[2], found[3]), []).append((found[1], psnr, rows))
    if not tables:
        return None
    (scale, size), networks = max(tables.items(), key=lambda item: len(item[1]))
    timed = dict.fromkeys(name for _, _, rows in networks for name, row in rows.items() if "max_error" in row)
    timed = [name for name in timed if name.split()[0] not in OTHER_NETWORKS]  # whose quality is another one
    timed = [name for name in timed if not name.endswith(("portable", "avx2", "avx512"))]
    title = f"Quality against speed, {size}, on {machine_of(facts)}"
    figure, axes = axes_of(title, xlabel="images per second", ylabel=f"published PSNR on Urban100, dB, scale {scale}")
    ours_first = sorted(timed, key=lambda name: not name.startswith(harness.OURS))
    for name, colour in zip(ours_first, COLOURS * 2, strict=False):
        points = [(1000 / rows[name]["ms"], psnr) for _, psnr, rows in networks if "ms" in rows.get(name, {})]
        if name.startswith(harness.OURS):
            style, colour = f"D{':' if 'bf16' in name else '-'}", OURS
        else:
            style = "o--"
        axes.semilogx(*zip(*points, strict=True), style, color=colour, label=name)
    for label, psnr, _ in networks:
        axes.axhline(psnr, color=OTHERS, linewidth=0.6, zorder=0)
        axes.annotate(label, (0.01, psnr), xycoords=("axes fraction", "data"), va="bottom", weight="bold")
    axes.margins(y=0.15)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    caption = "A network gives the same picture however it is run: a line of points at one height is one network. The "
    caption += "quality is the published one of the authors' weights, not that of the shipped weights."
    return Chart("quality", figure, caption)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
