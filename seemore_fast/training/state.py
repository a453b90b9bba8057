"""Checkpoints of a run: whole or not there, the newest few and the best."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import torch

from ..errors import StateError, first_line
from ..io.atomic import TEMPORARY, replacing
from ..network.checkpoint import save_model

VERSION = 1
_OF_NO_WEIGHT = {
    "out", "init_from", "recompute", "model", "validation", "checkpoint", "log",
    "data.cache", "data.workers", "data.on_device",
}  # fmt: skip


class Checkpoints:
    """The folder `checkpoints` of a run: `step_<N>.pt`, of which the newest `keep` stay, and `best.safetensors`.

    `left_<N>_1` beside it has what a run of N steps had when it went on from an earlier one: nobody removes that.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.best = folder / "best.safetensors"

    def clear(self):
        """Remove what a run that was killed in the middle of a file has left."""
        for folder in (self.folder, self.folder.parent):
            for path in folder.glob(f"{TEMPORARY}*.tmp*"):
                path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, oldest first."""
        numbers = (re.fullmatch(r"step_(\d+)\.pt", path.name) for path in self.folder.glob("step_*.pt"))
        return sorted(int(match[1]) for match in numbers if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.pt"

    def save(self, state: dict) -> Path:
        """Write a checkpoint, on disk before it gets its name; then remove what is older than the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(state["step"])
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink()
        return path

    def set_aside(self, step: int) -> Path | None:
        """Put what is later than a step, that a run goes on from, into a folder of its own, with copies of the rest."""
        later = [number for number in self.steps() if number > step]
        if not later:
            return None
        out = self.folder.parent
        folder = next(path for n in itertools.count(1) if not (path := out / f"left_{later[-1]}_{n}").exists())
        try:
            folder.mkdir()
            for path in (self.best, *(out / name for name in ("weights.safetensors", "steps.csv", "validation.csv"))):
                if path.exists():
                    shutil.copy2(path, folder)
            for number in later:
                self.path(number).rename(folder / self.path(number).name)
        except OSError as error:
            raise StateError(f"what is later than step {step} cannot be moved to {folder}: {error.strerror}") from None
        return folder

    def newest(self) -> tuple[dict | None, list[str]]:
        """Return the newest checkpoint that can be read, and a line for each newer one that cannot."""
        complaints = []
        for step in reversed(self.steps()):
            try:
                return read_state(self.path(step)), complaints
            except StateError as error:
                complaints.append(str(error))
        return None, complaints

    def save_best(self, model, **metadata):
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(model, self.best, **metadata)


def read_state(path: Path) -> dict:
    """Return what a checkpoint holds; raise StateError where it is none. Never runs code from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"{path} does not exist") from None
    except Exception as error:  # torch raises all kinds of errors on damaged files
        raise StateError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise StateError(f"{path} is no checkpoint of a run (version {found!r}, expected {VERSION})")
    return state


def check_same_network(state: dict, arguments: dict, path: Path):
    """Raise StateError where a checkpoint's network is another one than is to be trained."""
    there = json.loads(state["network"])
    for name in sorted({*there, *arguments}):
        if there.get(name) != arguments.get(name):
            raise StateError(
                f"{path} was made with model.{name} = {there.get(name)!r}, this run has {arguments.get(name)!r}: "
                "resume with the same network, or give another folder as `out`"
            )


def differences(there: dict, config: dict, prefix: str = "") -> list[str]:
    """Return what a run is told otherwise than the one of the checkpoint was, but for what changes no weights."""
    found = []
    for key, value in config.items():
        name, before = f"{prefix}{key}", there.get(key)
        if name in _OF_NO_WEIGHT or key not in there:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            found += differences(before, value, f"{name}.")
        elif value != before:
            found.append(f"{name} is {value!r}, and was {before!r}")
    return found
