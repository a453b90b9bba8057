"""The demonstration, as a newcomer runs it."""

import re
import subprocess
import sys

from PIL import Image


def test_demo_writes_pictures_and_gains(tmp_path):
    command = [sys.executable, "-m", "seemore_fast.demo", "-o", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gain = float(re.search(r"gain over bicubic: ([+-][\d.]+) dB", done.stdout)[1])
    assert gain > 0.5
    assert "x as fast" in done.stdout
    assert str(tmp_path / "new" / "folder" / "side_by_side.png") in done.stdout
    assert Image.open(tmp_path / "new/folder/chelsea_x2.png").size == (450, 300)
    page = Image.open(tmp_path / "new/folder/side_by_side.png")
    assert page.size == (900, 652)
    assert len(page.getcolors(maxcolors=10**6)) > 1000
