"""Batches of images: results, failures of single files, workers, signals and processes."""

import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import processes
from helpers.images import listing, pixels
from PIL import Image, ImageCms

from seemore_fast import Upscaler, backends, memory, use_backend
from seemore_fast.backends import current_backend
from seemore_fast.cli import main
from seemore_fast.errors import ImageError
from seemore_fast.io import images
from seemore_fast.io.images import Picture, read_image, write_image
from seemore_fast.upscale import batch
from seemore_fast.upscale.files import FileOptions
from seemore_fast.upscale.jobs import Jobs, is_share

RESULTS = ["a_x2.png", "b_x2.JPG", "deep/a_x2.png"]


@pytest.fixture
def tree(tmp_path):
    """photos/{a.png, b.JPG, deep/a.png}"""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/a.png"):
        Image.fromarray(pixels(3)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def failures(printed):
    return [line for line in printed.splitlines() if line.startswith("failed: ")]


@pytest.mark.parametrize("devices", [(), ("--devices", "cpu,cpu,cpu")])
def test_a_folder(tree, upscale, weights, tmp_path, devices):
    status, printed = upscale(tree, "-o", tmp_path / "out", *devices)
    assert status == 0 and "3 of 3 images upscaled 2x in " in printed and listing(tmp_path / "out") == RESULTS
    assert f"({', '.join(['cpu'] * (3 if devices else 1))}, fp32, backend " in printed
    expected = Upscaler(weights, device="cpu")(pixels(3))
    for name in (RESULTS[0], RESULTS[2]):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / name)), expected)


