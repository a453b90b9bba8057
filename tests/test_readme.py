"""Every example in the README runs, in the order it stands there."""

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from seemore_fast.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


LESS = ["steps=2", "data.patch=16", "data.batch=2"]  # of what a training would take


def photo(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    Image.fromarray(pixels).save(folder / "logo.png")
    for name in ("photos", "held_out"):
        (folder / name).mkdir()
        Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(folder / name / "photo.png")


def test_python_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert Image.open("large.png").size == (60, 40)
    assert names["y"].shape == (1, 8, 32, 32)


def test_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path)
    lines = re.findall(r"^    seemore-fast (?!benchmark)(.*)$", README, re.M)  # that one takes its time
    assert len(lines) == 14
    for line in lines:
        arguments = shlex.split(line, comments=True)
        assert main([*arguments, *(LESS if arguments[0] == "train" else [])]) == 0
    assert {"weights.safetensors", "steps.csv"} <= {path.name for path in (tmp_path / "runs" / "mine").iterdir()}
    made = sorted(path.name for path in (tmp_path / "enlarged").iterdir())
    assert made == ["logo_x2.png", "photo_x2.jpg", "photo_x2.png", "photo_x2.webp"]
    assert Path("page.html").read_text().count("<figure>") == 1
    assert Image.open("wide.png").size == (3840, 2560)
