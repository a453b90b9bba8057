"""The command line: results, exit statuses, usage errors and failures that are one line."""

import argparse
import json
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.images import pixels
from helpers.networks import SMALL
from PIL import Image

from seemore_fast import SeemoRe, Upscaler, cli
from seemore_fast.backends import backend_for_device
from seemore_fast.cli import main


def test_the_shipped_model_is_the_default(photos, capsys):
    assert main(["upscale", str(photos / "photo.png"), "-o", str(photos / "big.png"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 image upscaled 2x in " in printed and f"backend {backend_for_device()})" in printed
    expected = Upscaler("seemore_t_x2", device="cpu")(pixels(3))
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "big.png")), expected)


@pytest.mark.parametrize(
    ("command", "required", "old", "new"),
    [
        (cli.upscale, ["photo.png", "-o", "big.png"], ["--tile", "exact"], ["--stream"]),
        (cli.evaluate, ["--model", "bicubic", "--data", "photos"], ["--ensemble"], ["--tta"]),
    ],
)
def test_old_spellings_are_hidden_aliases(command, required, old, new):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args([*required, *old]) == parser.parse_args([*required, *new])
    assert new[0] in parser.format_help() and old[0] not in parser.format_help()


USAGE_ERRORS = {
    "no such folder": (["photo.png", "-o", "none/big.png"], "folder .*none does not exist"),
    "no such parent of a folder": (["photo.png", "-o", "none/deeper/"], "folder .*none does not exist"),
    "one file for two": (["photo.png", "photo.png", "-o", "big.png"], "one file for 2 inputs"),
    "two for one name": (["photo.png", "out/../photo.png", "-o", "out"], "also read or written"),
    "over itself": (["photo.png", "-o", "photo.png"], "also read or written"),
    "no such model": (["photo.png", "-o", "big.png", "--model", "seemore_q"], "seemore_q.*seemore_t_x2"),
    "no such weights": (["photo.png", "-o", "big.png", "--model", "none.pth"], "none.pth does not exist"),
    "two kinds of size": (["photo.png", "-o", "big.png", "--outscale", "2", "--width", "9"], "only one of them"),
    "no such scale": (["photo.png", "-o", "big.png", "--scale", "5"], "invalid choice"),
    "another scale": (["photo.png", "-o", "big.png", "--scale", "3"], "has scale 2, expected 3"),
    "no such device": (["photo.png", "-o", "big.png", "--device", "gpu"], "device is 'gpu'"),
    "an empty input": (["", "-o", "out"], "INPUT: the name is empty"),
    "an empty output": (["photo.png", "-o", ""], "OUT is empty"),
    "no suffix": (["photo.png", "-o", "big"], "ends in '', expected one of .png.* slash"),
    "a strange suffix": (["photo.png", "-o", "big.bmp"], "ends in '.bmp'"),
    "no limit": (["photo.png", "-o", "big.png", "--max-megapixels", "nan"], "nan is not above 0"),
    "independent tiles": (["photo.png", "-o", "big.png", "--tile", "64"], "use --stream"),
    "no output": (["photo.png"], "required.*--output"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_errors(photos, upscale, monkeypatch, arguments, message):
    monkeypatch.chdir(photos)
    before = sorted(os.listdir(photos))
    status, printed = upscale(*arguments)
    assert status == 2
    assert len([line for line in printed.splitlines() if line.startswith("seemore-fast upscale:")]) == 1
    assert re.search(message, printed)
    assert sorted(os.listdir(photos)) == before
    assert not os.listdir(photos / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_each_of_torchruns_processes_has_a_gpu_of_its_own(photos, upscale, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    status, printed = upscale(photos / "photo.png", "-o", photos / "big.png", "--device", "cuda")
    assert status == 2 and "device is 'cuda:1', but torch finds no CUDA device" in printed
    assert upscale(photos / "photo.png", "-o", photos / "big.png")[0] == 0


def test_bad_weights(photos, upscale):
    torch.save({"conv.weight": torch.zeros(3, 3, 1, 1)}, photos / "bad.pth")
    status, printed = upscale(photos / "photo.png", "-o", photos / "big.png", model=photos / "bad.pth")
    assert status == 1 and "bad.pth: holds no conv_1.weight, so it is no SeemoRe" in printed


def test_read_only_targets(photos, upscale):
    target = photos / "out" / "photo_x2.png"
    target.write_text("precious")
    target.chmod(0o444)
    status, printed = upscale(photos / "photo.png", "-o", photos / "out", "--overwrite")
    assert status == 1 and "photo_x2.png is read-only" in printed and target.read_text() == "precious"
    (photos / "out").chmod(0o555)
    assert upscale(photos / "photo.png", "-o", photos / "out" / "new.png")[0] == 1
    (photos / "out").chmod(0o755)
    assert os.listdir(photos / "out") == ["photo_x2.png"]


def test_running_out_of_memory_is_one_line(photos, upscale, monkeypatch):
    error = RuntimeError("not enough memory: you tried to allocate 9 bytes.\nmore lines")
    monkeypatch.setattr(Upscaler, "__call__", Mock(side_effect=error))
    status, printed = upscale(photos / "photo.png", "-o", photos / "big.png")
    assert status == 1 and "photo.png: not enough memory" in printed and "more lines" not in printed


def test_interrupt_leaves_nothing(photos, upscale, monkeypatch):
    monkeypatch.setattr(Upscaler, "__call__", Mock(side_effect=KeyboardInterrupt))
    assert upscale(photos / "photo.png", "-o", photos / "out/big.png")[0] == 130
    assert not os.listdir(photos / "out")


def test_an_assumption_about_the_model_is_said(photos, upscale):
    torch.save(SeemoRe(**SMALL).state_dict(), photos / "own.pth")
    status, printed = upscale(photos / "photo.png", "-o", photos / "big.png", model=photos / "own.pth")
    assert status == 0 and "warning: 2 groups of 12 channels is no published size" in printed


def test_info_is_json(capsys):
    assert main(["info"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == "auto" and "seemore_t_x2" in facts["models"]


def test_as_a_process(photos):
    (photos / "text.png").write_text("hello")
    command = ["seemore_fast.cli", "upscale", photos / "photo.png", photos / "text.png", "-o", photos / "out"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 2 images upscaled" in done.stdout and "text.png: is not a" in done.stderr
    assert Image.open(photos / "out" / "photo_x2.png").size == (40, 32)
