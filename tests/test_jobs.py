"""Jobs of a batch: the files found, the names of their results, and the arguments that are refused."""

import itertools
import os
import sys

import pytest

from seemore_fast.errors import JobError
from seemore_fast.upscale import jobs
from seemore_fast.upscale.jobs import Jobs, is_share

NAMES = ["a.png", "b.JPG", "deep/a.png", "deep/c d \u00e9.png"]
RESULTS = ["a_x2.png", "b_x2.JPG", "deep/a_x2.png", "deep/c d \u00e9_x2.png"]
case_sensitive = pytest.mark.skipif(sys.platform != "linux", reason="needs a case-sensitive folder")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def tree(tmp_path):
    """photos/{a.png, b.JPG, notes.txt, deep/{a.png, "c d \u00e9.png"}, empty/}"""
    touch(tmp_path / "photos", *NAMES, "notes.txt")
    (tmp_path / "photos" / "empty").mkdir()
    return tmp_path / "photos"


def results(jobs, folder):
    """Return the names of the results in a folder, sorted."""
    return sorted(os.path.relpath(job.target, folder) for job in jobs)


def test_the_results_of_a_folder_keep_its_tree(tree, tmp_path):
    out = tmp_path / "out"
    listed = Jobs([tree], str(out))
    assert results(listed, out) == RESULTS and listed.into_folder and not listed.notes + listed.failures
    assert [job.source for job in listed] == [str(tree / name) for name in NAMES]
    listed = Jobs([tree], str(out), suffix="-big", extension=".jpg")
    assert results(listed, out) == [f"{name.rpartition('.')[0]}-big.jpg" for name in NAMES]


def test_a_single_file_may_have_a_named_result(tree, tmp_path):
    (job,) = Jobs([tree / "a.png"], str(tmp_path / "big.webp"))
    assert job == (str(tree / "a.png"), str(tmp_path / "big.webp"), True)
    (job,) = Jobs([tree / "a.png"], f"{tmp_path / 'out'}/")
    assert job == (str(tree / "a.png"), str(tmp_path / "out" / "a_x2.png"), False)


def test_results_among_the_inputs_are_not_inputs(tree):
    touch(tree, *RESULTS)
    assert results(Jobs([tree], str(tree)), tree) == sorted(RESULTS)
    first = Jobs([tree], str(tree / "out"))
    touch(tree / "out", *results(first, tree / "out"))
    again = Jobs([tree], str(tree / "out"))
    assert len(first) == 8 and list(again) == list(first)
    assert again.notes == [f"{tree / 'out'} is the output folder: its contents are not read"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a.png", "a.jpg"], {"extension": ".png"}, r"a_x2\.png, the output of .*a\.png, is also read .* for .*a\.jpg"),
        (["a.png", "a_x2.png"], {"suffix": ""}, r"the output of .*a\.png, is also read or written"),
    ],
)
def test_two_files_for_one_name_are_refused(tmp_path, names, options, message):
    touch(tmp_path, *names)
    with pytest.raises(JobError, match=message):
        Jobs([tmp_path], str(tmp_path), **options)


def test_links_to_folders_are_not_followed_but_links_to_files_are(tree, tmp_path):
    (tree / "deep" / "loop").symlink_to(tree)
    (tree / "z.png").symlink_to(tree / "a.png")
    listed = Jobs([tree], str(tmp_path / "out"))
    assert results(listed, tmp_path / "out") == sorted([*RESULTS, "z_x2.png"])
    assert listed.notes == [f"{tree / 'deep' / 'loop'} is a link to a folder, which is not followed"]


def test_skipped_files_are_noted(tree):
    touch(tree, "e.gif", "f.GIF", "b.bmp", ".seemore-fast.1.2.tmp.png", "deep/kept_x2.png")
    listed = Jobs([tree], str(tree / "deep"))
    assert results(listed, tree / "deep") == RESULTS[:2]
    assert listed.notes == [
        f"{tree}: skipped 1 files that end in .bmp, which is not supported",
        f"{tree}: skipped 2 files that end in .gif, which is not supported",
        f"{tree / 'deep'} is the output folder: its contents are not read",
    ]
    listed = Jobs([tree / "deep"], str(tree / "deep"))
    assert listed.notes == [f"{tree / 'deep'}: skipped 1 files that end in _x2, as results do"]


def test_folders_without_images_are_failures(tree, tmp_path):
    listed = Jobs([tree / "empty"], f"{tmp_path}/")
    assert not listed and "empty: contains no file that ends in .png" in listed.failures[0]


@case_sensitive
@pytest.mark.parametrize("name", ["A.png", "deep/c d e\u0301.png"])
def test_case_insensitive_output_folders(tree, monkeypatch, tmp_path, name):
    touch(tree, name)
    (tmp_path / "out").mkdir()
    assert len(Jobs([tree], str(tmp_path / "out"))) == 5
    assert os.listdir(tmp_path / "out") == []  # the probe's file is gone
    monkeypatch.setattr(jobs, "is_case_insensitive", lambda folder: True)
    with pytest.raises(JobError, match=r"_x2\.png, the output of .*, is also read or written for"):
        Jobs([tree], str(tmp_path / "out"))


@case_sensitive
def test_case_insensitivity_is_probed_with_a_file(tmp_path, monkeypatch):
    assert not jobs.is_case_insensitive(tmp_path / "not" / "there")

    def exists(path):  # as a case-insensitive folder would answer
        return str(path).lower() in [str(there).lower() for there in tmp_path.iterdir()]

    monkeypatch.setattr(os.path, "exists", exists)
    assert jobs.is_case_insensitive(tmp_path / "not" / "there") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("photos/a.png", {}, r"a\.png is a file, expected a folder"),
        ("out", {"extension": ".gif"}, "the extension is '.gif', expected one of .png"),
        ("out", {"suffix": "a/b"}, "the suffix 'a/b' cannot be part of a file name"),
        ("out", {"suffix": "\0"}, r"the suffix '\\x00' cannot be part of a file name"),
    ],
)
def test_arguments_are_refused_with_a_reason(tree, tmp_path, output, options, message):
    with pytest.raises(JobError, match=message):
        Jobs([tree], str(tmp_path / output), **options)


def test_each_job_belongs_to_one_process(tmp_path):
    touch(tmp_path / "many", *(f"{i}.png" for i in range(20)))
    listed = Jobs([tmp_path / "many"], f"{tmp_path / 'out'}/")
    shares = [[job.target for job in listed if is_share(job, rank, 3)] for rank in range(3)]
    assert all(shares) and sorted(itertools.chain(*shares)) == sorted(job.target for job in listed)
