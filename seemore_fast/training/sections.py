"""Sections of a configuration file: types of keys, validation by pydantic, and its errors as one line each."""

import contextlib
import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..errors import ConfigError


def mismatch(expected: str, **context: object) -> PydanticCustomError:
    """Return the error of a value; a `key` and `value` in the context replace those of the validated section."""
    return PydanticCustomError("mismatch", "expected {expected}", {"expected": expected, **context})


def _parse_number(value: Any) -> Any:
    """Convert text such as "1e-3", which YAML does not read as a number; refuse true and false, which Python does."""
    if isinstance(value, bool):
        raise mismatch("a number")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def expect(test: Callable[..., bool], expected: str) -> AfterValidator:
    """Return a validator that refuses values that fail the test."""

    def check(value: Any) -> Any:
        if not test(value):
            raise mismatch(expected)
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


DEFAULTS: Any = {}  # of a section without content


class Section(BaseModel):
    """Keys of one section. Unknown ones are errors; an empty section has the defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, content: Any) -> Any:
        return {} if content is None else content


S = TypeVar("S", bound=Section)


def validate(kind: type[S], content: Mapping, where: str, sources: Mapping[tuple, str] | None = None) -> S:
    """Return a section with this content; raise ConfigError with a line for each error.

    `where` names the origin of the content, `sources` that of single keys: {("data", "batch"): "data.batch=8"}.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [_describe(kind, one, where, sources or {}) for one in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "string_type": "text", "bool_type": "true or false", "list_type": "a list", "tuple_type": "a list",
    "dict_type": "names and values", "model_type": "keys and values",
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "too_long": "at most {max_length} values", "literal_error": "one of {expected}",
    "mismatch": "{expected}",
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
        near = difflib.get_close_matches(str(path[-1]), map(str, error["input"]), 1)
        return f"{where}: {_dotted(path)} is missing{f'; found {near[0]}' if near else ''}"
    expected = _EXPECTED.get(error["type"], "a valid value").format_map(context)
    if error["type"] == "literal_error":
        expected = expected.replace("'", "").replace(" or ", ", ")
    return f"{where}: {_dotted(path)} is {context.get('value', error['input'])!r}, expected {expected}"


def _dotted(path: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _suggestion(kind: type[Section], path: tuple) -> str:
    *sections, key = map(str, path)
    section: Any = kind
    for name in sections:
        section = section.model_fields[name].annotation
    fields = {name: field.annotation for name, field in section.model_fields.items()}
    inside = [f"{name}.{key}" for name, type_ in fields.items() if key in getattr(type_, "model_fields", ())]
    near = difflib.get_close_matches(key, fields, 1) or inside
    return f"did you mean {'.'.join([*sections, near[0]])}?" if near else f"expected one of {', '.join(fields)}"
