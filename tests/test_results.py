"""`seemore-fast benchmark compare` and `report`: changes, charts, and files that do not fit."""

import base64
import html.parser
import io
import json
import re

import pytest
from helpers import BENCHMARKS
from PIL import Image

from seemore_fast.cli import main

RESULTS = BENCHMARKS / "results"
INFO = {
    "seemore_fast": "0.1.0", "torch": "2.13", "python": "3.11", "platform": "Linux-x86_64",
    "cpu": {"threads": 2, "instruction_set": "avx2"},
}  # fmt: skip
FACTS = {"device": "x86_64", "processor": "Some CPU", "date": "2026-01-02T03:04:05", "commit": "abcdef0123456789",
         "runs": 5, "backend_info": INFO}  # fmt: skip


def test_files_of_the_repository_are_readable(tmp_path):
    """The schema of results: old files stay comparable and can be reported."""
    pytest.importorskip("matplotlib")
    written = sorted(RESULTS.glob("*/*.json"))
    assert written
    for path in written:
        assert main(["benchmark", "compare", str(path), str(path)]) == 0
    assert main(["benchmark", "report", str(RESULTS), "-o", str(tmp_path)]) == 0
    assert 1e4 < (tmp_path / "report.html").stat().st_size < 3e6


# Comparisons


def spread(ms, around=0.02):
    quartiles = [ms * (1 - around), ms * (1 + around)]
    return {"ms": ms, "ms_min": 0.9 * ms, "ms_max": 1.5 * ms, "ms_quartiles": quartiles}


def forward(ours, eager_ms=50, openvino=None):
    openvino = openvino or {"absent": "not installed"}
    return {"forward": {"seemore-fast cpu": ours, "torch eager": spread(eager_ms), "openvino": openvino}}


BEFORE = forward(spread(10))


@pytest.fixture
def compare(tmp_path, capsys):
    """Function from two tables of cases to (exit status, output, errors)."""

    def run(before, after, *options, **facts):
        files = []
        for name, cases, more in (("before", before, {}), ("after", after, facts)):
            files.append(tmp_path / f"{name}.json")
            files[-1].write_text(json.dumps({"device": "cpu", "backend_info": INFO, "cases": cases} | more))
        try:
            status = main(["benchmark", "compare", *map(str, files), *options])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("after", "options", "status", "printed"),
    [
        (BEFORE, [], 0, r"\A\s*2 same\s*\Z"),
        (forward(spread(12)), [], 1, r"seemore-fast cpu +10\.000 ms +12\.000 ms +1\.20x +slower"),
        (forward(spread(10.9)), [], 0, "2 same"),
        (forward(spread(10.9)), ["--threshold", "0.05"], 1, "1 slower, 1 same"),
        (forward(spread(12, around=0.2)), [], 0, "2 same"),  # within the noise
        (forward(spread(5), 90), [], 0, r"(?s)0\.50x  faster.*1\.80x  slower.*1 slower, 1 faster"),
        (forward({"wrong": "result 0 errs"}, openvino=spread(20)), ["--all"], 1, "1 same, 1 gone, 1 new\n"),
    ],
    ids=["same", "slower", "below threshold", "above another", "noise", "faster", "gone and new"],
)
def test_changes(compare, after, options, status, printed):
    found, output, _ = compare(BEFORE, after, *options)
    assert found == status and re.search(printed, output), output


@pytest.mark.parametrize(
    ("row", "after", "status"),
    [
        ({"ms": 10}, 10, 0),
        ({"ms": 10}, 14, 1),
        ({"ms": 10, "ms_min": 9, "ms_max": 15}, 14, 0),  # the slowest run took 15
        ({"ms": 10, "ms_min": 9, "ms_max": 15}, 16, 1),
    ],
)
def test_old_files_have_less_of_a_spread(compare, row, after, status):
    assert compare(forward(row), forward(spread(after)))[0] == status


@pytest.mark.parametrize(
    ("facts", "printed"),
    [
        ({"cases_left_out": 3}, r"^incomplete: .*after.json lacks 3 cases, its run was stopped$"),
        ({"backend_info": {**INFO, "build": "no _C"}}, "^different: compiler: None before, no _C after$"),
        ({"device": "cpu 2"}, "^different: device: cpu before, cpu 2 after$"),
        ({"backend_info": {**INFO, "torch": "2.12"}}, "^different: torch: 2.13 before, 2.12 after$"),
    ],
)
def test_different_conditions_are_reported(compare, facts, printed):
    status, output, _ = compare(BEFORE, BEFORE, **facts)
    assert status == 0 and re.search(printed, output, re.M)


