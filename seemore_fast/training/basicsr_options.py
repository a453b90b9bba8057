"""Translation of option files in BasicSR's format, that of the published recipes, to this package's configuration."""

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from ..errors import ConfigError
from ..torchrun import position
from .config import Arguments
from .sections import DEFAULTS, OneOrMany, Real, Section, Whole, mismatch, validate

_REASONS = {  # to ignore keys
    "experiments_root": "has no effect: use `out`",
    "resume_state": "has no effect: use --resume with a checkpoint of this package",
    "meta_info_file": "has no effect: all images of the folder are used",
}
_AUTO: Any = "auto"
_LIKELY = 0.8  # similarity to a known key above which an unknown one is taken for a typing error


def _expand(value: Any) -> str:
    if not isinstance(value, str):
        raise mismatch("a path")
    return os.path.expanduser(value)


File = Annotated[str, BeforeValidator(_expand)]
Files = Annotated[list[File], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]


class Options(Section):
    """A section of an option file. Keys without a field are noted, except `quiet` ones, which cannot affect weights."""

    model_config = ConfigDict(extra="allow")
    quiet: ClassVar[tuple[str, ...]] = ()

    def unsupported(self, where: str, prefix: str = "") -> Iterator[tuple[str, str]]:
        """Yield the keys without a field, and a reason; raise ConfigError for one that is probably a typing error."""
        fields = type(self).model_fields
        for key, value in (self.model_extra or {}).items():
            if isinstance(value, Options) or key in self.quiet:
                continue
            if near := difflib.get_close_matches(key, fields, 1, _LIKELY):
                raise ConfigError(f"{where}: there is no key {prefix}{key}; did you mean {prefix}{near[0]}?")
            if value is not None:
                yield f"{prefix}{key}", _REASONS.get(key, "is not supported and has no effect")
        for key, value in self:  # with extra keys
            if isinstance(value, Options):
                yield from value.unsupported(where, f"{prefix}{key}.")


# The sections of an option file; their fields are the supported keys.


class Network(Arguments):
    type: Literal["SeemoRe", "SeemoReFast"]
    scale: Whole | None = Field(default=None, ge=1)


class Backend(Options):
    type: Literal["disk"] = "disk"


class TrainingSet(Options):
    quiet = (
        "name", "task", "phase", "prefetch_mode", "pin_memory", "num_prefetch_queue", "scale", "use_shuffle",
        "dataset_enlarge_ratio",
    )  # fmt: skip
    type: Any = "PairedImageDataset"
    dataroot_gt: Files
    dataroot_lq: Files | None = None
    filename_tmpl: Any = "{}"
    io_backend: Backend = DEFAULTS
    gt_size: Whole = 128
    use_hflip: Any = True
    use_rot: Any = True
    num_worker_per_gpu: Any = 0
    batch_size_per_gpu: Whole = 16


class ValidationSet(Options):
    quiet = ("type", "io_backend", "task", "phase")
    name: Any = None
    dataroot_gt: File | None = None
    dataroot_lq: File | None = None
    filename_tmpl: Any = "{}"


class Datasets(Options):
    __pydantic_extra__: dict[str, ValidationSet]  # pyright: ignore[reportIncompatibleVariableOverride]
    train: TrainingSet


class Optimizer(Options):
    type: str = "Adam"
    lr: Real = 1e-3
    weight_decay: Any = None
    betas: Any = None


class Scheduler(Options):
    type: Literal[
        "MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR", "CosineAnnealingRestartCyclicLR",
        "TrueCosineAnnealingLR", None,
    ] = None  # fmt: skip
    milestones: Any = None
    gamma: Any = 0.1
    periods: Annotated[list[Whole], OneOrMany] | None = None
    T_max: Whole | None = None
    eta_min: Real = 0.0
    eta_mins: Annotated[list[Real], OneOrMany] = Field(default=[0.0], min_length=1)
    restart_weights: Any = 1


class Loss(Options):
    type: Literal["L1Loss", "MSELoss", "FFTLoss"]
    reduction: Literal["mean"] = "mean"
    loss_weight: Any = 1.0


