"""Measured order of the backends by GPU, operator and dtype, which "auto" follows where it is known.

`seemore-fast benchmark tune` measures this machine's GPU and writes `user_file()`, which goes before the table of the
package (`SHIPPED`, written by `make gpu-check`). A table: {"NVIDIA H200": {"gated_ffn": {"bfloat16": ["triton",
"reference"]}}}, quickest first. Where nothing is known, the order of `backends.KERNELS` counts.
"""

import functools
import json
import os
import warnings
from pathlib import Path

import torch

from .._torch_compat import constant_in_graphs
from ..io.atomic import replacing

SHIPPED = Path(__file__).parents[1] / "preferences.json"


def user_file() -> Path | None:
    """Return the path of this user's table: SEEMORE_FAST_PREFERENCES, else in the folder for caches.

    None where the user has no home folder, as in containers that run as an arbitrary user.
    """
    if given := os.environ.get("SEEMORE_FAST_PREFERENCES"):
        return Path(given)
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(cache) / "seemore-fast" / "preferences.json"


@constant_in_graphs
def preferred(operator: str, device: torch.device, dtype: torch.dtype) -> list[str] | None:
    """Return the backends for an operator on a GPU, quickest first; None where none was measured."""
    if device.type != "cuda" or not table():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return table().get(device_name(index), {}).get(operator, {}).get(str(dtype).removeprefix("torch."))


@functools.cache
def device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def table() -> dict[str, dict]:
    shipped, own = (_read(path) if path else {} for path in (SHIPPED, user_file()))
    return {device: shipped.get(device, {}) | own.get(device, {}) for device in shipped | own}


def write(path: Path, device: str, operators: dict[str, dict[str, list[str]]]):
    """Enter operators in a device's table in a file, whose other entries stay."""
    tables = _read(path)
    tables[device] = tables.get(device, {}) | operators
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n")
    table.cache_clear()


def _read(path: Path) -> dict:
    """Return the tables of a file; none, with a warning, if it is not of the format of `write`."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    try:
        tables = json.loads(content)
        orders = [order for operators in tables.values() for types in operators.values() for order in types.values()]
        if not all(isinstance(name, str) for order in orders for name in order):
            raise TypeError("an order is no list of names")
    except (ValueError, AttributeError, TypeError) as error:
        doubt = f"{path} is no table of backends, it is left out: {error}; delete it, or tune again"
        warnings.warn(doubt, stacklevel=2)
        return {}
    return tables
