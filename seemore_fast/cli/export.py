"""``seemore-fast export``: conversion of a network into other file formats."""

import argparse
from pathlib import Path

from ..errors import CheckpointError, UsageError
from ..io.atomic import unwritable_reason
from ..network.checkpoint import load_model
from ..network.export import FORMATS, export, smallest
from .exits import DONE

HELP = "Write a network as .safetensors, .pth (published layout), .onnx or .pt2 (torch.export)."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("--model", default="seemore_t_x2", metavar="NAME|PATH", help="shipped model or weights file")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="its extension selects the format"
    )


def run(options: argparse.Namespace) -> int:
    """Write the file atomically."""
    if options.output.suffix.lower() not in FORMATS:
        kinds = ", ".join(FORMATS)
        raise UsageError(f"{options.output} ends in {options.output.suffix!r}, expected one of {kinds}")
    if reason := unwritable_reason(options.output):
        raise UsageError(reason)
    try:
        model = load_model(options.model)
    except CheckpointError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    try:
        export(model, options.output)
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'seemore-fast[export]'") from None
    print(f"{options.output}: {FORMATS[options.output.suffix.lower()]}")
    if options.output.suffix.lower() in (".onnx", ".pt2"):
        print(f"images of at least {smallest(model)} pixels a side; values in [0, 1]")
    return DONE