class Training(Options):
    total_iter: Whole = 500_000
    ema_decay: Real = 0.0
    optim_g: Optimizer
    scheduler: Scheduler = DEFAULTS
    pixel_opt: Loss | None = None
    fft_opt: Loss | None = None
    grad_clip: Any = None
    use_grad_clip: Any = False
    warmup_iter: Whole | None = None
    use_amp: Any = False


class Metric(Options):
    type: Any = None
    crop_border: Any = None
    test_y_channel: Any = True


class Validation(Options):
    quiet = ("suffix", "pbar")
    val_freq: Whole = 5000
    save_img: Any = False
    metrics: dict[str, Metric] | None = None


class Paths(Options):
    pretrain_network_g: File | None = None
    strict_load_g: Any = None
    param_key_g: Any = "params"


class Logger(Options):
    print_freq: Any = None
    save_checkpoint_freq: Whole | None = None
    use_tb_logger: Any = None
    wandb: dict | None = None


class OptionFile(Options):
    quiet = (
        "model_type", "dist_params", "is_train", "dist", "rank", "world_size", "auto_resume",
        "find_unused_parameters", "dist_port", "launcher", "use_petrel",
    )  # fmt: skip
    name: Any = "run"
    scale: Whole | None = Field(default=None, ge=1)
    manual_seed: Any = None
    num_gpu: Annotated[Whole, BeforeValidator(lambda count: position().world if count == "auto" else count)] = _AUTO
    network_g: Network
    path: Paths = DEFAULTS
    datasets: Datasets
    train: Training
    val: Validation = DEFAULTS
    logger: Logger = DEFAULTS


