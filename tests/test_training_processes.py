"""Runs as processes: stopped by signals, killed, two at once, restarted."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tables import read_csv
from helpers.training import arguments, newest, trainer

from seemore_fast.training.checkpoints import Checkpoints

LONG = ["steps=100000", "validation.every=100000", "log.every=1"]
OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def command(work, *overrides):
    return [sys.executable, "-m", "seemore_fast.cli", "train", *arguments(work, *overrides), "--device", "cpu"]


def torchrun(module, *arguments, options=()):
    """Return the command line of two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*start, *options, *module, *arguments]


def wait_for(condition, process, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("timeout")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_finishes_the_step_and_saves(work, number, workers):
    """To the process or, as from a scheduler or a terminal, to its process group with all workers."""
    overrides = [*LONG, "checkpoint.every=100000", f"data.workers={workers}"]
    process = subprocess.Popen(command(work, *overrides), **OUTPUT, start_new_session=True)
    table = work / "run" / "steps.csv"
    try:
        wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 3, process)
        os.killpg(process.pid, number) if workers else process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    step = newest(work)["step"]
    assert step >= 3 and f"stopped after step {step}; continue with --resume auto" in output
    assert trainer(work, "steps=100000", resume="auto").step == step


def test_a_failed_step_ends_the_workers(work):
    code = (
        "import sys\nfrom seemore_fast.training.trainer import Trainer\n"
        "def fail(*batch):\n    raise RuntimeError('out of luck')\n"
        "Trainer.train_step = fail\nfrom seemore_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, *command(work, "data.workers=2")[3:]]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "RuntimeError: out of luck" in ended.stderr


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(work):
    overrides = [*LONG, "checkpoint.every=2", "data.batch=2"]
    rng, reached, folder = random.Random(0), 0, Checkpoints(work / "run" / "checkpoints", 2)
    for _ in range(4):
        process = subprocess.Popen(
            [*command(work, *overrides), "--resume", "auto"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        wait_for(lambda: folder.steps() and folder.steps()[-1] > reached, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        with contextlib.suppress(FileNotFoundError):
            lines = (work / "run" / "steps.csv").read_text().splitlines()
        done = int(lines[-1].split(",")[0]) if lines[-1].count(",") == lines[0].count(",") else 0
        state = newest(work)
        assert state["step"] > reached and state["step"] >= done - 2
        reached = state["step"]
    for path in (work / "run" / "checkpoints", work / "run"):
        (path / ".seemore-fast.1.tmp.pt").write_bytes(b"half of a file")
    assert trainer(work, *overrides, resume="auto").step == reached
    assert not list((work / "run").rglob(".seemore-fast*"))


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_give_the_weights_of_one(work):
    overrides = ["precision=fp64", "steps=20", "validation.every=20", "loss.fft=0.1", "optimizer.lr=1e-3"]
    assert trainer(work, *overrides, out="one").run()
    line = torchrun(["-m", "seemore_fast.training"], *arguments(work, *overrides, out="two"), "--device", "cpu")
    done = subprocess.run(line, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = newest(work, "one"), newest(work, "two")
    for kind in ("model", "average"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(two[kind][name], weight, rtol=1e-9, atol=1e-9)
    assert read_csv(work / "one" / "validation.csv")[0] == read_csv(work / "two" / "validation.csv")[0]


RUN_IF = """
from seemore_fast.errors import ConfigError
from seemore_fast.training.distributed import init_distributed

def fail():
    raise OSError("the disk is full")

world = init_distributed("cpu")
assert world.run_if(world.is_first, lambda: 7) == (7 if world.is_first else None)
try:
    world.run_if(world.local_rank == 1, fail)
except (ConfigError, OSError) as error:
    print(f"<{type(error).__name__} of {world.rank}: {error}>")
world.close()
"""


def test_an_error_in_one_process_is_raised_in_both(tmp_path):
    (tmp_path / "run_if.py").write_text(RUN_IF)
    done = subprocess.run(torchrun([tmp_path / "run_if.py"]), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in ("<ConfigError of 0: the disk is full>", "<OSError of 1: the disk is full>"):
        assert line in done.stdout


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(work):
    """Elastic: all processes are restarted, and continue from the last checkpoint to the end."""
    overrides = ["steps=60", "validation.every=60", "checkpoint.every=5", "data.batch=2", "log.every=1"]
    line = torchrun(
        ["-m", "seemore_fast.cli", "train"], *arguments(work, *overrides), "--device", "cpu", "--resume", "auto",
        options=["--max-restarts=1", "--monitor-interval=0.2"],
    )  # fmt: skip
    process = subprocess.Popen(line, env=ONE_THREAD, **OUTPUT)
    folder = Checkpoints(work / "run" / "checkpoints", 2)
    wait_for(lambda: folder.steps(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed_at = folder.steps()[-1]
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert killed_at < 60 and newest(work)["step"] == 60
    assert [int(row["step"]) for row in read_csv(work / "run" / "steps.csv")] == list(range(1, 61))
