"""Folders of images: what is found, where it goes, what is skipped, and how a run ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.images import listing, pixels
from PIL import Image

from seemore_fast import Upscaler
from seemore_fast.cli import main
from seemore_fast.errors import ImageError
from seemore_fast.io.images import Picture, write_image
from seemore_fast.upscale import jobs
from seemore_fast.upscale.jobs import JobError, Jobs, is_share


@pytest.fixture
def tree(tmp_path):
    """photos/{a.png, b.JPG, notes.txt, deep/{a.png, "c d \u00e9.png"}, empty/}"""
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True), (photos / "empty").mkdir()
    for name in ("a.png", "b.JPG", "deep/a.png", "deep/c d \u00e9.png"):
        Image.fromarray(pixels(3)).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    return photos


RESULTS = ["a_x2.png", "b_x2.JPG", "deep/a_x2.png", "deep/c d \u00e9_x2.png"]


def test_a_folder_keeps_its_tree(tree, upscale, weights, tmp_path):
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 0 and "4 of 4 upscaled 2 times" in printed
    assert listing(tmp_path / "out") == RESULTS
    expected = Upscaler(weights, device="cpu")(pixels(3))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / RESULTS[3])), expected)


def test_what_exists_is_skipped_unless_told(tree, upscale, tmp_path):
    assert upscale(tree, "-o", tmp_path / "out")[0] == 0
    kept = tmp_path / "out" / "deep" / "a_x2.png"
    kept.write_bytes(b"mine")
    (tmp_path / "out" / "a_x2.png").unlink()
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 0 and "1 of 4 upscaled" in printed and "3 were there already" in printed
    assert kept.read_bytes() == b"mine"
    kept.unlink()
    kept.mkdir()
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 1 and "3 were there already" in printed and "a_x2.png: cannot be written: " in printed
    kept.rmdir()
    kept.write_bytes(b"mine")
    assert upscale(tree, "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert Image.open(kept).size == (40, 32)


def test_endings_suffixes_and_quality(tree, upscale, tmp_path):
    assert upscale(tree, "-o", tmp_path / "out", "--ext", "jpg", "--suffix=-big", "--quality", "40")[0] == 0
    assert listing(tmp_path / "out") == ["a-big.jpg", "b-big.jpg", "deep/a-big.jpg", "deep/c d \u00e9-big.jpg"]
    small = (tmp_path / "out" / "a-big.jpg").stat().st_size
    assert upscale(tree / "a.png", "-o", tmp_path / "whole.jpg")[0] == 0
    assert small < (tmp_path / "whole.jpg").stat().st_size


@pytest.mark.parametrize(
    ("wanted", "size", "name"),
    [
        (["--outscale", "1.5"], (30, 24), "a_x1.5.png"),
        (["--width", "50"], (50, 40), "a_w50.png"),
        (["--width", "10", "--height", "99"], (10, 99), "a_w10xh99.png"),
    ],
)
def test_sizes_of_files(tree, upscale, tmp_path, wanted, size, name):
    assert upscale(tree / "a.png", "-o", f"{tmp_path / 'out'}/", *wanted)[0] == 0
    assert Image.open(tmp_path / "out" / name).size == size


def test_results_among_the_inputs_are_not_taken_for_inputs(tree, upscale):
    for _ in range(2):
        assert upscale(tree, "-o", tree)[0] == 0
        assert [name for name in listing(tree) if "_x2" in name] == sorted(RESULTS)
    assert upscale(tree, "-o", tree / "out")[0] == 0
    first = listing(tree / "out")
    assert len(first) == 8 and not [name for name in first if name.startswith("out")]
    assert upscale(tree, "-o", tree / "out")[0] == 0
    assert listing(tree / "out") == first


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            ["a.png", "a.jpg"],
            ["--ext", "png"],
            r"a_x2\.png, the output of .*a\.png, is also read .* for .*a\.jpg",
        ),
        (["a.png", "a_x2.png"], [], None),
        (["a.png", "a_x2.png"], ["--suffix", ""], r"the output of .*a\.png, is also read or written"),
    ],
)
def test_two_for_one_name_are_refused_before_anything_is_done(upscale, tmp_path, files, options, message):
    (tmp_path / "in").mkdir()
    for name in files:
        Image.fromarray(pixels(3)).save(tmp_path / "in" / name)
    before = listing(tmp_path)
    status, printed = upscale(tmp_path / "in", "-o", tmp_path / "in", *options)
    if message is None:  # a result of an earlier run, which is there already
        assert status == 0 and listing(tmp_path) == before
        return
    assert status == 2 and listing(tmp_path) == before
    assert re.search(message, printed)


def test_links_to_folders_are_not_followed_and_links_to_files_are(tree, upscale, tmp_path):
    (tree / "deep" / "loop").symlink_to(tree)
    (tree / "z.png").symlink_to(tree / "a.png")
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 0 and "loop is a link to a folder, which is not followed" in printed
    assert listing(tmp_path / "out") == sorted([*RESULTS, "z_x2.png"])


def test_links_that_lead_nowhere_are_failures_of_their_own(tree, upscale, tmp_path):
    for name in ("loop.png", "loop"):
        (tree / name).symlink_to(tree / name)
    (tree / "gone.png").symlink_to(tree / "never.png")
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 1 and "4 of 6 upscaled" in printed and listing(tmp_path / "out") == RESULTS
    assert f"failed: {tree / 'loop.png'}: cannot be read: Too many levels of symbolic links" in printed
    assert f"failed: {tree / 'gone.png'}: does not exist" in printed


def test_what_is_left_alone_is_told(tree, upscale, tmp_path):
    for name in ("e.gif", "f.GIF", "b.bmp", ".seemore-fast.1.2.tmp.png"):
        (tree / name).write_bytes(b"")
    Image.fromarray(pixels(3)).save(tree / "deep" / "kept_x2.png")
    status, printed = upscale(tree, "-o", tree / "deep")
    assert status == 0 and "2 of 2 upscaled" in printed  # a.png and b.JPG
    assert f"{tree / 'deep'} is the folder of results: what it holds is not read" in printed
    assert f"{tree}: left alone, 2 that end in .gif, which is not read" in printed
    assert f"{tree}: left alone, 1 that end in .bmp, which is not read" in printed and ".1.2.tmp" not in printed
    status, printed = upscale(tree / "deep", "-o", tree / "deep")
    assert f"{tree / 'deep'}: left alone, 2 that end in _x2, which results do" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that tells capitals from small letters")
def test_a_folder_that_takes_capitals_for_small_letters(tree, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("A.png", "e\u0301.png", "\u00e9.png"):
        Image.fromarray(pixels(3)).save(tree / name)
    assert Jobs([tree], str(tmp_path / "out")).check() == 7
    assert os.listdir(tmp_path / "out") == []  # how that was found out is gone
    monkeypatch.setattr(jobs, "is_case_blind", lambda folder: True)
    with pytest.raises(JobError, match=r"a_x2\.png, the output of .*, is also read or written for .*A\.png"):
        Jobs([tree], str(tmp_path / "out")).check()
    (tree / "A.png").unlink()
    with pytest.raises(JobError, match="is also read or written for"):
        Jobs([tree], str(tmp_path / "out")).check()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that tells capitals from small letters")
def test_case_blindness_is_seen_by_a_file(tmp_path, monkeypatch):
    assert not jobs.is_case_blind(tmp_path / "not" / "there")

    def exists(path):  # as a blind folder would say
        return str(path).lower() in [str(there).lower() for there in tmp_path.iterdir()]

    monkeypatch.setattr(os.path, "exists", exists)
    assert jobs.is_case_blind(tmp_path / "not" / "there") and not list(tmp_path.iterdir())


def test_bad_files_and_empty_folders_cost_the_others_nothing(tree, upscale, tmp_path):
    (tree / "cut.png").write_bytes((tree / "a.png").read_bytes()[:60])
    long = "n" * 251 + ".png"
    Image.fromarray(pixels(3)).save(tree / long)
    status, printed = upscale(tree, tree / "empty", "-o", tmp_path / "out")
    assert status == 1 and "4 of 6 upscaled" in printed and listing(tmp_path / "out") == RESULTS
    failures = [line for line in printed.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 3
    assert any("cut.png" in line and "damaged" in line for line in failures)
    assert any("empty: holds no file that ends in" in line for line in failures)
    assert any("n" * 251 in line and "File name too long" in line for line in failures)


def test_a_file_that_vanishes_or_changes(tree, upscale, tmp_path, monkeypatch):
    from seemore_fast.io import images

    read = images._read

    def meddle(file, *limits):
        picture = read(file, *limits)
        if str(file.name) == str(tree / "a.png"):
            os.utime(file.name, ns=(1, 1))
            (tree / "b.JPG").unlink()
        return picture

    monkeypatch.setattr(images, "_read", meddle)
    status, printed = upscale(tree / "a.png", tree / "b.JPG", "-o", f"{tmp_path / 'out'}/")
    assert status == 1
    assert "a.png: changed while it was read" in printed and "b.JPG: does not exist" in printed
    assert not listing(tmp_path / "out")


def test_a_summary_for_scripts(tree, capsys, weights, tmp_path):
    from seemore_fast.cli import main

    (tree / "cut.png").write_bytes(b"no image")
    assert main(
        ["upscale", str(tree), "-o", str(tmp_path / "out"), "--json", "--device", "cpu", "--model", str(weights)]
    )
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["skipped"], summary["failed"]) == (4, 0, 1)
    (bad,) = (file for file in summary["files"] if file["error"])
    assert bad["source"] == str(tree / "cut.png") and "cut.png" in bad["error"]


def test_several_devices_share_the_files(tree, upscale, tmp_path, weights):
    status, printed = upscale(tree, "-o", tmp_path / "out", "--devices", "cpu,cpu,cpu")
    assert status == 0 and "4 of 4 upscaled" in printed and "(cpu, cpu, cpu" in printed
    expected = Upscaler(weights, device="cpu")(pixels(3))
    for name in RESULTS:
        if name.endswith(".png"):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / name)), expected)


def test_processes_share_the_files(tree, tmp_path):
    listed = Jobs([tree], f"{tmp_path / 'out'}/")
    shares = [[job.target for job in listed if is_share(job, rank, 3)] for rank in range(3)]
    assert sorted(target for share in shares for target in share) == sorted(job.target for job in listed)


def test_jobs_are_refused_with_a_reason(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="file is a file, expected a folder"):
        Jobs([tree], str(tmp_path / "file"))
    with pytest.raises(JobError, match=r"the ending '.gif' is none of .png"):
        Jobs([tree], str(tmp_path / "out"), extension=".gif")
    for suffix in ("a/b", "\0"):
        with pytest.raises(JobError, match="is no part of a file name"):
            Jobs([tree], str(tmp_path / "out"), suffix=suffix)


@pytest.mark.parametrize(("factor", "scale"), [("1.7", 2), ("2", 2), ("2.5", 3), ("4", 4), ("7", 4)])
def test_the_least_scale_that_reaches_the_size(tmp_path, capsys, factor, scale):
    Image.fromarray(pixels(3)).save(tmp_path / "a.png")
    arguments = ["upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--outscale", factor, "--device", "cpu"]
    assert main([*map(str, arguments), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scale"] == scale
    assert Image.open(tmp_path / "b.png").size == tuple(round(side * float(factor)) for side in (20, 16))


def test_torchrun_shares_the_files_and_one_process_reports(tree, tmp_path, weights):
    """Whichever process has the file that fails."""
    for i in range(6):
        Image.fromarray(pixels(3)).save(tree / f"n{i}.png")
    (tree / "cut.png").write_bytes((tree / "a.png").read_bytes()[:60])
    start = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "seemore_fast.cli", "upscale"]
    told = [tree, "-o", tmp_path / "out", "--model", weights, "--json", "--compare", tmp_path / "page.html"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-m", *start, *map(str, told)], env=environment, capture_output=True, text=True, timeout=200
    )
    summary = json.loads(ended.stdout)
    assert (
        ended.returncode == 1 and summary["done"] == 10 and summary["failed"] == 1 and summary["device"] == "cpu, cpu"
    )
    assert len(listing(tmp_path / "out")) == 10 and "cut.png" in str(summary["files"])
    assert (tmp_path / "page.html").exists()
    shares = [is_share(job, 0, 2) for job in Jobs([tree], f"{tmp_path / 'out'}/")]
    assert any(shares) and not all(shares)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_current_file(tmp_path, tree, number):
    for i in range(200):
        Image.fromarray(pixels(3)).resize((300, 300)).save(tree / f"n{i}.png", compress_level=0)
    command = [
        sys.executable,
        "-m",
        "seemore_fast.cli",
        "upscale",
        str(tree),
        "-o",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out").exists() or not listing(tmp_path / "out"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert summary["stopped"] and 0 < summary["done"] < 204
    assert len(listing(tmp_path / "out")) == summary["done"]
    for file in listing(tmp_path / "out"):
        Image.open(tmp_path / "out" / file).load()


WRONG = [("quality", 0, ValueError), ("max_megapixels", -1, ValueError), ("width", 4.5, TypeError)]


def test_one_file_from_python(tree, weights, tmp_path):
    upscaler = Upscaler(weights, device="cpu")
    upscaler.upscale_file(tree / "a.png", str(tmp_path / "big.png"), outscale=3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "big.png")), upscaler(pixels(3), outscale=3))
    with pytest.raises(ImageError, match=r"none\.png: does not exist"):
        upscaler.upscale_file(tree / "none.png", tmp_path / "none.png")
    with pytest.raises(ImageError, match=r"big\.gif: ends in '.gif'"):
        upscaler.upscale_file(tree / "a.png", tmp_path / "big.gif")
    with pytest.raises(ImageError, match=r"a\.png: is the input too"):
        upscaler.upscale_file(tree / "a.png", tree / "deep" / ".." / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: has 20x16, .* over the limit of 0.0001: raise it"):
        upscaler.upscale_file(tree / "a.png", tmp_path / "none.png", max_megapixels=1e-4)
    for name, value, error in WRONG:
        with pytest.raises(error, match=f"{name} is {value}"):
            upscaler.upscale_file(tree / "a.png", tmp_path / "none.png", **{name: value})
    with pytest.raises(TypeError, match="colour"):
        upscaler.upscale_file(tree / "a.png", tmp_path / "none.png", colour=1)
    assert listing(tmp_path) == ["big.png", *(f"photos/{name}" for name in listing(tree))]


def test_what_finds_no_room_is_one_failure_and_leaves_nothing(tmp_path, weights):
    """A limit on the size of files is to a program what a full disk is: some bytes are written, and then no more."""
    pytest.importorskip("pyvips")
    source, target = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    large = np.tile(pixels(3), (8, 6, 1))
    for name in ("a_large.png", "b_large.tif", "e_small.png"):
        Image.fromarray(pixels(3) if "small" in name else large).save(source / name)
    for name in ("c_deep.png", "d_deep.tif"):
        write_image(Picture(large.astype(np.uint16) * 257), source / name)
    code = (
        "import resource, sys; from seemore_fast.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); sys.exit(main(sys.argv[1:]))"
    )
    command = ["upscale", str(source), "-o", f"{target}/", "--device", "cpu", "--model", str(weights)]
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "1 of 5 upscaled" in result.stdout
    for name in ("a_large_x2.png", "b_large_x2.tif", "c_deep_x2.png", "d_deep_x2.tif"):
        assert f"failed: {target / name}: cannot be written: File too large" in result.stderr
    assert os.listdir(target) == ["e_small_x2.png"]
    assert Image.open(target / "e_small_x2.png").size == (40, 32)