def translate(options: Mapping, where: str) -> tuple[dict, list[str]]:
    """Return the content of a configuration, and a line for each requested setting that is not supported.

    As in BasicSR, the batch is `batch_size_per_gpu` times `num_gpu`, or times the processes if that is "auto".
    Raises ConfigError for missing sections and unusable values.
    """
    file = validate(OptionFile, options, where)
    notes, train, path, log = list(file.unsupported(where)), file.train, file.path, file.logger
    scale = file.network_g.scale or file.scale
    if scale is None:
        raise ConfigError(f"{where}: there is no scale, expected it in network_g or at the top")
    size = file.datasets.train.gt_size
    if size % scale:
        raise ConfigError(f"{where}: datasets.train.gt_size is {size}, expected a multiple of the scale, {scale}")
    content = {
        **_given(seed=file.manual_seed, precision="bf16" if train.use_amp else None),
        "out": f"runs/{file.name}",
        "steps": train.total_iter,
        "ema": train.ema_decay,
        "init_from": path.pretrain_network_g,
        "model": {"preset": None, **file.network_g.model_dump(exclude={"type"}), "scale": scale},
        "data": _data(file, size // scale, notes),
        "optimizer": _optimizer(train),
        "schedule": _schedule(train, notes),
        "loss": _losses(train),
        "validation": _validation(file, scale, notes),
        "checkpoint": _given(every=log.save_checkpoint_freq),
        "log": _given(every=log.print_freq or None, tensorboard=False if log.use_tb_logger is False else None),
    }
    for is_set, key, reason in (
        (path.pretrain_network_g and path.param_key_g != "params_ema", "path.param_key_g",
         "has no effect: params_ema are used if the file has them"),
        (path.strict_load_g is False, "path.strict_load_g", "has no effect: weights must fit"),
        ((log.wandb or {}).get("project"), "logger.wandb",
         "is not supported and has no effect: logs are CSV files and TensorBoard"),
    ):  # fmt: skip
        if is_set:
            notes.append((key, reason))
    return content, [f"{where}: {key} {reason}" for key, reason in notes]


def _given(**values: Any) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _data(file: OptionFile, patch: int, notes: list) -> dict:
    data = file.datasets.train
    for is_set, key, reason in (
        (data.type != "PairedImageDataset", "type", f"is {data.type}: training uses image pairs, or bicubic LR"),
        (data.use_hflip != data.use_rot, "use_hflip", "and use_rot are one setting here: both are on"),
    ):
        if is_set:
            notes.append((f"datasets.train.{key}", reason))
    lr = {"lr": data.dataroot_lq, "lr_name": data.filename_tmpl} if data.dataroot_lq else {}
    return {
        "train": data.dataroot_gt,
        **lr,
        "patch": patch,
        "batch": data.batch_size_per_gpu * max(1, file.num_gpu),
        "augment": bool(data.use_hflip or data.use_rot),
        "workers": data.num_worker_per_gpu,
    }


def _optimizer(train: Training) -> dict:
    name = train.optim_g.type.lower()
    defaults = {"betas": [0.9, 0.999], "weight_decay": 0.01 if name == "adamw" else 0}  # torch's
    clip = train.grad_clip or (0.01 if train.use_grad_clip and "grad_clip" not in train.model_fields_set else None)
    return {
        **defaults,
        **_given(weight_decay=train.optim_g.weight_decay, betas=train.optim_g.betas),
        **_given(clip=None if isinstance(clip, bool) else clip),
        "name": name,
        "lr": train.optim_g.lr,
    }


def _schedule(train: Training, notes: list) -> dict:
    scheduler = train.scheduler
    # Step k of W has k / W of the rate in BasicSR, k / (W + 1) here.
    warmup = {"warmup": max(0, (train.warmup_iter or 0) - 1)}
    if scheduler.type is None:
        return {"name": "constant", **warmup}
    is_multistep = scheduler.type.startswith("MultiStep")
    known = {"milestones", "gamma"} if is_multistep else {"periods", "T_max", "eta_min", "eta_mins", "restart_weights"}
    for key in sorted(scheduler.model_fields_set - known - {"type"}):
        notes.append((f"train.scheduler.{key}", "is not supported and has no effect"))
    if is_multistep:
        return {"name": "multistep", **warmup, "gamma": scheduler.gamma, **_given(milestones=scheduler.milestones)}
    periods = scheduler.periods or [scheduler.T_max or train.total_iter]
    if periods != [train.total_iter]:
        notes.append(("train.scheduler.periods", f"is {periods}: one cosine over all steps is used"))
    if scheduler.restart_weights not in ([1], 1):
        notes.append(("train.scheduler.restart_weights", "has no effect: there is one cosine over all steps"))
    lowest, rate = scheduler.eta_min or scheduler.eta_mins[-1], train.optim_g.lr
    return {"name": "cosine", **warmup, "lowest": lowest / rate if rate else 0.0}


def _losses(train: Training) -> dict:
    weights = {"l1": 0.0, "mse": 0.0, "fft": 0.0}
    for loss in (train.pixel_opt, train.fft_opt):
        if loss:
            weights[{"L1Loss": "l1", "MSELoss": "mse", "FFTLoss": "fft"}[loss.type]] = loss.loss_weight
    return weights


def _validation(file: OptionFile, scale: int, notes: list) -> dict:
    for name, metric in (file.val.metrics or {}).items():
        kind = metric.type or name
        if kind not in ("calculate_psnr", "calculate_ssim", "psnr", "ssim"):
            notes.append((f"val.metrics.{name}", f"of {kind} is not supported and has no effect"))
        elif not metric.test_y_channel:
            notes.append((f"val.metrics.{name}", "is of all channels: here it is of Y, as published"))
        if metric.crop_border not in (None, scale):
            reason = f"is {metric.crop_border}: here {scale}, the scale, as published"
            notes.append((f"val.metrics.{name}.crop_border", reason))
    data, lr = {}, {}
    for key, one in (file.datasets.model_extra or {}).items():
        if not (key.startswith("val") and one.dataroot_gt):
            notes.append((f"datasets.{key}", "has no effect: it is not a val with a dataroot_gt"))
            continue
        if one.filename_tmpl not in ("{}", f"{{}}x{scale}"):
            reason = f"has no effect: LR files are named like HR, or with x{scale} at the end"
            notes.append((f"datasets.{key}.filename_tmpl", reason))
        name = str(one.name or key)
        data[name] = one.dataroot_gt
        lr |= {name: one.dataroot_lq} if one.dataroot_lq else {}
    samples = {} if file.val.save_img else {"samples": 0}
    return {"data": data, "lr": lr, "every": file.val.val_freq, **samples}
