"""A tiny run, for the tests of training; the fixture `work` makes its images."""

import numpy as np
import pytest
import torch
from PIL import Image

from seemore_fast.io.resize import bicubic_resize

pytest.importorskip("pydantic", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

from seemore_fast.training.checkpoints import Checkpoints
from seemore_fast.training.loading import load_config
from seemore_fast.training.trainer import Trainer

TINY = """
steps: 12
ema: 0.9
model: {preset: t, scale: 2, num_layers: 1, embedding_dim: 12}
data: {patch: 16, batch: 4}
schedule: {name: cosine, warmup: 2}
checkpoint: {every: 5, keep: 2}
validation: {every: 6, samples: 1}
log: {every: 3, tensorboard: false}
"""


def make_work(tmp_path):
    """A folder with photos to learn from, two to measure, and tiny.yml."""
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 3), ("held_out", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            smooth = bicubic_resize(rng.integers(0, 256, (12, 14, 3), np.uint8), 5)
            Image.fromarray(smooth).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "tiny.yml").write_text(TINY)
    return tmp_path


def arguments(work, *overrides, out="run"):
    folders = [f"data.train={work}/photos", f"validation.data.held={work}/held_out", f"out={work}/{out}"]
    return [str(work / "tiny.yml"), *folders, f"data.cache={work}/cache", *overrides]


def trainer(work, *overrides, out="run", resume=None):
    path, *overrides = arguments(work, *overrides, out=out)
    return Trainer(load_config(path, overrides)[0], resume=resume)


def stopped(work, *overrides, step=5, **options):
    """Return a trainer that has run to a step, after which the run can be resumed."""
    run = trainer(work, *overrides, **options)
    run.run(until=step)
    return run


def checkpoint(work, step, out="run"):
    return work / out / "checkpoints" / f"step_{step:09d}.pt"


def newest(work, out="run"):
    state, errors = Checkpoints(work / out / "checkpoints", 9).newest()
    assert not errors
    return state


def tensors(state):
    """Return all tensors of a checkpoint, in one order."""
    optimizer = [value for moments in state["optimizer"]["state"].values() for value in moments.values()]
    return [*state["model"].values(), *state["average"].values(), *map(torch.as_tensor, optimizer), state["random"]]
