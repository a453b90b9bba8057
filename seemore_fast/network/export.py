"""Export of networks to other programs: weights in the published layout, ONNX, torch.export."""

from pathlib import Path

import torch

from ..io.atomic import replacing
from .checkpoint import save_model
from .model import SeemoRe

FORMATS = {
    ".safetensors": "weights, with what rebuilds the network in the file's metadata",
    ".pth": "weights in the published layout, under params and params_ema",
    ".onnx": "a graph for ONNX Runtime and others: any batch, height and width, routing inside",
    ".pt2": "a program of torch.export, with the same freedom",
}
MOST = 4096  # images of a batch


def export(model: SeemoRe, path: Path) -> None:
    """Write a network in the format of the file's extension, completely or not at all.

    Raises ValueError for another ending, and ImportError where ONNX's packages are missing.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    if kind == ".safetensors":
        return save_model(model, path)
    with replacing(path) as temporary:
        if kind == ".pth":
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            torch.save({"params": weights, "params_ema": weights}, temporary)
        elif kind == ".onnx":
            torch.onnx.export(
                model, (_example(model),), temporary, dynamo=True, dynamic_shapes=_free_sizes(model), verbose=False,
                input_names=["image"], output_names=["enlarged"], external_data=False,
            )  # fmt: skip
        else:
            torch.export.save(traced(model), temporary)


def traced(model: SeemoRe) -> torch.export.ExportedProgram:
    """Return the program of a network in evaluation mode, for images of at least `smallest` pixels a side."""
    with torch.no_grad():
        return torch.export.export(model, (_example(model),), dynamic_shapes=_free_sizes(model), strict=False)


def smallest(model: SeemoRe) -> int:
    """Return the smallest height and width of an exported graph's images.

    torch treats a size of one apart from all others: so the map that `calibrate` makes of an image has two.
    """
    return 2 * model.min_size


def _example(model: SeemoRe) -> torch.Tensor:
    size = 2 * smallest(model)
    return torch.rand(2, model.in_chans, size, size + smallest(model) // 2, device=model.mean.device)


def _free_sizes(model: SeemoRe) -> dict:
    sizes = {name: torch.export.Dim(name, min=smallest(model)) for name in ("height", "width")}
    return {"x": {0: torch.export.Dim("batch", min=1, max=MOST), 2: sizes["height"], 3: sizes["width"]}}
