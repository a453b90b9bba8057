"""The steps of `make gpu-check`: none stops the others, each one's outcome and time is told. Runs without a GPU."""

import sys
import time

import pytest

from seemore_fast.benchmarks import gpu_check
from seemore_fast.benchmarks.gpu_check import Run, Step


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)


def python(code, seconds=60, name="a step", **options):
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def soon():
    return time.monotonic() + 1000


def test_a_step_passes_fails_or_is_stopped(capfd):
    assert Run(python("print('fine')"), soon()).finish()["outcome"] == "passed"
    assert Run(python("print('bad'); raise SystemExit(3)"), soon()).finish()["outcome"] == "failed: exit status 3"
    # what it started ends with it
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    assert Run(python(code, seconds=1), soon()).finish()["outcome"] == "failed: not done after 1 s"
    assert time.monotonic() - start < 30
    printed = capfd.readouterr().out
    assert "fine" in printed and "bad" in printed


def test_what_cannot_run_says_why():
    done = Run(Step("memcheck", "there is no compute-sanitizer", 0), soon()).finish()
    assert done == {"step": "memcheck", "outcome": "skipped: there is no compute-sanitizer", "seconds": 0}
    assert Run(python("1"), time.monotonic()).finish()["outcome"] == "failed: no time left"
    optional = python("1", seconds=60, optional=True)
    assert Run(optional, time.monotonic() + 30).finish()["outcome"].startswith("skipped: ")


def test_steps_together_do_not_wait_for_each_other(tmp_path):
    flag = tmp_path / "flag"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.1)"
    steps = [
        python(waits, name="waits"),
        Step("cannot run", "not here", 0),
        python(f"open({str(flag)!r}, 'w')", name="is waited for"),
        python("raise SystemExit(1)", name="fails", environment={"ONE": "1"}),
    ]
    done = {result["step"]: result["outcome"] for result in gpu_check.together(steps, soon())}
    assert done == {
        "waits": "passed",
        "cannot run": "skipped: not here",
        "is waited for": "passed",
        "fails": "failed: exit status 1",
    }


def test_the_sanitizer_is_found_or_missed(tmp_path, monkeypatch):
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(gpu_check, "TOOLKIT", str(tmp_path / "toolkit"))
    assert "no compute-sanitizer" in gpu_check.sanitizer("memcheck").command
    tool = tmp_path / "CUDA_HOME" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    step = gpu_check.sanitizer("memcheck")
    assert step.command[:3] == [str(tool), "--tool", "memcheck"]
    assert "small_shapes and not triton" in step.command


def test_every_file_of_a_step_exists():
    for step in gpu_check.tests() + gpu_check.benchmarks() + gpu_check.quick_benchmarks():
        files = [word for word in step.command if word.startswith(("tests/", "benchmarks/")) and word.endswith(".py")]
        assert files or isinstance(step.command, str)
        assert all((gpu_check.ROOT / file).exists() for file in files), step
