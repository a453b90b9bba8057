"""`seemore-fast benchmark report`: one page that needs nothing else, and what it does with files that do not fit."""

import base64
import html.parser
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from seemore_fast.cli import main

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
INFO = {
    "seemore_fast": "0.1.0", "torch": "2.13", "python": "3.11", "platform": "Linux-x86_64", "cpu": {"threads": 2},
    "cuda": {"available": False},
}  # fmt: skip
FACTS = {"device": "x86_64", "processor": "Some CPU", "date": "2026-01-02T03:04:05", "commit": "abcdef0123456789",
         "runs": 5, "backend_info": INFO}  # fmt: skip


def line(ms, **more):
    return {"ms": ms, "ms_min": ms, "ms_max": ms, "x_ours": 1.0, "ns_pixel": None, "max_error": 1e-7, **more}


def sized(ms, pixels, mb):
    return line(ms, ns_pixel=1e6 * ms / pixels, x_pixel=1.0, step_mb=mb)


OURS = line(2.0, gb_s=10.0, gflop_s=60.0, of_copy=0.8, of_matmul=0.5)
FLOORS = {"clone": {"ms": 1, "gb_s": 12.0}, "matmul fp32": {"ms": 1, "gflop_s": 120.0}}
FILES = {
    "router": {"forward 1x36x9x9 fp32": {"seemore-fast cpu": OURS, "torch eager": line(9.0), **FLOORS}},
    "peers": {
        "T x4 320x180": {"seemore-fast fp32": line(300.0), "published eager": line(1200.0)},
        "B x4 320x180": {"seemore-fast fp32": line(600.0), "OpenVINO fp32": {"absent": "pip install <it>"}},
        "growth T x4": {
            "seemore-fast 320x180": sized(300.0, 57600, 20),
            "seemore-fast 640x360": sized(1200.0, 230400, 80),
            "published channels_last 320x180": sized(900.0, 57600, 60),
        },
    },
    "training": {"T x2": {"seemore-fast fp32": line(600.0), "published eager": {"wrong": "result 0 errs"}}},
}


class Links(html.parser.HTMLParser):
    """What a page would load, and whether every element that it opens is closed."""

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
    """Function from tables by file to the page that is made of them."""
    monkeypatch.chdir(tmp_path)

    def run(files, *more):
        (tmp_path / "results").mkdir()
        for stem, cases in files.items():
            (tmp_path / "results" / f"{stem}.json").write_text(json.dumps(FACTS | {"cases": cases}))
        assert main(["benchmark", "report", "results", *map(str, more), "-o", "out"]) == 0
        return (tmp_path / "out" / "report.html").read_text()

    return run


def test_the_page_has_every_picture_and_loads_nothing(report, tmp_path):
    page = report(FILES)
    links = Links(page)
    assert links.open == [] and all(link.startswith("data:") for link in links.loaded)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    names = ["roofline", "peers", "training", "time_growth_t_x4", "memory_growth_t_x4", "quality"]
    assert [re.sub("[^a-z_0-9]", "", name) for name in re.findall('img alt="([^"]*)"', page)] == names
    for name, data in zip(names, pictures, strict=True):
        assert (tmp_path / "out" / f"x86-64_{name}.png").read_bytes() == data
        with Image.open(io.BytesIO(data)) as image:
            assert min(image.size) > 200
    assert len(page) < 3e6


def test_figures_come_with_their_command_machine_and_commit(report):
    page = report(FILES)
    for kind in ("kernels", "inference", "training"):
        assert f"<code>seemore-fast benchmark {kind}</code>, 2026-01-02, commit abcdef0123" in page
    assert "Some CPU, 2 threads" in page
    assert (
        "<td>router forward 1x36x9x9 fp32</td><td>2.00</td><td>9.00</td><td>4.5x</td><td>80%</td><td>50%</td>" in page
    )


def test_who_was_not_timed_is_listed_and_escaped(report):
    page = report(FILES)
    assert "<td>absent: pip install &lt;it&gt;</td>" in page and "<td>wrong: result 0 errs</td>" in page


def test_one_file_is_enough(report):
    assert report({"router": FILES["router"]}).count("<img") == 1


def test_tables_of_a_gpu_are_of_one_dtype_and_of_this_network():
    from seemore_fast.benchmarks.report import quality

    lines = {"seemore-fast": line(2.0), "SPAN fp16": line(1.0)}
    cases = {"T x4 640x480": {"seemore-fast": line(9.0)}}
    cases |= {f"{name} x4 640x480 bf16": dict(lines) for name in "TB"}
    (axis,) = quality(FACTS | {"cases": cases}).figure.axes
    drawn = {plotted.get_label(): list(plotted.get_xdata()) for plotted in axis.lines}
    assert drawn["seemore-fast"] == [500, 500] and not any("SPAN" in name for name in drawn)
    assert "640x480 bf16" in axis.get_title(loc="left")


def test_a_run_that_was_stopped_is_told(report, monkeypatch):
    monkeypatch.setitem(FACTS, "cases_left_out", 3)
    assert "5 runs. Stopped: 3 cases are missing." in report(FILES)


def test_other_files_are_named_and_left_out(report, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    report(FILES, tmp_path / "broken.json", tmp_path / "other.json")
    printed = capsys.readouterr().out
    assert "broken.json is no JSON" in printed and "other.json is no file that" in printed


@pytest.mark.parametrize(("path", "said"), [("nowhere", "does not exist"), (".", "no file of figures")])
def test_nothing_to_report(path, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "report", path])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_repositorys_own_figures(tmp_path):
    assert main(["benchmark", "report", str(RESULTS), "-o", str(tmp_path)]) == 0
    assert 1e4 < (tmp_path / "report.html").stat().st_size < 3e6


def test_two_machines_are_two_sections(report, tmp_path, capsys):
    """Though their results go to one folder; and the same file of one machine again is told, not taken."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "gate.json").write_text(
        json.dumps(FACTS | {"processor": "Another CPU", "cases": FILES["router"]})
    )
    (tmp_path / "more" / "router.json").write_text(json.dumps(FACTS | {"cases": FILES["router"]}))
    page = report({"router": FILES["router"]}, "more")
    assert page.count("<h2>Some CPU, 2 threads</h2>") == page.count("<h2>Another CPU, 2 threads</h2>") == 1
    assert "more/router.json is a second router of the same machine, x86-64" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"x86-64_roofline.png", "x86-64-2_roofline.png"}


def test_the_command_that_was_given_is_told(report, monkeypatch):
    monkeypatch.setitem(FACTS, "command", "seemore-fast benchmark kernels --runs 5")
    monkeypatch.setitem(FACTS, "uncommitted", ["M x"])
    page = report({"router": FILES["router"]})
    assert "Made by <code>seemore-fast benchmark kernels --runs 5</code>" in page and "with changes" in page


@pytest.mark.parametrize("width", [420, 1280])
def test_the_page_in_a_browser(report, browser, tmp_path, width):
    report(FILES)
    browser.open(tmp_path / "out" / "report.html", width, 800)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert not browser.complaints()
