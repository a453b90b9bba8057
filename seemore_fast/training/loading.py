"""Loading of configurations: a recipe or YAML file, and `section.key=value` overrides.

    seemore-fast train recipe.yml data.train=photos out=runs/t_x2

A recipe of the package (`t_x2`, ...) goes by its name. Option files in BasicSR's format are translated.
"""

import copy
import difflib
from collections.abc import Iterable
from pathlib import Path

import yaml

from ..errors import ConfigError
from .basicsr_options import translate
from .config import Config
from .recipes import RECIPES
from .sections import S, validate


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """Return the checked configuration, and a line for each setting of the file that training ignores.

    Raises ConfigError, which names the file or override, the key, its value and what is expected.
    """
    where, notes = str(name_or_path), []
    content = RECIPES[where] if where in RECIPES else _read(Path(name_or_path))
    if "network_g" in content:
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
    return validate(kind, content, where, sources)


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
