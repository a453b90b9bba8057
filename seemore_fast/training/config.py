"""Configuration of a training run. Every key is declared once, with its type, range, default and meaning."""

import functools
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from ..network.config import PRESETS
from .sections import DEFAULTS, Folders, NamedFolders, OneOrMany, Real, Section, Share, Whole, expect, mismatch


class Arguments(Section):
    """Arguments of `SeemoRe` except the scale. Null is its default."""

    in_chans: Whole | None = None
    num_experts: Whole | None = None
    num_layers: Whole | None = None
    embedding_dim: Whole | None = None
    img_range: Real | None = None
    use_shuffle: StrictBool | None = None
    global_kernel_size: Whole | None = None
    recursive: Whole | None = None
    lr_space: Literal["linear", "double", "exp"] | None = None
    topk: Whole | None = None


class Model(Arguments):
    """The network: a published size, and arguments that override those of the size."""

    preset: Literal["t", "b", "l"] | None = Field(
        default="t", description="published size, or null for SeemoRe's defaults"
    )
    scale: Whole = Field(default=2, ge=1, description="factor of both sides")

    def arguments(self) -> dict:
        """Return the arguments of `SeemoRe`."""
        return {
            **(PRESETS[self.preset] if self.preset else {}),
            **self.model_dump(exclude={"preset"}, exclude_none=True),
        }


class Data(Section):
    """Training images. Without `lr`, LR is MATLAB's bicubic of the whole image."""

    train: Annotated[Folders, expect(bool, "at least one folder of images")] = Field(
        default=[], description="folders of HR images with subfolders; of one with HR in it, that"
    )
    lr: Folders = Field(default=[], description="a folder of LR images for each of `train`, or none")
    lr_name: Annotated[str, expect(lambda name: "{}" in name, "a name with {} in place of the HR image's")] = Field(
        default="{}", description="LR file name without extension: {}x2 for photo.png and photox2.png"
    )
    sizes: Annotated[
        list[Annotated[Real, Field(gt=0, le=1)]],
        OneOrMany,
        expect(lambda sizes: sizes and len({*sizes}) == len(sizes), "distinct numbers, at least one"),
    ] = Field(default=[1.0], description="each image is used at all of these sizes; 0.5: half as wide")
    cache: str | None = Field(default=None, description="folder of the decoded images; default: `cache` in `out`")
    patch: Whole = Field(default=64, ge=1, description="side of an LR patch, pixels")
    batch: Whole = Field(default=32, ge=1, description="patches of a step, over all processes and accumulated parts")
    augment: StrictBool = Field(default=True, description="flips and quarter turns")
    workers: Whole = Field(default=0, ge=0, description="processes that cut patches; 0: the training process does")
    on_device: StrictBool | None = Field(
        default=None, description="keep all images on the GPU; default: if they take less than a quarter of its memory"
    )


class Optimizer(Section):
    """Adam or AdamW."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Real = Field(default=1e-3, gt=0, description="learning rate before the schedule's factor")
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: Real = Field(default=0.0, ge=0)
    clip: Real | None = Field(default=None, gt=0, description="largest norm of all gradients together; default: none")


class Schedule(Section):
    """Learning rate over the steps, after a linear warm-up."""

    name: Literal["constant", "multistep", "cosine"] = Field(
        default="multistep",
        description="multistep: times gamma at milestones; cosine: constant until begin, then down",
    )
    warmup: Whole = Field(default=0, ge=0, description="steps from 0 up to the full rate")
    milestones: Annotated[list[Whole], OneOrMany, expect(lambda steps: steps == sorted(steps), "increasing steps")] = (
        Field(default=[], description="steps at which multistep multiplies the rate")
    )
    gamma: Real = Field(default=0.5, gt=0, description="factor of each milestone")
    begin: Whole = Field(default=0, ge=0, description="first step of the cosine")
    lowest: Real = Field(default=0.0, ge=0, le=1, description="factor of the rate at the last step of the cosine")


class Loss(Section):
    """Weights of the losses."""

    l1: Real = Field(default=1.0, ge=0, description="weight of the mean absolute difference")
    mse: Real = Field(default=0.0, ge=0, description="weight of the mean squared difference")
    fft: Real = Field(default=0.0, ge=0, description="weight of the mean absolute difference of the parts of rfft2")


class Validation(Section):
    """Images whose Y-PSNR and SSIM are measured with the averaged weights."""

    data: NamedFolders = Field(default={}, description="name: folder of HR images, or of HR and LR_bicubic/X<scale>")
    lr: NamedFolders = Field(default={}, description="name: folder of LR images, NAME or NAMEx<scale>")
    every: Whole = Field(default=5000, ge=1, description="steps between validations")
    samples: Whole = Field(default=2, ge=0, description="pictures of each set to keep")


class Checkpoint(Section):
    """Checkpoints of the run. The best weights are kept beside them."""

    every: Whole = Field(default=5000, ge=1, description="steps between checkpoints")
    keep: Whole = Field(default=3, ge=1, description="number of checkpoints kept, the newest")


class Log(Section):
    """Progress line, CSV files and TensorBoard."""

    every: Whole = Field(default=100, ge=1, description="steps between log entries")
    tensorboard: StrictBool | None = Field(default=None, description="default: if it is installed")


class Config(Section):
    """A training run."""

    out: str = Field(default="run", description="folder of checkpoints, weights and logs")
    steps: Whole = Field(default=500_000, ge=1)
    seed: Whole = Field(default=0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(default="fp32", description="bf16 and fp16 by autocast")
    graph: StrictBool = Field(default=True, description="on a GPU, replay steps as CUDA graphs")
    accumulate: Whole = Field(default=1, ge=1, description="parts in which a process computes its share of a batch")
    ema: Share = Field(default=0.999, description="decay of the averaged weights")
    init_from: str | None = Field(
        default="interpolation",
        description="initial weights: file, shipped model, interpolation, or null for random",
    )
    recompute: Literal["auto", "none", "block"] = Field(default="auto", description="activation checkpointing")
    model: Model = DEFAULTS
    data: Data = DEFAULTS
    optimizer: Optimizer = DEFAULTS
    schedule: Schedule = DEFAULTS
    loss: Loss = DEFAULTS
    validation: Validation = DEFAULTS
    checkpoint: Checkpoint = DEFAULTS
    log: Log = DEFAULTS

    @model_validator(mode="after")
    def _check_combinations(self):
        data, schedule, validation = self.data, self.schedule, self.validation
        unknown = [name for name in validation.lr if name not in validation.data]
        for holds, key, expected in (
            (schedule.warmup <= self.steps, "schedule.warmup", f"at most steps, {self.steps}"),
            (schedule.begin <= self.steps, "schedule.begin", f"at most steps, {self.steps}"),
            (not unknown, "validation.lr", f"names of validation.data, which has no {', '.join(unknown)}"),
            (any(self.loss.model_dump().values()), "loss.l1", "a positive number, as loss.mse and loss.fft are 0"),
            (len(data.lr) in (0, len(data.train)), "data.lr", "a folder for each of data.train"),
            (not data.lr or data.sizes == [1], "data.sizes", "[1], as data.lr gives the low resolution"),
            (data.batch % self.accumulate == 0, "accumulate", f"a divisor of data.batch, {data.batch}"),
        ):
            if not holds:
                value = functools.reduce(getattr, key.split("."), self)
                raise mismatch(expected, key=key, value=value)
        return self
