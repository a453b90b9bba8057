"""Runs as processes: stopped by signals, killed, two at once, restarted."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import processes
from helpers.tables import read_csv
from helpers.training import arguments, newest, trainer

from seemore_fast.cli import main
from seemore_fast.errors import ConfigError
from seemore_fast.training.checkpoints import Checkpoints
from seemore_fast.training.distributed import init_distributed
from seemore_fast.training.trainer import Trainer

LONG = ["steps=100000", "validation.every=100000", "log.every=1"]
AUTO = ["--resume", "auto"]


def options(work, *overrides, resume=(), out="run"):
    return ["train", *arguments(work, *overrides, out=out), "--device", "cpu", *resume]


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_and_saves(work, number, workers):
    """To the process or, as from a scheduler or a terminal, to its process group with all workers."""
    overrides = [*LONG, "checkpoint.every=100000", f"data.workers={workers}"]
    process = processes.command(*options(work, *overrides), output=work / "printed")
    table = work / "run" / "steps.csv"
    process.wait_until(lambda: table.exists() and len(table.read_text().splitlines()) > 3)
    process.signal(number, group=workers > 0)
    status, output = process.wait()
    step = newest(work)["step"]
    assert status == 0 and step >= 3 and f"stopped after step {step}; continue with --resume auto" in output
    assert trainer(work, "steps=100000", resume="auto").step == step


def fail_in_a_step(arguments):
    Trainer.train_step = Mock(side_effect=RuntimeError("out of luck"))
    return main(arguments)


def test_a_failed_step_ends_the_workers(work):
    status, output = processes.run(fail_in_a_step, options(work, "data.workers=2"), output=work / "printed")
    assert status == 1 and "RuntimeError: out of luck" in output


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(work):
    overrides = [*LONG, "checkpoint.every=2", "data.batch=2"]
    rng, reached, folder = random.Random(0), 0, Checkpoints(work / "run" / "checkpoints", 2)
    for _ in range(4):
        process = processes.command(*options(work, *overrides, resume=AUTO), output=work / "printed")
        process.wait_until(lambda: folder.steps() and folder.steps()[-1] > reached)  # noqa: B023
        time.sleep(rng.uniform(0, 0.4))
        process.signal(signal.SIGKILL)
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


def test_two_processes_give_the_weights_of_one(work):
    overrides = ["precision=fp64", "steps=20", "validation.every=20", "loss.fft=0.1", "optimizer.lr=1e-3"]
    assert trainer(work, *overrides, out="one").run()
    done = processes.run_two(main, options(work, *overrides, out="two"), output=work / "printed")
    assert [status for status, _ in done] == [0, 0], done
    one, two = newest(work, "one"), newest(work, "two")
    for kind in ("model", "average"):
        for name, weight in one[kind].items():
            torch.testing.assert_close(two[kind][name], weight, rtol=1e-9, atol=1e-9)
    assert read_csv(work / "one" / "validation.csv")[0] == read_csv(work / "two" / "validation.csv")[0]


def raise_in_the_second():
    """What one of two processes does: the second fails."""
    world = init_distributed("cpu")
    assert world.run_if(world.is_first, lambda: 7) == (7 if world.is_first else None)
    try:
        world.run_if(world.local_rank == 1, Mock(side_effect=OSError("the disk is full")))
    except (ConfigError, OSError) as error:
        print(f"{type(error).__name__} of {world.rank}: {error}")
    world.close()


def test_an_error_in_one_process_is_raised_in_both(tmp_path):
    first, second = processes.run_two(raise_in_the_second, output=tmp_path / "printed")
    assert first == (0, "ConfigError of 0: the disk is full\n")
    assert second == (0, "OSError of 1: the disk is full\n")


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(work):
    """Elastic: all processes are restarted, and continue from the last checkpoint to the end."""
    overrides = ["steps=60", "validation.every=60", "checkpoint.every=5", "data.batch=2", "log.every=1"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    line += ["--monitor-interval=0.2", "-m", "seemore_fast.training", *options(work, *overrides, resume=AUTO)[1:]]
    printed, folder = work / "printed", Checkpoints(work / "run" / "checkpoints", 2)
    with printed.open("w") as file:
        process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    while not folder.steps():
        assert process.poll() is None, printed.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed_at = folder.steps()[-1]
    assert process.wait(200) == 0, printed.read_text()
    assert killed_at < 60 and newest(work)["step"] == 60
    assert [int(row["step"]) for row in read_csv(work / "run" / "steps.csv")] == list(range(1, 61))
