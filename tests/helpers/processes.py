"""Processes that begin with everything imported: forked of a server, where a new interpreter takes seconds."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from seemore_fast import cli

FORKS = multiprocessing.get_context("forkserver")
# torch's optimizers import torch._dynamo
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "seemore_fast.training.trainer", "seemore_fast.upscale.batch"])


class Forked:
    """A process that runs a function, and leads a group of its own; its output goes into a file."""

    def __init__(self, function, *arguments, output: Path, **environment: str):
        self.output = output
        self.process = FORKS.Process(target=_run, args=(output, environment, function, arguments))
        self.process.start()

    def signal(self, number: int, group: bool = False):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def wait_until(self, condition, seconds: int = 60):
        """Wait for a condition, which has to come true before the process ends."""
        for _ in range(50 * seconds):
            if condition():
                return
            assert self.process.is_alive(), self.output.read_text()
            time.sleep(0.02)
        raise AssertionError("timeout")

    def wait(self, seconds: int = 120) -> tuple[int, str]:
        """Return exit status and output; kill all that is left of its group."""
        self.process.join(seconds)
        self.signal(signal.SIGKILL, group=True)
        assert self.process.exitcode is not None, f"timeout: {self.output.read_text()}"
        return self.process.exitcode, self.output.read_text()


def _run(output: Path, environment: dict[str, str], function, arguments):
    os.setsid()
    os.environ |= environment
    multiprocessing.set_start_method(None, force=True)  # the default again, for processes that it starts
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(function(*arguments))


def run(function, *arguments, output: Path) -> tuple[int, str]:
    """Return exit status and output of a function in a process of its own."""
    return Forked(function, *arguments, output=output).wait()


def run_two(function, *arguments, output: Path) -> list[tuple[int, str]]:
    """Return exit status and output of a function in two processes that know of each other as torchrun's do."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    both = [
        Forked(
            function, *arguments, output=output.with_name(f"{output.name}{rank}"),
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port,
        )
        for rank in "01"
    ]  # fmt: skip
    return [one.wait() for one in both]


def command(*arguments, output: Path) -> Forked:
    """Start `seemore-fast` with arguments."""
    return Forked(cli.main, list(map(str, arguments)), output=output)
