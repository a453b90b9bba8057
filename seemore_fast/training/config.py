"""What a training run is told: a YAML file of sections, `section.key=value` overrides, all of it checked before a step.

    seemore-fast train recipe.yml data.train=photos out=runs/t_x2

Sections and keys are the dataclasses below; a recipe of the package (`t_x2`, ...) goes by its name. Option files in
BasicSR's format, which the published recipes have, are read as they are (`basicsr_options`).
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..network.presets import PRESETS
from ..reference.model import LR_SPACES
from .recipes import RECIPES


@dataclass
class Model:
    """The network: a published size, or `SeemoRe`'s own arguments, which win over the size's."""

    preset: str | None = "t"  # t, b, l
    scale: int = 2
    in_chans: int | None = None
    num_experts: int | None = None
    num_layers: int | None = None
    embedding_dim: int | None = None
    img_range: float | None = None
    use_shuffle: bool | None = None
    global_kernel_size: int | None = None
    recursive: int | None = None
    lr_space: str | None = None
    topk: int | None = None

    def arguments(self) -> dict:
        """Return the arguments of `SeemoRe`."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if k != "preset" and v is not None}
        return {**(PRESETS[self.preset] if self.preset else {}), **own}


@dataclass
class Data:
    """Images to learn from. Without `lr` low resolution is made by MATLAB's bicubic, of the whole image."""

    train: list[str] = field(default_factory=list)  # folders of HR images, with their subfolders; HR in them, if there
    lr: list[str] = field(default_factory=list)  # a folder of LR images for each of them, or none
    lr_name: str = "{}"  # an LR file's name without its ending, "{}x2" for photo.png and photox2.png
    sizes: list[float] = field(default_factory=lambda: [1.0])  # each image is used at all of these; 0.5: half as wide
    cache: str | None = None  # folder of the decoded images; by default `cache` in `out`
    patch: int = 64  # side of an LR patch in pixels
    batch: int = 32  # patches of a step, of all processes and accumulated parts together
    augment: bool = True  # flips and quarter turns
    workers: int = 0  # processes that cut patches; 0: the training process does
    on_device: bool | None = None  # keep all images on the GPU; by default where they take a quarter of its memory


@dataclass
class Optimizer:
    name: str = "adam"  # adam, adamw
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of all gradients together


@dataclass
class Schedule:
    """How the learning rate goes, after `warmup` steps from 0 up.

    constant; multistep: times `gamma` at each of `milestones`; cosine: as it is until step `begin`, then down to
    `lowest` times the rate at the last step.
    """

    name: str = "multistep"
    warmup: int = 0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.5
    begin: int = 0
    lowest: float = 0.0


@dataclass
class Loss:
    """Weights of the mean absolute and squared difference of pixels, and the absolute one of the parts of rfft2."""

    l1: float = 1.0
    mse: float = 0.0
    fft: float = 0.0


@dataclass
class Validation:
    """Images whose Y-PSNR and SSIM are taken every so many steps, with the averaged weights."""

    # name: folder of HR images, or with HR and LR_bicubic/X<scale> in it
    data: dict[str, str] = field(default_factory=dict)
    # name: folder of its LR images, NAME or NAMEx<scale>
    lr: dict[str, str] = field(default_factory=dict)
    every: int = 5000
    samples: int = 2  # pictures of each to keep


@dataclass
class Checkpoint:
    every: int = 5000
    keep: int = 3  # the newest; the best is kept beside them


@dataclass
class Log:
    every: int = 100
    tensorboard: bool | None = None  # by default where it is installed


@dataclass
class Config:
    out: str = "run"
    steps: int = 500_000
    seed: int = 0
    precision: str = "fp32"  # fp32, bf16, fp16 (autocast), fp64
    accumulate: int = 1  # parts that a process's share of a batch is computed in
    ema: float = 0.999
    init_from: str | None = "interpolation"  # weights to start from: a file, a shipped model's name, or that
    recompute: str = "auto"  # auto, none, block: memory for time
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)


SECTIONS = (Model, Data, Optimizer, Schedule, Loss, Validation, Checkpoint, Log)


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """Return the checked configuration, and a line for each thing that the file asks for and training ignores.

    Raises ConfigError, which names the file or override, the key, what it is and what is expected.
    """
    where, notes = str(name_or_path), []
    content = RECIPES[where] if where in RECIPES else _read(Path(name_or_path))
    if "network_g" in content:
        from .basicsr_options import translate

        content, notes = translate(content, where)
    config = build(Config, content, where)
    override(config, overrides)
    check(config, where)
    return config, notes


def override(config: Config, overrides: Iterable[str]):
    """Set what "section.key=value" say; ConfigError for what they cannot."""
    for line in overrides:
        key, equals, text = line.partition("=")
        if not equals:
            raise ConfigError(f"{line}: expected key=value, such as data.batch=8")
        _override(config, key, _parse(text, line), line)


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, RECIPES, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; the package's recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"{path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    content = _parse(text, str(path)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {_kind(content)}, expected sections and keys")
    return content


def _parse(text: str, where: str):
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from None


def build(section: type, content, where: str, prefix: str = ""):
    """Return a dataclass of this section made of a mapping; every key and type is checked."""
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} is {_kind(content)}, expected keys and values")
    hints, values = typing.get_type_hints(section), {}
    for key, value in content.items():
        _check_key(section, str(key), where, prefix)
        values[key] = _convert(hints[key], value, where, f"{prefix}{key}")
    return section(**values)


