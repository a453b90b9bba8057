"""Checkpoints of a run, written atomically: the newest few and the best."""

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
from ..network.model import SeemoRe

VERSION = 1
_NO_EFFECT_ON_WEIGHTS = {
    "out", "init_from", "graph", "recompute", "model", "validation", "checkpoint", "log",
    "data.cache", "data.workers", "data.on_device",
}  # fmt: skip


class Checkpoints:
    """Folder `checkpoints` of a run: `step_<N>.pt`, of which the newest `keep` stay, and `best.safetensors`.

    `left_<N>_1` beside it archives the files of a run of N steps that was resumed from an earlier one.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.best = folder / "best.safetensors"

    def clear(self):
        """Remove the temporary files of a killed run."""
        for folder in (self.folder, self.folder.parent):
            for path in folder.glob(f"{TEMPORARY}*.tmp*"):
                path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Return the steps of the existing checkpoints, in order."""
        numbers = (re.fullmatch(r"step_(\d+)\.pt", path.name) for path in self.folder.glob("step_*.pt"))
        return sorted(int(match[1]) for match in numbers if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.pt"

    def save(self, state: dict) -> Path:
        """Write a checkpoint, synced before it is renamed; then remove all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(state["step"])
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for step in self.steps()[: -self.keep]:
            self.path(step).unlink()
        return path

    def archive_later(self, step: int) -> Path | None:
        """Move checkpoints later than `step` into a folder of their own, with copies of the weights and logs."""
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
            raise StateError(f"checkpoints after step {step} cannot be moved to {folder}: {error.strerror}") from None
        return folder

    def newest(self) -> tuple[dict | None, list[str]]:
        """Return the newest readable checkpoint, and an error message for each newer one."""
        errors = []
        for step in reversed(self.steps()):
            try:
                return read_state(self.path(step)), errors
            except StateError as error:
                errors.append(str(error))
        return None, errors

    def save_best(self, model: SeemoRe, **metadata: object):
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(model, self.best, **metadata)


def read_state(path: Path) -> dict:
    """Return the content of a checkpoint, without running code from the file; raise StateError if it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"{path} does not exist") from None
    except Exception as error:  # torch raises many types for damaged files
        raise StateError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise StateError(f"{path} is not a checkpoint of a run (version {found!r}, expected {VERSION})")
    return state


def check_same_network(state: dict, arguments: dict, path: Path):
    """Raise StateError if a checkpoint's network is not the one to train."""
    saved = json.loads(state["network"])
    for name in sorted({*saved, *arguments}):
        if saved.get(name) != arguments.get(name):
            raise StateError(
                f"{path} has model.{name} = {saved.get(name)!r}, this run {arguments.get(name)!r}: "
                "resume with the same network, or set another folder as `out`"
            )


def config_changes(saved: dict, config: dict, prefix: str = "") -> list[str]:
    """Return the differences from a checkpoint's configuration that can affect the weights, one line each."""
    changes = []
    for key, value in config.items():
        name, before = f"{prefix}{key}", saved.get(key)
        if name in _NO_EFFECT_ON_WEIGHTS or key not in saved:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            changes += config_changes(before, value, f"{name}.")
        elif value != before:
            changes.append(f"{name} is {value!r}, was {before!r}")
    return changes
