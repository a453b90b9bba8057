"""The figures of a comparison as bars."""

from pathlib import Path

from seemore_fast.benchmarks import harness

OURS, OTHERS, INK, QUIET = "#d9480f", "#adb5bd", "#343a40", "#868e96"
LONGEST = 12


def draw(facts: dict, path: Path):
    """Write `bars_of` as a PNG, where matplotlib is installed."""
    absent = harness.missing("matplotlib")
    if absent:
        print(f"no chart: {absent}")
    elif figure := bars_of(facts, "SeemoRe inference"):
        figure.savefig(path, dpi=150)
        print(f"chart in {path}")


def bars_of(facts: dict, title: str):
    """Return a figure with a panel per table: medians as bars, and lines from the fastest to the slowest run.

    None where nothing was timed.
    """
    from matplotlib.figure import Figure

    tables = {name: bars(lines) for name, lines in facts["cases"].items()}
    tables = {name: rows for name, rows in tables.items() if rows}
    if not tables:
        return None
    heights = [len(rows) for rows in tables.values()]
    height = 0.26 * sum(heights) + 0.45 * len(heights) + 1
    figure = Figure(figsize=(9, height), layout="constrained")  # drawn by Agg: needs no display
    figure.suptitle(f"{title} on {machine_of(facts)}", color=INK, weight="bold")
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        names, values, spreads, labels = zip(*cut(rows), strict=True)
        ours = [provider.startswith(harness.OURS) for provider in names]
        axis.barh(names, values, color=[OURS if own else OTHERS for own in ours], height=0.75)
        axis.hlines(names, *zip(*spreads, strict=True), color=INK, linewidth=1)
        for row, (spread, label) in enumerate(zip(spreads, labels, strict=True)):
            axis.annotate(
                label, (spread[1], row), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=8
            )
        for tick, own in zip(axis.get_yticklabels(), ours, strict=True):
            tick.set(color=OURS if own else INK, weight="bold" if own else "normal")
        axis.set_title(name, loc="left", color=INK, fontsize=10, weight="bold")
        axis.set_xlim(0, 1.2 * max(spread[1] for spread in spreads))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(left=False, bottom=False, labelbottom=False, labelsize=8)
        axis.spines[:].set_visible(False)
    runs = facts.get("runs", "?")
    note = f"median, fastest and slowest of up to {runs} runs; in brackets: beside ours in the same precision"
    figure.supxlabel(note, color=QUIET, fontsize=8)
    return figure


def machine_of(facts: dict) -> str:
    """Return the GPU's name, or the processor's and how many threads ran on it."""
    info = facts["backend_info"]
    if facts["device"] not in info["platform"]:  # which names the processor's architecture, as `device` does on a CPU
        return facts["device"]
    threads = info["cpu"]["threads"]
    return f"{facts.get('processor') or facts['device']}, {threads} thread{'s'[: threads - 1]}"


def bars(lines: dict) -> list[tuple[str, float, tuple[float, float], str]]:
    """Return (name, value, (least, most), label) of what was timed, the fastest first; sizes as they are given."""
    rows = []
    for name, line in lines.items():
        if "ms" not in line or "max_error" not in line:  # not right, or a floor
            continue
        if line.get("ns_pixel"):
            unit, label = line["ns_pixel"] / line["ms"], f"{line['ns_pixel']:.0f} ns per pixel ({line['x_pixel']:.2f}x)"
        else:
            unit, ms, ratio = 1, line["ms"], line.get("x_ours")
            label = f"{ms:,.{0 if ms >= 100 else 1}f} ms" + (f" ({ratio:.2f}x)" if ratio else "")
        spread = tuple(unit * line.get(key, line["ms"]) for key in ("ms_min", "ms_max"))
        rows.append((name, unit * line["ms"], spread, label))
    return rows if any(line.get("ns_pixel") for line in lines.values()) else sorted(rows, key=lambda row: row[1])


def cut(rows: list[tuple]) -> list[tuple]:
    """Return the rows with bars that end at `LONGEST` times the shortest; those that do not fit say so."""
    end = LONGEST * min(value for _, value, _, _ in rows)
    return [
        (name, min(value, end), (min(least, end), min(most, end)), label if value <= end else f"cut: {label}")
        for name, value, (least, most), label in rows
    ]
