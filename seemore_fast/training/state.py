"""Checkpoints of a run: whole or not there, the newest few and the best."""

import json
import os
import re
from pathlib import Path

import torch

from ..checkpoint import save_model
from ..files import replacing

VERSION = 1


class StateError(RuntimeError):
    """A checkpoint that does not belong to the run that is to be resumed."""


class Checkpoints:
    """The folder `checkpoints` of a run: `step_<N>.pt`, of which the newest `keep` stay, and `best.safetensors`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def clear(self):
        """Remove what a run that was killed in the middle of a checkpoint has left."""
        for path in self.folder.glob(".seemore-fast.*.tmp*"):
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
        save_model(model, self.folder / "best.safetensors", **metadata)


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


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def check_same_network(state: dict, arguments: dict, path: Path):
    """Raise StateError where a checkpoint's network is another one than is to be trained."""
    there = json.loads(state["network"])
    for name in sorted({*there, *arguments}):
        if there.get(name) != arguments.get(name):
            raise StateError(
                f"{path} was made with model.{name} = {there.get(name)!r}, this run has {arguments.get(name)!r}: "
                "resume with the same network, or give another folder as `out`"
            )
