"""Weight files, and the configuration of the network that they belong to."""

import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line, os_reason, some_of
from ..io.atomic import replacing
from ..reference.config import LR_SPACES, expert_ranks
from .config import PRESETS
from .model import SeemoRe

WEIGHTS = Path(__file__).parents[1] / "weights"
_WRAPPERS = ("params_ema", "params", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_NO_WEIGHTS = ("mean", "n_averaged")  # a buffer that some copies keep, and the counter of torch's averaged models
_UNREADABLE = ("use_shuffle", "recursive", "topk", "img_range")
_KNOWN = {(p["num_layers"], p["embedding_dim"]): p for p in PRESETS.values()}


def shipped_models() -> list[str]:
    """Return the names of the models that the package contains."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load_model(name_or_path: str | os.PathLike, **overrides: Any) -> SeemoRe:
    """Return a SeemoRe with its weights, on the CPU, in float32 and in evaluation mode.

    `name_or_path` is the name of a shipped model ("seemore_t_x2"), or a .safetensors or .pth file in the published
    layout, bare or under "params_ema", "params", "state_dict" or "model", keys with or without "module.".
    The configuration follows from the shapes; use_shuffle, recursive, topk and img_range, which do not, come from
    the file's own metadata, from the published sizes, or, with a warning, is that of T. `overrides`
    are arguments of `SeemoRe` and win over all of it.

    Raises ValueError for an unknown name, FileNotFoundError for a file that is not there, and CheckpointError for one
    that holds something else; never runs code from a file.
    """
    path = _resolve(name_or_path)
    weights, recorded = read_weights(path)
    try:
        model = SeemoRe(**{**detect_config(weights, {**recorded, **overrides}), **overrides})
        check_keys({name: tensor.shape for name, tensor in model.state_dict().items()}, weights)
        model.load_state_dict(weights)
    except ValueError as error:  # of the caller's making only where there are overrides
        kind = ValueError if overrides and not isinstance(error, CheckpointError) else CheckpointError
        raise kind(f"{path}: {error}") from None
    return model.eval()


def _resolve(name_or_path: str | os.PathLike) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path is a {type(name_or_path).__name__}, expected a model's name or a file's path")
    if str(name_or_path) in shipped_models():
        return WEIGHTS / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if not (path.suffix or path.exists() or len(path.parts) > 1):
        raise ValueError(
            f"there is no shipped model {str(name_or_path)!r}; there are: {', '.join(shipped_models()) or 'none'}. "
            "Your own weights are given by their path, a .safetensors or .pth file"
        )
    return path


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the bare state dict in a file and the configuration recorded beside it (empty where there is none)."""
    try:
        path.open("rb").close()
    except (FileNotFoundError, IsADirectoryError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is a directory, expected a file"
        hint = (
            f"the name {path.stem} alone" if path.stem in shipped_models() else "a .safetensors or .pth file of weights"
        )
        raise FileNotFoundError(f"{path} {reason}: give {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_reason(error)}") from None
    recorded = {}
    if path.suffix.lower() == ".safetensors":
        content, recorded = _read_safetensors(path)
    elif path.suffix.lower() in (".pth", ".pt", ".ckpt"):
        content = _read_pickle(path)
    else:
        raise CheckpointError(f"{path} ends in {path.suffix!r}, expected .safetensors or .pth")
    try:
        return unwrap(content), recorded
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            config = {key: config[key] for key in _UNREADABLE if key in config} if isinstance(config, dict) else {}
            return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118, no mapping
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _read_pickle(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"Unsupported (?:global|class|operand)[^.\n]*|GLOBAL \S+", str(error))
        raise CheckpointError(
            f"{path} is not a plain file of weights ({refused[0] if refused else 'unreadable pickle'}); anything but "
            "tensors could run code and is refused. Save model.state_dict() alone, or use .safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no PyTorch checkpoint: {first_line(error)}") from None


def unwrap(content: object) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by their published keys."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        got = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"holds {got}, expected a state dict, bare or under one of {', '.join(_WRAPPERS)}")
    weights = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"holds {type(tensor).__name__} under {name!r}, expected names and tensors alone, bare or under one of "
                f"{', '.join(_WRAPPERS)}"
            )
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name not in _NO_WEIGHTS:
            weights[name] = tensor
    return weights


def detect_config(weights: Mapping[str, Tensor], known: Mapping | None = None) -> dict:
    """Return the arguments of `SeemoRe` that fit a state dict; `known` gives those that do not follow from shapes."""
    known = known or {}
    first = _shape(weights, "conv_1.weight", 4)
    channels, in_chans = first[0], first[1]
    experts = "body.0.local_block.block.moe_layer.experts"
    ranks = tuple(
        _shape(weights, f"{experts}.{i}.conv_1.weight", 4)[0] for i in range(max(_count(weights, experts), 1))
    )
    spaces = [space for space in ("exp", *LR_SPACES) if expert_ranks(space, len(ranks)) == ranks]
    if not spaces:
        raise CheckpointError(f"has experts of ranks {ranks}, expected them to grow as one of {', '.join(LR_SPACES)}")
    config = {
        "scale": math.isqrt(_shape(weights, "upsampler.0.weight", 4)[0] // max(in_chans, 1)),
        "in_chans": in_chans,
        "num_experts": len(ranks),
        "num_layers": _count(weights, "body"),
        "embedding_dim": channels,
        "global_kernel_size": _shape(weights, "body.0.global_block.block.attn.conv.0.weight", 4)[3],
        "lr_space": spaces[0],
    }
    published = _KNOWN.get((config["num_layers"], channels))
    missing = [name for name in ("use_shuffle", "recursive", "topk") if name not in known]
    if published is None and missing:
        assumed = ", ".join(f"{name}={PRESETS['t'][name]}" for name in missing)
        warnings.warn(
            f"{config['num_layers']} groups of {channels} channels is no published size: assuming {assumed} as in "
            "T. Pass them if the network was trained otherwise; shapes do not show them",
            stacklevel=3,
        )
    for name in _UNREADABLE:
        config[name] = known.get(name, (published or PRESETS["t"])[name])
    return config


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of numbered children of `prefix`: one more than the largest number."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights)
    return max((int(match[1]) for match in numbers if match), default=-1) + 1


def _shape(weights: Mapping[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in weights:
        some = ", ".join(list(weights)[:3])
        raise CheckpointError(f"holds no {name}, so it is no SeemoRe; it begins with {some}")
    if weights[name].dim() != dims:
        raise CheckpointError(f"{name} has shape {tuple(weights[name].shape)}, expected {dims} dimensions")
    return weights[name].shape


def check_keys(expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor]):
    """Raise CheckpointError unless `weights` has exactly the expected names and shapes."""
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    unusable = [
        f"{name} is {tensor.dtype}" + ("" if tensor.layout == torch.strided else f", {tensor.layout}")
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "mis-shaped": wrong,
        "not of dense floating numbers": unusable,
    }
    if any(problems.values()):
        parts = [f"{len(names)} {kind} ({some_of(names)})" for kind, names in problems.items() if names]
        raise CheckpointError(f"the keys do not fit this SeemoRe: {'; '.join(parts)}")


def save_model(model: SeemoRe, path: str | os.PathLike, **facts: object):
    """Write the weights and the configuration of a SeemoRe as .safetensors, completely or not at all.

    `facts` (numbers or strings) go into the file's metadata beside the configuration. Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"config": json.dumps(model.config), **{name: str(value) for name, value in facts.items()}}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(Path(path)) as temporary:
        try:
            save_file(weights, temporary, metadata)
        except SafetensorError as error:  # which is none, whatever the disk said
            raise OSError(f"{path} cannot be written: {error}") from None
