"""The demonstration, as a newcomer runs it."""

import re
import sys

from PIL import Image

from seemore_fast.demo import __main__ as demo


def test_demo_writes_pictures_and_gains(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "folder"
    monkeypatch.setattr(sys, "argv", ["seemore_fast.demo", "-o", str(folder)])
    monkeypatch.setattr(demo, "RUNS", 1)
    demo.main()
    printed = capsys.readouterr().out
    assert float(re.search(r"gain over bicubic: ([+-][\d.]+) dB", printed)[1]) > 0.5
    assert "x as fast" in printed and str(folder / "side_by_side.png") in printed
    assert Image.open(folder / "chelsea_x2.png").size == (450, 300)
    page = Image.open(folder / "side_by_side.png")
    assert page.size == (900, 652) and len(page.getcolors(maxcolors=10**6)) > 1000