def test_other_benchmarks_are_refused(compare):
    status, _, errors = compare(BEFORE, {"backward": BEFORE["forward"]})
    assert status == 2 and "no case in common" in errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "was not written by `seemore-fast benchmark`"),
        ('{"benchmarks": []}', "pytest-benchmark compare"),
        (None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "compare", str(bad), str(bad)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


# The report


def timed(ms, **more):
    return {"ms": ms, "ms_min": ms, "ms_max": ms, "x_ours": 1.0, "ns_pixel": None, "max_error": 1e-7, **more}


def sized(ms, pixels, mb):
    return timed(ms, ns_pixel=1e6 * ms / pixels, x_pixel=1.0, step_mb=mb)


ROUTER = {
    "seemore-fast cpu": timed(2.0, gb_s=10.0, gflop_s=60.0, of_copy=0.8, of_matmul=0.5),
    "torch eager": timed(9.0),
    "clone": {"ms": 1, "gb_s": 12.0},
    "matmul fp32": {"ms": 1, "gflop_s": 120.0},
}
FILES = {
    "router": {"forward 1x36x9x9 fp32": ROUTER},
    "peers": {
        "T x4 320x180": {"seemore-fast fp32": timed(300.0), "published eager": timed(1200.0)},
        "B x4 320x180": {"seemore-fast fp32": timed(600.0), "OpenVINO fp32": {"absent": "pip install <it>"}},
        "growth T x4": {
            "seemore-fast 320x180": sized(300.0, 57600, 20),
            "seemore-fast 640x360": sized(1200.0, 230400, 80),
            "published channels_last 320x180": sized(900.0, 57600, 60),
        },
    },
    "training": {"T x2": {"seemore-fast fp32": timed(600.0), "published eager": {"wrong": "result 0 errs"}}},
}


class Links(html.parser.HTMLParser):
    """Parser that collects what a page loads and checks that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Function from tables by file to the text of their page."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    def run(files, *more, **facts):
        (tmp_path / "results").mkdir()
        for stem, cases in files.items():
            (tmp_path / "results" / f"{stem}.json").write_text(json.dumps(FACTS | facts | {"cases": cases}))
        assert main(["benchmark", "report", "results", *map(str, more), "-o", "out"]) == 0
        return (tmp_path / "out" / "report.html").read_text()

    return run


def test_the_page_has_every_chart_and_loads_nothing(report, tmp_path):
    page = report(FILES)
    links = Links(page)
    assert links.open == [] and all(link.startswith("data:") for link in links.loaded)
    charts = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    names = ["roofline", "peers", "training", "time_growth_t_x4", "memory_growth_t_x4", "quality"]
    assert re.findall('img alt="([^"]*)"', page) == names
    for name, data in zip(names, charts, strict=True):
        assert (tmp_path / "out" / f"x86-64_{name}.png").read_bytes() == data
        with Image.open(io.BytesIO(data)) as image:
            assert min(image.size) > 200
    for kind in ("kernels", "inference", "training"):
        assert f"<code>seemore-fast benchmark {kind}</code>, 2026-01-02, commit abcdef0123" in page
    assert "Some CPU, 2 threads" in page
    row = ["router forward 1x36x9x9 fp32", "2.00", "9.00", "4.5x", "80%", "50%"]
    assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "<td>absent: pip install &lt;it&gt;</td>" in page and "<td>wrong: result 0 errs</td>" in page


def test_the_origin_of_figures_is_reported(report):
    command = "seemore-fast benchmark kernels --runs 5"
    page = report({"router": FILES["router"]}, command=command, uncommitted=["M x"], cases_left_out=3)
    assert page.count("<img") == 1 and f"Made by <code>{command}</code>" in page
    assert "with changes, 5 runs. Stopped: 3 cases are missing." in page


def test_bars_that_do_not_fit_are_cut():
    pytest.importorskip("matplotlib")
    from seemore_fast.benchmarks.charts import bars_of

    rows = {"seemore-fast": timed(1.0), "other": timed(30.0, ms_min=5.0, ms_max=50.0)}
    (axes,) = bars_of(FACTS | {"cases": {"T": rows}}, "title").axes
    assert [bar.get_width() for bar in axes.patches] == [1, 12]
    assert [text.get_text() for text in axes.texts] == ["1.0 ms (1.00x)", "cut: 30.0 ms (1.00x)"]


def test_tables_of_a_gpu_are_of_one_dtype_and_of_this_network():
    pytest.importorskip("matplotlib")
    from seemore_fast.benchmarks.charts import quality

    rows = {"seemore-fast": timed(2.0), "SPAN fp16": timed(1.0)}
    cases = {"T x4 640x480": {"seemore-fast": timed(9.0)}}
    cases |= {f"{name} x4 640x480 bf16": dict(rows) for name in "TB"}
    (axes,) = quality(FACTS | {"cases": cases}).figure.axes
    plotted = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert plotted["seemore-fast"] == [500, 500] and not any("SPAN" in name for name in plotted)
    assert "640x480 bf16" in axes.get_title(loc="left")


def test_other_files_are_named_and_left_out(report, tmp_path, capsys):
    """Two machines are two sections, though their results share a folder; a second file of one machine is not read."""
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "more").mkdir()
    others = {"gate": {"processor": "Another CPU"}, "router": {}}
    for name, facts in others.items():
        text = json.dumps(FACTS | facts | {"cases": FILES["router"]})
        (tmp_path / "more" / f"{name}.json").write_text(text)
    page, printed = report({"router": FILES["router"]}, "more", "broken.json"), capsys.readouterr().out
    assert page.count("<h2>Some CPU, 2 threads</h2>") == page.count("<h2>Another CPU, 2 threads</h2>") == 1
    assert "broken.json is not JSON" in printed
    assert "more/router.json is a second router of the same machine, x86-64" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"x86-64_roofline.png", "x86-64-2_roofline.png"}


@pytest.mark.parametrize(("path", "message"), [("nowhere", "does not exist"), (".", "no file of results")])
def test_nothing_to_report(path, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "report", path])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("width", [420, 1280])
def test_the_page_in_a_browser(report, browser, tmp_path, width):
    report(FILES)
    browser.open(tmp_path / "out" / "report.html", width, 800)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert not browser.errors()
