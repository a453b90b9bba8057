"""Runs as processes: stopped by signals and by force, two at once, started anew."""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.training import arguments, newest, trainer

from seemore_fast.training.checkpoints import Checkpoints

pytest.importorskip("yaml", reason="configurations are YAML")


def command(work, *more, out="run"):
    return [sys.executable, "-m", "seemore_fast.cli", "train", *arguments(work, *more, out=out), "--device", "cpu"]


def wait_for(condition, process, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it took too long")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_finishes_the_step_and_saves(work, number, workers):
    """To the process, or, as a scheduler or a terminal sends it, to all of its group, workers included."""
    told = ["steps=100000", "validation.every=100000", "checkpoint.every=100000", "log.every=1"]
    process = subprocess.Popen(
        command(work, *told, f"data.workers={workers}"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
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


def test_a_step_that_fails_ends_the_workers_too(work):
    code = (
        "import sys\nfrom seemore_fast.training.trainer import Trainer\n"
        "def fail(*batch):\n    raise RuntimeError('out of luck')\n"
        "Trainer.train_step = fail\nfrom seemore_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    told = ["train", *arguments(work, "data.workers=2"), "--device", "cpu"]
    ended = subprocess.run([sys.executable, "-c", code, *told], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "RuntimeError: out of luck" in ended.stderr


def test_killed_at_any_moment_it_loses_the_steps_since_a_checkpoint_alone(work):
    told = ["steps=100000", "validation.every=100000", "checkpoint.every=2", "log.every=1", "data.batch=2"]
    rng, reached = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command(work, *told), "--resume", "auto"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        folder = Checkpoints(work / "run" / "checkpoints", 2)
        wait_for(lambda: folder.steps() and folder.steps()[-1] > reached, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        with contextlib.suppress(FileNotFoundError):
            rows = (work / "run" / "steps.csv").read_text().splitlines()
        done = int(rows[-1].split(",")[0]) if rows[-1].count(",") == rows[0].count(",") else 0
        state = newest(work)
        assert state["step"] > reached and state["step"] >= done - 2
        reached = state["step"]
    for path in (work / "run" / "checkpoints", work / "run"):
        (path / ".seemore-fast.1.tmp.pt").write_bytes(b"half of a file")
    assert trainer(work, *told, resume="auto").step == reached
    assert not list((work / "run").rglob(".seemore-fast*"))


def in_two(work, *more, out, torchrun=()):
    """Return the command line and environment of a run in two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *torchrun]
    told = [*start, "-m", "seemore_fast.training", *arguments(work, *more, out=out), "--device", "cpu"]
    return told, {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_with_half_the_batch_give_the_weights_of_one(work):
    told = ["precision=fp64", "steps=20", "validation.every=20", "loss.fft=0.1", "optimizer.lr=1e-3"]
    assert trainer(work, *told, out="one").run()
    line, environment = in_two(work, *told, out="two")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = newest(work, "one"), newest(work, "two")
    for kind in ("model", "average"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(two[kind][name], weight, rtol=1e-9, atol=1e-9)
    rows = []
    for out in ("one", "two"):
        with (work / out / "validation.csv").open() as file:
            rows.append(next(csv.DictReader(file)))
    assert rows[0] == rows[1]


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


def test_what_one_of_two_processes_finds_wrong_both_raise(tmp_path):
    (tmp_path / "run_if.py").write_text(RUN_IF)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "run_if.py"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in ("<ConfigError of 0: the disk is full>", "<OSError of 1: the disk is full>"):
        assert said in done.stdout


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(work):
    """Elastic: all processes are started anew, and go on from the last checkpoint to the end."""
    told = ["steps=60", "validation.every=60", "checkpoint.every=5", "data.batch=2", "log.every=1"]
    line, environment = in_two(work, *told, out="run", torchrun=["--max-restarts=1", "--monitor-interval=0.2"])
    process = subprocess.Popen(
        [*line, "--resume", "auto"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder = Checkpoints(work / "run" / "checkpoints", 2)
    wait_for(lambda: folder.steps(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed_at = folder.steps()[-1]
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert killed_at < 60 and newest(work)["step"] == 60
    rows = [int(line.split(",")[0]) for line in (work / "run" / "steps.csv").read_text().splitlines()[1:]]
    assert rows == list(range(1, 61))
