"""A tiny run, for the tests of training; the fixture `work` makes its images."""

import numpy as np
import torch
from PIL import Image

from seemore_fast.io.resize import bicubic_resize
from seemore_fast.training.checkpoints import Checkpoints
from seemore_fast.training.config import load_config
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
    told = [f"data.train={work}/photos", f"validation.data.held={work}/held_out", f"out={work}/{out}"]
    return [str(work / "tiny.yml"), *told, f"data.cache={work}/cache", *overrides]


def trainer(work, *overrides, out="run", resume=None):
    path, *told = arguments(work, *overrides, out=out)
    return Trainer(load_config(path, told)[0], resume=resume)


def everything(state):
    """Return all tensors of a checkpoint, in one order."""
    optimizer = [v for of in state["optimizer"]["state"].values() for v in of.values()]
    return [*state["model"].values(), *state["average"].values(), *map(torch.as_tensor, optimizer), state["random"]]


def newest(work, out="run"):
    state, complaints = Checkpoints(work / out / "checkpoints", 9).newest()
    assert not complaints
    return state
