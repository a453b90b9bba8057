"""Weights in files."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file


def save_model(model, path: str | os.PathLike, **facts):
    """Write the weights of a SeemoRe and what rebuilds it as .safetensors: whole, or not at all.

    `facts` (numbers or strings) go into the file's metadata beside the configuration.
    """
    path = Path(path)
    metadata = {"config": json.dumps(model.config), **{name: str(value) for name, value in facts.items()}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