def test_existing_results_are_skipped_or_overwritten(tree, upscale, tmp_path):
    assert upscale(tree, "-o", tmp_path / "out")[0] == 0
    kept = tmp_path / "out" / "deep" / "a_x2.png"
    kept.write_bytes(b"mine")
    (tmp_path / "out" / "a_x2.png").unlink()
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 0 and "1 of 3 images upscaled" in printed
    assert "2 already exist (use --overwrite to redo)" in printed and kept.read_bytes() == b"mine"
    kept.unlink()
    kept.mkdir()
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 1 and "2 already exist" in printed and "a_x2.png: cannot be written: " in printed
    kept.rmdir()
    kept.write_bytes(b"mine")
    assert upscale(tree, "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert Image.open(kept).size == (40, 32)


@pytest.mark.parametrize(
    ("options", "size", "name"),
    [
        ("--outscale 1.5", (30, 24), "a_x1.5.png"),
        ("--width 50", (50, 40), "a_w50.png"),
        ("--width 10 --height 99", (10, 99), "a_w10xh99.png"),
        ("--ext jpg --suffix=-big", (40, 32), "a-big.jpg"),
    ],
)
def test_sizes_and_names(tree, upscale, tmp_path, options, size, name):
    assert upscale(tree / "a.png", "-o", f"{tmp_path / 'out'}/", *options.split())[0] == 0
    assert Image.open(tmp_path / "out" / name).size == size


def test_quality(tree, upscale, tmp_path):
    for quality in ("40", "95"):
        assert upscale(tree / "a.png", "-o", tmp_path / f"{quality}.jpg", "--quality", quality)[0] == 0
    assert (tmp_path / "40.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize(("factor", "scale"), [("1.7", 2), ("2", 2), ("2.5", 3), ("4", 4), ("7", 4)])
def test_the_smallest_scale_that_reaches_the_size(tree, tmp_path, capsys, factor, scale):
    arguments = ["upscale", tree / "a.png", "-o", tmp_path / "b.png", "--outscale", factor, "--device", "cpu"]
    assert main([*map(str, arguments), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scale"] == scale
    assert Image.open(tmp_path / "b.png").size == tuple(round(side * float(factor)) for side in (20, 16))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_and_metadata_pass_through(tmp_path, upscale, weights, suffix):
    pytest.importorskip("pyvips")
    array = np.random.default_rng(0).integers(0, 65536, (16, 20, 3), np.uint16)
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    exif[0x010F] = "Maker"
    write_image(Picture(array, icc_profile=profile, exif=exif.tobytes()), tmp_path / "a.png")
    status, printed = upscale(tmp_path / "a.png", "-o", tmp_path / f"b{suffix}")
    assert status == 0 and ("a.png: its EXIF was left out" in printed) == (suffix == ".tif")
    result = read_image(tmp_path / f"b{suffix}", keep_16_bit=True)
    np.testing.assert_array_equal(result.image, Upscaler(weights, device="cpu")(array))
    assert len(np.unique(result.image & 0xFF)) > 100  # not 8 bits times 257
    assert result.icc_profile == profile and (b"Maker" in (result.exif or b"")) == (suffix == ".png")


# Failures of single files


def test_bad_files_do_not_affect_the_others(tree, upscale, tmp_path):
    names = {
        "cut.png": "is truncated or damaged",
        "text.png": "is not a PNG, JPEG, WebP or TIFF image",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "gone.png": "does not exist",
        f"{'n' * 251}.png": "cannot be written: File name too long",
    }
    (tree / "cut.png").write_bytes((tree / "a.png").read_bytes()[:60])
    (tree / "text.png").write_text("hello")
    (tree / "loop.png").symlink_to(tree / "loop.png")
    (tree / "gone.png").symlink_to(tree / "never.png")
    (tree / f"{'n' * 251}.png").write_bytes((tree / "a.png").read_bytes())
    (tmp_path / "empty").mkdir()
    missing = tree / f"{'m' * 300}.png"
    status, printed = upscale(tree, missing, tmp_path / "empty", "-o", tmp_path / "out")
    assert status == 1 and "3 of 9 images upscaled" in printed and listing(tmp_path / "out") == RESULTS
    assert len(failures(printed)) == 7 and f"failed: {missing}: cannot be read: File name too long" in printed
    assert f"failed: {tmp_path / 'empty'}: contains no file that ends in " in printed
    for name, message in names.items():
        (line,) = (line for line in failures(printed) if name.removesuffix(".png") in line)
        assert message in line


def test_files_that_change_or_vanish(tree, upscale, tmp_path, monkeypatch):
    read = images._read

    def meddle(file, *limits):
        picture = read(file, *limits)
        if str(file.name) == str(tree / "a.png"):
            os.utime(file.name, ns=(1, 1))
            (tree / "b.JPG").unlink()
        return picture

    monkeypatch.setattr(images, "_read", meddle)
    monkeypatch.setattr(batch, "MIN_WORKERS", 1)
    monkeypatch.setattr(batch, "MAX_WORKERS", 1)
    status, printed = upscale(tree / "a.png", tree / "b.JPG", "-o", f"{tmp_path / 'out'}/")
    assert status == 1 and not listing(tmp_path / "out")
    assert "a.png: changed while it was read" in printed and "b.JPG: does not exist" in printed


@pytest.mark.skipif(
    backends.unsupported_reason("cpu") is not None, reason="only the engine knows its memory in advance"
)
def test_a_photo_too_large_for_the_memory_is_one_failure(tree, upscale, tmp_path, monkeypatch):
    Image.new("RGB", (3000, 2000)).save(tree / "large.png")
    monkeypatch.setattr(memory, "available_memory", lambda: 2**25)
    monkeypatch.setattr(memory, "SMALL", 2**25)
    status, printed = upscale(tree, "-o", tmp_path / "out")
    assert status == 1 and listing(tmp_path / "out") == RESULTS
    (failure,) = failures(printed)
    assert f"{tree / 'large.png'}: 2x upscaling of 3000x2000 pixels needs " in failure
    assert " bytes) of memory, 0.0 GiB are available: take a smaller image" in failure


def main_with_small_files(command):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    return main(command)


def test_a_full_disk_leaves_nothing_unfinished(tmp_path, weights):
    """A limit on the size of files acts as a full disk: some bytes are written, then no more."""
    pytest.importorskip("pyvips")
    source, target = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    large = np.tile(pixels(3), (8, 6, 1))
    for name in ("a_large.png", "b_large.tif", "e_small.png"):
        Image.fromarray(pixels(3) if "small" in name else large).save(source / name)
    for name in ("c_deep.png", "d_deep.tif"):
        write_image(Picture(large.astype(np.uint16) * 257), source / name)
    command = ["upscale", str(source), "-o", f"{target}/", "--device", "cpu", "--model", str(weights)]
    status, printed = processes.run(main_with_small_files, command, output=tmp_path / "printed")
    assert status == 1 and "1 of 5 images upscaled" in printed
    for name in ("a_large_x2.png", "b_large_x2.tif", "c_deep_x2.png", "d_deep_x2.tif"):
        assert f"failed: {target / name}: cannot be written: File too large" in printed
    assert os.listdir(target) == ["e_small_x2.png"] and Image.open(target / "e_small_x2.png").size == (40, 32)


def test_one_file_from_python(tree, weights, tmp_path):
    upscaler = Upscaler(weights, device="cpu")
    upscaler.upscale_file(tree / "a.png", str(tmp_path / "big.png"), outscale=3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "big.png")), upscaler(pixels(3), outscale=3))
    for source, target, options, error, message in [
        ("none.png", "none.png", {}, ImageError, r"none\.png: does not exist"),
        ("a.png", "big.gif", {}, ImageError, r"big\.gif: ends in '.gif'"),
        ("a.png", "photos/deep/../a.png", {}, ImageError, r"a\.png: is also the input"),
        ("a.png", "none.png", {"max_megapixels": 1e-4}, ImageError, r"a\.png: has 20x16 .* over the limit of 0.0001"),
        ("a.png", "none.png", {"quality": 0}, ValueError, "quality is 0"),
        ("a.png", "none.png", {"max_megapixels": -1}, ValueError, "max_megapixels is -1"),
        ("a.png", "none.png", {"width": 4.5}, TypeError, "width is 4.5"),
        ("a.png", "none.png", {"colour": 1}, TypeError, "colour"),
    ]:
        with pytest.raises(error, match=message):
            upscaler.upscale_file(tree / source, tmp_path / target, **options)
    assert listing(tmp_path) == ["big.png", *(f"photos/{name}" for name in listing(tree))]


# Workers


class WatchedUpscaler(Upscaler):
    """Slow upscaler that records the thread counts of all images being computed."""

    running, lock = [], threading.Lock()

    def __call__(self, image, **size):
        threads = torch.get_num_threads()
        with self.lock:
            self.running.append(threads)
            self.seen.append(tuple(self.running))
        time.sleep(0.03)
        try:
            return super().__call__(image, **size)
        finally:
            with self.lock:
                self.running.remove(threads)


@pytest.fixture
def watched(weights):
    """An upscaler on four threads of a CPU, which are there again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    upscaler = WatchedUpscaler(weights, device="cpu")
    upscaler.seen = []
    yield upscaler
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == 4
    torch.set_num_threads(threads)


@pytest.fixture
def outcomes(watched, tmp_path):
    """Return a function that starts upscaling twelve images."""
    (tmp_path / "many").mkdir()
    for i in range(12):
        Image.fromarray(pixels(3) + i).save(tmp_path / "many" / f"{i}.png")
    jobs = Jobs([tmp_path / "many"], f"{tmp_path / 'out'}/")
    return lambda *stop: batch.upscale_files([watched], jobs, FileOptions(), *stop)


@pytest.fixture
def upscale_all(watched, outcomes, tmp_path):
    """Return a function that upscales the twelve images and checks the results."""

    def run():
        assert [outcome.error for outcome in outcomes()] == 12 * [""]
        for i in range(12):
            result = np.asarray(Image.open(tmp_path / "out" / f"{i}_x2.png"))
            np.testing.assert_array_equal(result, Upscaler.__call__(watched, pixels(3) + i))

    return run


def test_small_images_are_computed_side_by_side(watched, upscale_all):
    upscale_all()
    assert (1, 1, 1, 1) in watched.seen and max(map(sum, watched.seen)) == 4


def test_large_images_are_computed_one_at_a_time(watched, upscale_all, monkeypatch):
    monkeypatch.setattr(batch, "SMALL", 1)
    upscale_all()
    assert watched.seen == [(4,)] * 12


def test_a_single_image_has_all_threads_and_one_worker(watched, tree, tmp_path, monkeypatch):
    workers, Worker = [], batch.Worker
    monkeypatch.setattr(batch, "Worker", lambda *given: workers.append(Worker(*given)) or workers[-1])
    jobs = Jobs([tree / "a.png"], f"{tmp_path / 'out'}/")
    assert len(list(batch.upscale_files([watched], jobs, FileOptions()))) == 1
    assert watched.seen == [(4,)] and len(workers) == 1


def test_few_large_images_are_in_memory_at_once(upscale_all, monkeypatch):
    monkeypatch.setattr(batch, "SMALL", 1)
    there, counts, lock = set(), [], threading.Lock()
    read, write = batch.read, batch.write_image

    def reading(upscaler, source, *arguments):
        with lock:
            there.add(source.stem)
            counts.append(len(there))
        return read(upscaler, source, *arguments)

    def writing(picture, target, quality):
        time.sleep(0.06)  # slower than the computation
        write(picture, target, quality)
        with lock:
            there.discard(target.stem.removesuffix("_x2"))

    monkeypatch.setattr(batch, "read", reading)
    monkeypatch.setattr(batch, "write_image", writing)
    upscale_all()
    assert 1 < max(counts) <= 3


def test_closing_the_generator_stops(watched, outcomes, tmp_path):
    some = outcomes()
    next(some)
    some.close()
    there = listing(tmp_path / "out")
    assert len(there) == len(watched.seen) < 12  # images in progress are finished, no others begun
    time.sleep(0.1)
    assert listing(tmp_path / "out") == there


def test_stopping_finishes_the_images_in_progress(watched, outcomes, tmp_path):
    stop, done = threading.Event(), []
    for outcome in outcomes(stop.is_set):
        done.append(outcome)
        stop.set()
    assert 1 <= len(done) == len(watched.seen) <= 8 and not any(outcome.error for outcome in done)
    assert len(listing(tmp_path / "out")) == len(done)


# Signals and processes


def summary_in(printed):
    """Return the JSON among all that a command printed."""
    return json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_images_in_progress(tmp_path, tree, number):
    out = tmp_path / "out"
    for i in range(80):
        Image.fromarray(pixels(3)).resize((300, 300)).save(tree / f"n{i}.png", compress_level=0)
    process = processes.command("upscale", tree, "-o", out, "--device", "cpu", "--json", output=tmp_path / "printed")
    process.wait_until(lambda: out.exists() and listing(out))
    process.signal(number)
    status, printed = process.wait()
    assert status == 130 and "finishing the images in progress" in printed
    summary = summary_in(printed)
    assert summary["stopped"] and 0 < summary["done"] < 83 and len(listing(out)) == summary["done"]
    for file in listing(out):
        Image.open(out / file).load()


def test_processes_share_the_files_and_one_reports(tree, tmp_path, weights):
    for i in range(6):
        Image.fromarray(pixels(3)).save(tree / f"n{i}.png")
    (tree / "cut.png").write_bytes((tree / "a.png").read_bytes()[:60])
    arguments = ["upscale", tree, "-o", tmp_path / "out", "--model", weights, "--json", "--device", "cpu"]
    command = [*map(str, arguments), "--compare", str(tmp_path / "page.html")]
    (status, printed), other = processes.run_two(main, command, output=tmp_path / "printed")
    summary = summary_in(printed)
    assert (status, summary["done"], summary["failed"], summary["device"]) == (1, 9, 1, "cpu, cpu")
    assert "{" not in other[1]
    assert len(listing(tmp_path / "out")) == 9 and "cut.png" in str(summary["files"])
    assert (tmp_path / "page.html").exists()
    shares = [is_share(job, 0, 2) for job in Jobs([tree], f"{tmp_path / 'out'}/")]
    assert any(shares) and not all(shares)


def test_workers_compute_on_the_backend_of_their_caller(outcomes, watched, monkeypatch):
    seen = []
    monkeypatch.setattr(type(watched), "__call__", lambda self, image, **size: seen.append(current_backend()) or image)
    with use_backend("reference"):
        list(outcomes())
    assert set(seen) == {"reference"}
