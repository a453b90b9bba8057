"""Steps with time limits (benchmarks/steps.py): outcomes, logs, order and archives."""

import signal
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
from helpers.benchmarks import processes

from seemore_fast.benchmarks import gpu_check, steps
from seemore_fast.benchmarks.steps import Runner, Step


@pytest.fixture
def run(tmp_path):
    """Function that runs one step until its outcome is known."""

    def until_it_ends(step: Step, deadline: float | None = None) -> dict:
        deadline = time.monotonic() + 1000 if deadline is None else deadline
        (result,) = Runner(tmp_path, tmp_path, deadline, {}, lambda results: None).run([step])
        return result

    return until_it_ends


@pytest.fixture
def time_is_over(tmp_path, monkeypatch):
    """Function after which time stands still until the log of "a step" has a text; then its 60 seconds are over."""

    def when_logged(text: str):
        log, begin, over = tmp_path / "a-step.log", time.monotonic(), []

        def monotonic():
            now = time.monotonic()
            if not over and log.exists() and text in log.read_text():
                over.append(now)
            return begin + 60 + now - over[0] if over else begin

        monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))

    return when_logged


def python(code, seconds=60, name="a step", **options):
    return Step(name, [sys.executable, "-u", "-c", code], seconds, **options)


def test_a_step_passes_or_fails(run, capfd):
    done = run(python("print('fine')\nprint('==== 1 passed ====')"))
    assert done["outcome"] == "passed" and done["last_line"] == "1 passed"
    assert run(python("print('bad'); raise SystemExit(3)"))["outcome"] == "failed: exit status 3"
    printed = capfd.readouterr().out
    assert "fine" in printed and "bad" in printed


TESTS = """
import time
def test_good(): pass
def test_bad(): assert 1 + 1 == 3
def test_long(): time.sleep(1000)
"""


@pytest.fixture(params=["in the foreground", "in the background"])
def started(request):
    """Shells start jobs in the background with SIGINT ignored."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if request.param == "in the background" else signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, handler)


def test_the_log_of_an_interrupted_step_has_its_failures(started, run, tmp_path, monkeypatch, time_is_over):
    monkeypatch.setattr(steps, "GRACE_S", 120)  # on a busy machine
    (tmp_path / "test_some.py").write_text(TESTS)
    step = gpu_check.pytest("a step", [], "test_some.py", seconds=60)
    command = [word for word in step.command if word not in ("--device", "cuda")]
    time_is_over("::test_long")
    assert run(step._replace(command=command))["outcome"] == "failed: not done after 60 s"
    log = (tmp_path / "a-step.log").read_text()
    assert "test_some.py::test_good PASSED" in log and "test_some.py::test_bad FAILED" in log
    assert "assert (1 + 1) == 3" in log and "KeyboardInterrupt" in log


def test_a_step_that_ignores_the_interrupt_is_killed_with_its_processes(run, tmp_path, monkeypatch, time_is_over):
    monkeypatch.setattr(steps, "GRACE_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{deaf}; print('started'); time.sleep(1000)  # {tmp_path}"
    code = f"{deaf}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-u', '-c', {child!r}])"
    time_is_over("started")
    assert run(python(code))["outcome"] == "failed: not done after 60 s"
    assert not processes(tmp_path)


def test_skipped_steps_have_a_reason(run):
    done = run(Step("memcheck", "there is no compute-sanitizer", 0))
    assert done["outcome"] == "skipped: there is no compute-sanitizer" and done["seconds"] == 0
    assert run(python("1"), time.monotonic())["outcome"] == "failed: no time, 0 s left"
    optional = python("1", seconds=60, optional=True)
    assert run(optional, time.monotonic() + 30)["outcome"].startswith("skipped: ")


def test_parallel_steps_wait_only_for_the_named_ones(tmp_path):
    flag, after = tmp_path / "flag", tmp_path / "after"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.1)"
    beside = [
        python(f"assert not open({str(after)!r}, 'x').close()", name="comes after", after="waits"),
        python(f"{waits}\nassert not pathlib.Path({str(after)!r}).exists()", name="waits"),
        Step("cannot run", "not here", 0),
        python(f"open({str(flag)!r}, 'w')", name="is waited for", after="fails"),
        python(
            "import os; raise SystemExit(os.environ['ONE'] + os.environ['TWO'])", name="fails", environment={"ONE": "1"}
        ),
        python("1", name="names a step that does not run", after="build"),
    ]
    saved, later = [], time.monotonic() + 1000
    runner = Runner(tmp_path, tmp_path, later, {"TWO": "2"}, lambda results: saved.append(len(results)))
    done = {result["step"]: result["outcome"] for result in runner.run(beside)}
    others = {"cannot run": "skipped: not here", "fails": "failed: exit status 1"}
    assert done == dict.fromkeys([step.name for step in beside], "passed") | others
    order = list(done)
    assert order.index("waits") < order.index("comes after") and order.index("fails") < order.index("is waited for")
    assert saved[-1] == len(done)
    assert (tmp_path / "fails.log").read_text() == "12\n"


def test_steps_run_on_limited_workers(tmp_path):
    code = f"import os, time; os.mkdir({str(tmp_path / 'one')!r}); time.sleep(0.2); os.rmdir({str(tmp_path / 'one')!r})"
    runner = Runner(tmp_path, tmp_path, time.monotonic() + 1000, {}, lambda results: None, workers=1)
    assert all(result["outcome"] == "passed" for result in runner.run([python(code, name=str(i)) for i in range(3)]))


def test_a_share_of_the_time_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_S", 0)
    runner = Runner(tmp_path, tmp_path, time.monotonic() + 100, {}, lambda results: None)
    (result,) = runner.run([python("1", seconds=60, optional=True)], share=0.5)
    assert result["outcome"].startswith("skipped: ")
    (result,) = runner.run([python("1", seconds=60, optional=True)])
    assert result["outcome"] == "passed"


def test_an_archive_is_atomic_and_leaves_out_missing_files(tmp_path, monkeypatch):
    target, here = tmp_path / "results.tgz", tmp_path / "here"
    here.write_text("1")
    steps.archive(target, tmp_path, [here, tmp_path / "gone"])
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["here"]
    before = target.read_bytes()
    monkeypatch.setattr(tarfile.TarFile, "add", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.archive(target, tmp_path, [here])
    assert target.read_bytes() == before