def _check_key(section: type, key: str, where: str, prefix: str):
    names = [f.name for f in dataclasses.fields(section)]
    if key in names:
        return
    sections = {f.name: f.default_factory for f in dataclasses.fields(section) if f.default_factory in SECTIONS}
    inside = [f"{name}.{key}" for name, kind in sections.items() if key in kind.__dataclass_fields__]
    near = difflib.get_close_matches(key, names, 1) or inside
    hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(names)}"
    raise ConfigError(f"{where}: there is no key {prefix}{key}; {hint}")


def _override(config: Config, key: str, value, where: str):
    section, prefix = config, ""
    *sections, last = key.split(".")
    for name in sections:
        _check_key(type(section), name, where, prefix)
        prefix += f"{name}."
        section = getattr(section, name)
        if isinstance(section, dict):  # of data sets, whose names are the user's
            section[last] = _convert(str, value, where, key)
            return
        if not dataclasses.is_dataclass(section):
            raise ConfigError(f"{where}: {prefix.rstrip('.')} is one value, no section")
    _check_key(type(section), last, where, prefix)
    setattr(section, last, _convert(typing.get_type_hints(type(section))[last], value, where, prefix + last))


def _convert(hint, value, where: str, key: str):
    """Return the value as the type says, or raise ConfigError."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, f"{key}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        values = value if isinstance(value, list) else [value] if origin is list and value is not None else None
        if values is not None and (origin is list or len(values) == len(inner)):
            return origin(_convert(inner[0], one, where, key) for one in values)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(name): _convert(inner[1], one, where, f"{key}.{name}") for name, one in value.items()}
    elif hint in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)  # YAML takes 1e-3 for text
            if not isinstance(value, bool) and (hint is float or number.is_integer()):
                return hint(number)
    elif isinstance(value, hint):
        return value
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint)
    if expected is None:
        expected = {list: "a list", dict: "names and values"}.get(origin, f"{len(inner)} values")
    raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")


def _kind(value) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def check(config: Config, where: str):
    """Raise ConfigError for a value out of its range or a combination that cannot be."""

    def expect(holds: bool, key: str, expected: str):
        if not holds:
            value = config
            for name in key.split("."):
                value = getattr(value, name)
            raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")

    choices = {
        "precision": ("fp32", "bf16", "fp16", "fp64"),
        "recompute": ("auto", "none", "block"),
        "optimizer.name": ("adam", "adamw"),
        "schedule.name": ("constant", "multistep", "cosine"),
        "model.preset": (*PRESETS, None),
        "model.lr_space": (*LR_SPACES, None),
    }
    for key, allowed in choices.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, name)
        expect(value in allowed, key, f"one of {', '.join(str(a) for a in allowed if a)}")
    for key in ("steps", "accumulate", "model.scale", "data.patch", "data.batch", "validation.every"):
        section, _, name = key.rpartition(".")
        expect(getattr(getattr(config, section) if section else config, name) >= 1, key, "at least 1")
    expect(config.checkpoint.every >= 1, "checkpoint.every", "at least 1")
    expect(config.checkpoint.keep >= 1, "checkpoint.keep", "at least 1")
    expect(config.log.every >= 1, "log.every", "at least 1")
    expect(config.data.workers >= 0, "data.workers", "at least 0")
    expect(config.validation.samples >= 0, "validation.samples", "at least 0")
    expect(0 <= config.ema < 1, "ema", "a number from 0 up to, but not, 1")
    expect(0 <= config.seed < 2**63, "seed", "a whole number from 0 up to 2^63")
    expect(0 < config.optimizer.lr < math.inf, "optimizer.lr", "a positive number")
    expect(config.optimizer.weight_decay >= 0, "optimizer.weight_decay", "at least 0")
    expect(all(0 <= beta < 1 for beta in config.optimizer.betas), "optimizer.betas", "two numbers from 0 to 1")
    expect(config.optimizer.clip is None or config.optimizer.clip > 0, "optimizer.clip", "a positive number, or none")
    expect(0 <= config.schedule.warmup <= config.steps, "schedule.warmup", f"steps, from 0 to {config.steps}")
    expect(config.schedule.gamma > 0, "schedule.gamma", "a positive number")
    expect(0 <= config.schedule.lowest <= 1, "schedule.lowest", "a share of the rate, from 0 to 1")
    for name in config.validation.lr:
        expect(name in config.validation.data, "validation.lr", f"names of validation.data, {name!r} is none")
    expect(0 <= config.schedule.begin <= config.steps, "schedule.begin", f"a step from 0 to {config.steps}")
    expect(config.schedule.milestones == sorted(config.schedule.milestones), "schedule.milestones", "growing steps")
    weights = dataclasses.asdict(config.loss)
    for name, weight in weights.items():
        expect(weight >= 0, f"loss.{name}", "at least 0")
    expect(any(weights.values()), "loss.l1", "a positive number, as loss.mse and loss.fft are 0")
    expect(bool(config.data.train), "data.train", "at least one folder of images")
    if config.data.lr:
        expect(len(config.data.lr) == len(config.data.train), "data.lr", "a folder for each of data.train")
        expect(config.data.sizes == [1], "data.sizes", "[1], as data.lr gives the low resolution")
    sizes = config.data.sizes
    expect(sizes and all(0 < size <= 1 for size in sizes), "data.sizes", "numbers above 0 and up to 1")
    expect(len(set(sizes)) == len(sizes), "data.sizes", "each of them once")
    expect("{}" in config.data.lr_name, "data.lr_name", "a name with {} in it, where the HR image's goes")
    expect(config.data.batch % config.accumulate == 0, "accumulate", f"a divisor of data.batch, {config.data.batch}")
