"""Commands with limits of time, alone or side by side, whose logs and outcomes outlive them: what gpu_check is made of.

Imports nothing of the package, which may be what a step is there to build.
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

GRACE = 10  # seconds between the interrupt, after which a step may still say what it knows, and the kill
LEAST = 5  # seconds, with fewer of which nothing is started
SAVED_EVERY = 15  # seconds, while no step ends
SHOWN = 60  # lines of a log


class Step(NamedTuple):
    name: str
    command: list[str] | str  # or why it cannot run here
    seconds: int  # at most
    optional: bool = False  # left out, which is no failure, where its seconds are not there
    environment: dict[str, str] | None = None
    after: str = ""  # the step beside it that is to have ended, however, before this one starts


class Run:
    """A step that has been started, or why not."""

    def __init__(self, step: Step, log: Path, deadline: float, folder: Path, environment: dict[str, str]):
        self.step, self.log, self.start = step, log, time.monotonic()
        self.process, self.interrupted = None, False
        self.limit = min(step.seconds, deadline - GRACE - self.start)
        if isinstance(step.command, str):
            self.outcome = f"skipped: {step.command}"
        elif self.limit < (step.seconds if step.optional else min(step.seconds, LEAST)):
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
                    process_group=0,  # all that it starts ends with it
                )
            atexit.register(self.signal, signal.SIGKILL)  # if we are stopped

    def signal(self, number: int):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def has_ended(self) -> bool:
        """Tell whether it has ended; interrupt it when its time is over, and kill it GRACE seconds later."""
        if self.process is None:
            return True
        over = time.monotonic() - self.start - self.limit
        if over > GRACE:
            self.signal(signal.SIGKILL)
            self.process.wait()
        elif over > 0 and not self.interrupted:
            self.interrupted = True
            self.signal(signal.SIGINT)
        return self.process.poll() is not None

    def result(self) -> dict:
        """Return what came of it: outcome, seconds and the last line that it printed; print that and more of it."""
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
    """Runs steps in `folder` until `deadline`; calls save(results) when one ends, and now and then in between."""

    folder: Path
    logs: Path
    deadline: float  # of time.monotonic()
    environment: dict[str, str]
    save: Callable[[list[dict]], None]
    most: int = os.cpu_count() or 1  # steps at a time
    results: list[dict] = field(default_factory=list)

    def run(self, steps: list[Step], share: float = 1) -> list[dict]:
        """Run steps side by side within a share of the time that is left; return what came of them, as they ended."""
        now = time.monotonic()
        deadline, first = now + share * (self.deadline - now), len(self.results)
        waiting, running, saved = list(steps), [], now
        while waiting or running:
            unfinished = {step.name for step in waiting} | {run.step.name for run in running}
            for step in [step for step in waiting if step.after not in unfinished][: self.most - len(running)]:
                waiting.remove(step)
                log = self.logs / f"{slug(step.name)}.log"
                running.append(Run(step, log, deadline, self.folder, self.environment))
            ended = [run for run in running if run.has_ended()]
            for run in ended:
                running.remove(run)
                self.results.append(run.result())
            if ended or time.monotonic() - saved > SAVED_EVERY:
                self.save(self.results)
                saved = time.monotonic()
            time.sleep(0.05)
        return self.results[first:]


def slug(name: str) -> str:
    """Return a name as that of a file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def archive(target: Path, root: Path, paths: Iterable[Path]):
    """Write an archive of files under `root`, whole or not at all: a kill leaves the one before."""
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w:gz", compresslevel=3) as tar:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # a temporary file of a step that runs
                tar.add(path, path.relative_to(root))
    os.replace(part, target)
