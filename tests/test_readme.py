"""Every example in the README runs, in the order it stands there."""

import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seemore_fast import backends, seemore_t
from seemore_fast.cli import main
from seemore_fast.evaluation.published import published
from seemore_fast.network import engine
from seemore_fast.network.gpu_memory import gpu_memory_needed

ROOT = Path(__file__).parent.parent
RESULTS, WEIGHTS = ROOT / "benchmarks" / "results", ROOT / "seemore_fast" / "weights"
README = (ROOT / "README.md").read_text()


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
    assert len(blocks) == 6
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


# Figures: each table says what its files of results say


def table_below(heading):
    """Return [(first cell of a row, {head of a column: cell})] of the first table below a heading."""
    lines = README[README.index(f"# {heading}\n") :].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("|"))
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin:]))
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return [(row[0], dict(zip(head[1:], row[1:], strict=True))) for row in rows]


def figures(name):
    return json.loads((RESULTS / "x86-64" / f"{name}.json").read_text())["cases"]


@pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")
def test_the_bytes_of_a_pixel(monkeypatch):
    text = " ".join(README.split())
    assert f"what exceeds {engine.IN_MEMORY >> 30} GiB" in text
    monkeypatch.setattr(engine, "IN_MEMORY", 0)
    shape, result = (1, 3, 3000, 4000), 12  # of uint8
    whole, streamed = (
        engine.plan_memory(seemore_t(2), shape, 2, itemsize=1, streamed=streamed) for streamed in (False, True)
    )
    bytes_of = {
        "takes about N bytes per input pixel on two threads": whole.memory / 12e6 - result,
        "the N bytes of features": streamed.disk / 12e6,
        "A call takes some N bytes per input pixel in float32": gpu_memory_needed(seemore_t(4), shape) / 12e6,
        "and N in bfloat16": gpu_memory_needed(seemore_t(4).bfloat16(), shape) / 12e6,
    }
    for words, counted in bytes_of.items():
        (told,) = re.findall(words.replace("N", r"(\d+)"), text)
        assert int(told) == pytest.approx(counted, rel=0.03), words


def test_the_table_of_inference():
    names = {
        "seemore-fast": "seemore-fast {}", "OpenVINO": "OpenVINO {}", "ONNX Runtime": "ONNX Runtime",
        "torch.compile, frozen": "reference torch.compile, frozen", "published": "published eager",
        "reference, channels_last": "reference eager channels_last",
    }  # fmt: skip
    cases, compared = figures("peers"), 0
    for row, cells in table_below("Inference on a CPU"):
        what, kind = row.split(",")[0], row.split(", ")[-1]
        (lines,) = (lines for title, lines in cases.items() if title.startswith(f"{what} "))
        for head, cell in cells.items():
            other = "published channels_last" if kind == "fp32" else "published bf16 autocast"
            name = other if head == "published, channels_last" else names[head].format(kind)
            if cell:
                assert cell == f"{lines[name]['ms']:.0f}", (row, head)
                compared += 1
    assert compared > 30


def test_the_table_of_training():
    cases, what, compared = figures("training"), None, 0
    names = {"ours": "seemore-fast {}", "published": "published {} eager"}
    for row, cells in table_below("Training on a CPU"):
        what, kind = row.split(",")[0] if row[0] in "TB" else what, row.split(", ")[-1]
        (lines,) = (lines for title, lines in cases.items() if title.startswith(f"{what} "))
        for head, cell in cells.items():
            name = names.get(head) or "{} {{}} {}".format(*head.split(", "))
            assert cell == f"{lines[name.format(kind)]['ms']:.0f}", (row, head)
            compared += 1
    assert compared == 20


def test_what_is_told_of_upscaling():
    few, large = (figures("upscaling")[title] for title in ("T x2 200 images 128x128", "T x2 6000x4000"))
    alone, whole, streamed = (
        lines[f"seemore-fast {name}"] for lines, name in ((few, "network alone"), (large, "whole"), (large, "streamed"))
    )
    png, jpeg = (alone["ms"] / few[f"seemore-fast folder of {kind}"]["ms"] for kind in ("PNG", "JPEG"))
    text = " ".join(README.split())
    assert f"has {100 * png:.0f} % of the speed of the network alone as PNG, {100 * jpeg:.0f} % as JPEG" in text
    assert f"takes {streamed['ms'] / whole['ms']:.2f} times as long as whole" in text
    assert f"and {streamed['step_mb'] / 1e3:.1f} GB instead of {whole['step_mb'] / 1e3:.1f}." in text


def test_the_table_of_quality():
    compared = 0
    for row, cells in table_below("Quality"):
        if row.startswith("scale"):
            name = f"bicubic_x{row[6]}"
        elif row.startswith("["):
            name = row[1 : row.index("]")]
        else:
            name, network, scale = None, row.split()[1], int(name[-1])
        for data, cell in cells.items():
            if name is None:
                assert cell == published(network, scale, data)
                continue
            with (RESULTS / "quality" / f"{name}.csv").open() as file:
                rows = [row for row in csv.DictReader(file) if row["data"] == data]
            assert len(rows) == {"Set5": 5, "Set14": 14, "B100": 100}[data]
            psnr, ssim = (np.mean([float(row[key]) for row in rows]) for key in ("psnr_y", "ssim_y"))
            assert cell == f"{psnr:.2f}/{ssim:.4f}"
            compared += 1
    assert compared == 18


def test_the_cards_say_what_the_readme_says():
    for row, cells in table_below("Quality"):
        if row.startswith("["):
            card = (WEIGHTS / f"{row[1 : row.index(']')]}.md").read_text()
            for cell in cells.values():
                psnr, ssim = cell.split("/")
                assert f" {psnr} " in card and ssim in card, (row, cell)
