"""Commands with time limits, one at a time or in parallel, with their logs and outcomes; the parts of gpu_check.

Imports nothing of the package, which a step may have to build.
"""

import atexit
import contextlib
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

GRACE_S = 10  # between the interrupt of a step, which may still print its results, and its kill
MIN_S = 5  # left to start a step
SAVE_EVERY_S = 15  # while no step ends
SHOWN = 60  # last lines of a log that are printed


class Step(NamedTuple):
    name: str
    command: list[str] | str  # or why it cannot run here
    seconds: int  # limit
    optional: bool = False  # skipped, which is not a failure, if fewer seconds are left
    environment: dict[str, str] | None = None
    after: str = ""  # a parallel step that has to end, with any outcome, before this one starts


def heed_interrupts():
    """Let SIGINT end this process, also where a shell that started a job in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """A started step, or the reason why it was not started."""

    def __init__(self, step: Step, log: Path, deadline: float, folder: Path, environment: dict[str, str]):
        self.step, self.log, self.start = step, log, time.monotonic()
        self.process, self.interrupted = None, False
        self.limit = min(step.seconds, deadline - GRACE_S - self.start)
        if isinstance(step.command, str):
            self.outcome = f"skipped: {step.command}"
        elif self.limit < (step.seconds if step.optional else min(step.seconds, MIN_S)):
            left = f"{max(self.limit, 0):.0f} s left"
            self.outcome = f"skipped: {left}" if step.optional else f"failed: no time, {left}"
        else:
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    step.command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment, **(step.environment or {})},
                    process_group=0,  # its own processes end with it
                    preexec_fn=heed_interrupts,
                )
            atexit.register(self.signal, signal.SIGKILL)

    def signal(self, number: int):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def has_ended(self) -> bool:
        """Return whether it has ended; interrupt it at its limit, and kill it GRACE_S later."""
        if self.process is None:
            return True
        over = time.monotonic() - self.start - self.limit
        if over > GRACE_S:
            self.signal(signal.SIGKILL)
            self.process.wait()
        elif over > 0 and not self.interrupted:
            self.interrupted = True
            self.signal(signal.SIGINT)
        return self.process.poll() is not None

    def result(self) -> dict:
        """Return outcome, seconds and last line of the log; print the end of the log."""
        seconds, lines = 0, []
        if self.process:
            atexit.unregister(self.signal)
            seconds = round(time.monotonic() - self.start, 1)
            lines = self.log.read_text(errors="replace").splitlines()
            status = self.process.returncode
            self.outcome = "passed" if status == 0 else f"failed: exit status {status}"
            if self.interrupted:
                self.outcome = f"failed: not done after {self.limit:.0f} s"
        print(f"\n{self.step.name}: {self.outcome}, {seconds} s", flush=True)
        is_short = self.outcome == "passed" and not self.step.name.startswith("benchmark")
        print("\n".join(lines[-3 if is_short else -SHOWN :]), flush=True)
        last = next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), "")
        return {"step": self.step.name, "outcome": self.outcome, "seconds": seconds, "last_line": last}


@dataclass
class Runner:
    """Runner of steps in `folder` until `deadline`, with save(results) after each step and at intervals."""

    folder: Path
    logs: Path
    deadline: float  # of time.monotonic()
    environment: dict[str, str]
    save: Callable[[list[dict]], None]
    workers: int = os.cpu_count() or 1
    results: list[dict] = field(default_factory=list)

    def run(self, steps: list[Step], share: float = 1) -> list[dict]:
        """Run steps in parallel within a share of the time left; return their results in the order of their ends."""
        now = time.monotonic()
        deadline, first = now + share * (self.deadline - now), len(self.results)
        waiting, running, saved = list(steps), [], now
        while waiting or running:
            unfinished = {step.name for step in waiting} | {run.step.name for run in running}
            for step in [step for step in waiting if step.after not in unfinished][: self.workers - len(running)]:
                waiting.remove(step)
                log = self.logs / f"{slug(step.name)}.log"
                running.append(Run(step, log, deadline, self.folder, self.environment))
            ended = [run for run in running if run.has_ended()]
            for run in ended:
                running.remove(run)
                self.results.append(run.result())
            if ended or time.monotonic() - saved > SAVE_EVERY_S:
                self.save(self.results)
                saved = time.monotonic()
            time.sleep(0.05)
        return self.results[first:]


def slug(name: str) -> str:
    """Return a name in a form for files."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def archive(target: Path, root: Path, paths: Iterable[Path]):
    """Write an archive of files under `root` atomically: a kill leaves the previous one."""
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w:gz", compresslevel=3) as tar:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # a temporary file of a running step
                tar.add(path, path.relative_to(root))
    os.replace(part, target)
