"""Native libraries: loading, the reasons why one cannot be used, and the CPU's instruction set."""

import functools
import json
import os
import re
from pathlib import Path

import torch

from ..errors import first_line

FOLDER = Path(__file__).parents[1]  # of the package, where the libraries lie


def load(path: Path) -> str | None:
    """Load the operators of a library; return None, or the reason why it does not load."""
    if not path.exists():
        info = build_info()
        reason = info["left_out"].get(path.stem) if isinstance(info, dict) else None
        because = f": {reason}" if reason else ""
        return (
            f"{path.name} was not built{because}; to build it, reinstall with pip's --no-cache-dir, and with "
            "SEEMORE_FAST_NATIVE=1 (for CUDA: SEEMORE_FAST_CUDA=1) to get an error where something is missing"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load in torch {torch.__version__}: {first_line(error)}"
    return None


def load_cpu() -> str | None:
    """Load the CPU library and use the instruction set of SEEMORE_FAST_CPU; return None, or the reason why not."""
    reason = load(FOLDER / "libseemore_cpu.so")
    wanted = os.environ.get("SEEMORE_FAST_CPU")
    if reason is None and wanted:
        if wanted not in instruction_sets():
            usable = ", ".join(instruction_sets())
            return f"SEEMORE_FAST_CPU is {wanted!r}, expected one that this processor and this build have: {usable}"
        use_instruction_set(wanted)
    return reason


def load_cuda() -> str | None:
    """Load the CUDA library; return None, or the reason why this torch cannot use it. Queries no device."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return load(FOLDER / "libseemore_cuda.so")


_cuda_reasons: dict[int, str | None] = {}  # by device index; only answers that stay true


def cuda_unsupported_reason(index: int) -> str | None:
    """Return None where CUDA device `index` runs the loaded library's kernels, otherwise the reason why not.

    Makes a context on that device, and on no other. An error that may pass, such as a device without free memory, is
    returned but not remembered: the next call asks again.
    """
    if index not in _cuda_reasons:
        try:
            with torch.cuda.device(index):
                _cuda_reasons[index] = torch.ops.seemore_cuda.unsupported_reason() or None
        except RuntimeError as error:
            return f"CUDA device {index} does not answer: {first_line(error)}"
    return _cuda_reasons[index]


@functools.cache  # the stable ABI loses the memory of every string that an operator returns
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the CPU library has kernels for and this processor runs, the best one last."""
    return tuple(torch.ops.seemore_cpu.instruction_sets().split())


def instruction_set() -> str:
    """Return the instruction set that the CPU kernels run in now."""
    return instruction_sets()[torch.ops.seemore_cpu.instruction_set()]


def use_instruction_set(name: str):
    """Run the CPU kernels in another instruction set; RuntimeError for one that cannot run here."""
    usable = instruction_sets()
    if name not in usable:
        raise RuntimeError(f"instruction set is {name!r}, expected one of: {', '.join(usable)}")
    torch.ops.seemore_cpu.use_instruction_set(usable.index(name))


def build_info() -> dict | str:
    """Return the build's tools, parts left out and reasons, or the reason why they are not known."""
    try:
        info = json.loads((FOLDER / "build_info.json").read_text())
    except (OSError, ValueError) as error:
        return f"not known: {error}"
    try:
        from .. import _C
    except ImportError as error:
        return {**info, "cpu_features": f"not known: {error}"}
    return {**info, "cpu_features": _C.cpu_features()}


def architecture_reason(capability: tuple[int, int]) -> str | None:
    """Return the reason why the CUDA library has no code for a compute capability, None if it has or is unknown.

    Compares numbers: no device is asked.
    """
    info = build_info()
    built = info["cuda_architectures"] if isinstance(info, dict) else []
    if not built or any(_runs_on(name, capability) for name in built):
        return None
    return f"built for {' '.join(built)}, the GPU is {capability[0]}.{capability[1]}"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture, such as 9.0, 9.0a, 10.0f or 12.0+PTX, runs on a GPU."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    assert match, f"{architecture} is no CUDA architecture"
    major, minor, suffix, ptx = match.groups()
    code = int(major), int(minor)
    if suffix == "a":
        return capability == code
    is_of_family = code[0] == capability[0] and code <= capability
    return is_of_family or (bool(ptx) and not suffix and code <= capability)
