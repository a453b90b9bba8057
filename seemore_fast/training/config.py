"""Configuration of a training run: a YAML file of sections and `section.key=value` overrides, checked before a step.

    seemore-fast train recipe.yml data.train=photos out=runs/t_x2

Every key is declared once, in the sections below, with its type, range, default and meaning. A recipe of the package
(`t_x2`, ...) goes by its name. Option files in BasicSR's format are translated by `basicsr_options`.
"""

import contextlib
import copy
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import ConfigError
from ..network.config import PRESETS
from .recipes import RECIPES


def _parse_number(value):
    """Convert text such as "1e-3", which YAML does not read as a number; refuse true and false, which Python does."""
    if isinstance(value, bool):
        raise PydanticCustomError("expected", "expected {expected}", {"expected": "a number"})
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _expect(test: Callable[..., bool], expected: str) -> AfterValidator:
    def check(value):
        if not test(value):
            raise PydanticCustomError("expected", "expected {expected}", {"expected": expected})
        return value

    return AfterValidator(check)


Whole = Annotated[int, BeforeValidator(_parse_number)]
Real = Annotated[float, BeforeValidator(_parse_number)]
Share = Annotated[Real, Field(ge=0, lt=1)]
OneOrMany = BeforeValidator(lambda value: value if isinstance(value, list) or value is None else [value])
Folders = Annotated[list[str], OneOrMany]
NamedFolders = Annotated[  # a name may look like a number in YAML
    dict[str, str],
    BeforeValidator(lambda value: {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value),
]


class Section(BaseModel):
    """Keys of one section. Unknown ones are errors; an empty section has the defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, content):
        return {} if content is None else content


class Model(Section):
    """The network: a published size, or `SeemoRe`'s own arguments, which override those of the size."""

    preset: Literal["t", "b", "l"] | None = Field("t", description="published size, or null for SeemoRe's defaults")
    scale: Whole = Field(2, ge=1, description="factor of both sides")
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

    def arguments(self) -> dict:
        """Return the arguments of `SeemoRe`."""
        return {
            **(PRESETS[self.preset] if self.preset else {}),
            **self.model_dump(exclude={"preset"}, exclude_none=True),
        }


class Data(Section):
    """Training images. Without `lr`, LR is MATLAB's bicubic of the whole image."""

    train: Annotated[Folders, _expect(bool, "at least one folder of images")] = Field(
        [], validate_default=True, description="folders of HR images with subfolders; of one with HR in it, that"
    )
    lr: Folders = Field([], description="a folder of LR images for each of `train`, or none")
    lr_name: Annotated[str, _expect(lambda name: "{}" in name, "a name with {} in place of the HR image's")] = Field(
        "{}", description="LR file name without extension: {}x2 for photo.png and photox2.png"
    )
    sizes: Annotated[
        list[Annotated[Real, Field(gt=0, le=1)]],
        OneOrMany,
        _expect(lambda sizes: sizes and len({*sizes}) == len(sizes), "distinct numbers, at least one"),
    ] = Field([1.0], description="each image is used at all of these sizes; 0.5: half as wide")
    cache: str | None = Field(None, description="folder of the decoded images; default: `cache` in `out`")
    patch: Whole = Field(64, ge=1, description="side of an LR patch, pixels")
    batch: Whole = Field(32, ge=1, description="patches of a step, over all processes and accumulated parts")
    augment: StrictBool = Field(True, description="flips and quarter turns")
    workers: Whole = Field(0, ge=0, description="processes that cut patches; 0: the training process does")
    on_device: StrictBool | None = Field(
        None, description="keep all images on the GPU; default: if they take less than a quarter of its memory"
    )


class Optimizer(Section):
    """Adam or AdamW."""

    name: Literal["adam", "adamw"] = "adam"
    lr: Real = Field(1e-3, gt=0, description="learning rate before the schedule's factor")
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: Real = Field(0.0, ge=0)
    clip: Real | None = Field(None, gt=0, description="largest norm of all gradients together; default: no limit")


class Schedule(Section):
    """Learning rate over the steps, after a linear warm-up."""

    name: Literal["constant", "multistep", "cosine"] = Field(
        "multistep", description="multistep: times gamma at each milestone; cosine: constant until begin, then down"
    )
    warmup: Whole = Field(0, ge=0, description="steps from 0 up to the full rate")
    milestones: Annotated[list[Whole], OneOrMany, _expect(lambda steps: steps == sorted(steps), "increasing steps")] = (
        Field([], description="steps at which multistep multiplies the rate")
    )
    gamma: Real = Field(0.5, gt=0, description="factor of each milestone")
    begin: Whole = Field(0, ge=0, description="first step of the cosine")
    lowest: Real = Field(0.0, ge=0, le=1, description="factor of the rate at the last step of the cosine")


class Loss(Section):
    """Weights of the losses."""

    l1: Real = Field(1.0, ge=0, description="weight of the mean absolute difference")
    mse: Real = Field(0.0, ge=0, description="weight of the mean squared difference")
    fft: Real = Field(0.0, ge=0, description="weight of the mean absolute difference of the parts of rfft2")


class Validation(Section):
    """Images whose Y-PSNR and SSIM are measured with the averaged weights."""

    data: NamedFolders = Field({}, description="name: folder of HR images, or of HR and LR_bicubic/X<scale>")
    lr: NamedFolders = Field({}, description="name: folder of LR images, NAME or NAMEx<scale>")
    every: Whole = Field(5000, ge=1, description="steps between validations")
    samples: Whole = Field(2, ge=0, description="pictures of each set to keep")


class Checkpoint(Section):
    """Checkpoints of the run. The best weights are kept beside them."""

    every: Whole = Field(5000, ge=1, description="steps between checkpoints")
    keep: Whole = Field(3, ge=1, description="number of checkpoints kept, the newest")


class Log(Section):
    """Progress line, CSV files and TensorBoard."""

    every: Whole = Field(100, ge=1, description="steps between log entries")
    tensorboard: StrictBool | None = Field(None, description="default: if it is installed")


class Config(Section):
    """A training run."""

    out: str = Field("run", description="folder of checkpoints, weights and logs")
    steps: Whole = Field(500_000, ge=1)
    seed: Whole = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field("fp32", description="bf16 and fp16 by autocast")
    accumulate: Whole = Field(1, ge=1, description="parts in which a process computes its share of a batch")
    ema: Share = Field(0.999, description="decay of the averaged weights")
    init_from: str | None = Field(
        "interpolation", description="initial weights: a file, a shipped model, interpolation, or null for random ones"
    )
    recompute: Literal["auto", "none", "block"] = Field("auto", description="activation checkpointing")
    model: Model = Model()
    data: Data = Field({}, validate_default=True)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

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
                raise PydanticCustomError(
                    "expected", "expected {expected}", {"expected": expected, "key": key, "value": value}
                )
        return self


S = TypeVar("S", bound=Section)


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """Return the checked configuration, and a line for each setting of the file that training ignores.

    Raises ConfigError, which names the file or override, the key, its value and what is expected.
    """
    where, notes = str(name_or_path), []
    content = RECIPES[where] if where in RECIPES else _read(Path(name_or_path))
    if "network_g" in content:
        from .basicsr_options import translate

        content, notes = translate(content, where)
    return build(Config, content, where, overrides), notes


def build(kind: type[S], content: dict, where: str, overrides: Iterable[str] = ()) -> S:
    """Return sections with the given content and "section.key=value" overrides.

    Raises ConfigError with a line for each error; `where` names the origin of the content.
    """
    content, sources = copy.deepcopy(content), {}
    for line in overrides:
        key, equals, text = line.partition("=")
        if not equals:
            raise ConfigError(f"{line}: expected key=value, such as data.batch=8")
        *sections, last = path = tuple(key.split("."))
        section = content
        for name in sections:
            section[name] = {} if section.get(name) is None else section[name]
            section = section[name]
            if not isinstance(section, dict):
                raise ConfigError(f"{line}: {name} is {section!r}, not a section")
        section[last] = _parse(text, line)
        sources[path] = line
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [_describe(kind, one, where, sources) for one in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "string_type": "text", "bool_type": "true or false", "list_type": "a list", "tuple_type": "a list",
    "dict_type": "names and values", "model_type": "keys and values",
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "too_long": "at most {max_length} values", "literal_error": "one of {expected}",
    "expected": "{expected}",
}  # fmt: skip


def _describe(kind: type[Section], error: Mapping, where: str, sources: Mapping[tuple, str]) -> str:
    """Return one line on an error of pydantic: file or override, key, value and what is expected."""
    context = error.get("ctx", {})
    path = tuple(context["key"].split(".")) if "key" in context else error["loc"]
    for key, line in sources.items():
        if key[: len(path)] == path[: len(key)]:
            where = line
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{where}: there is no key {_dotted(path)}; {_suggestion(kind, path)}"
    if error["type"] == "missing":
        return f"{where}: {_dotted(path)} is missing"
    expected = _EXPECTED.get(error["type"], "a valid value").format_map(context)
    if error["type"] == "literal_error":
        expected = expected.replace("'", "").replace(" or ", ", ")
    return f"{where}: {_dotted(path)} is {context.get('value', error['input'])!r}, expected {expected}"


def _dotted(path: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _suggestion(kind: type[Section], path: tuple) -> str:
    *sections, key = map(str, path)
    for name in sections:
        kind = kind.model_fields[name].annotation
    fields = {name: field.annotation for name, field in kind.model_fields.items()}
    inside = [f"{name}.{key}" for name, type_ in fields.items() if key in getattr(type_, "model_fields", ())]
    near = difflib.get_close_matches(key, fields, 1) or inside
    return f"did you mean {'.'.join([*sections, near[0]])}?" if near else f"expected one of {', '.join(fields)}"


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, RECIPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the package's recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"{path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    content = _parse(text, str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected sections and keys")
    return content


def _parse(text: str, where: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
