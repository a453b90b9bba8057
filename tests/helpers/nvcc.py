"""nvcc, and the figures of its report."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from . import CSRC, ROOT
from .native_build import native

BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
FIGURES = {
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill stores": re.compile(r"(\d+) bytes spill stores"),
    "spill loads": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+) bytes smem"),  # static; kernels assert that their dynamic one fits
}


def built(source: Path, architecture: int) -> tuple[Path, str] | None:
    """Return the object file of a CUDA source in the library built in this tree, if newer than all sources."""
    file = BUILD / f"cuda_{source.stem}.o"
    report = Path(f"{file}.ptxas")
    if not report.exists() or report.stat().st_mtime < newest_source():
        return None
    text = report.read_text()
    return (file, text) if f"for 'sm_{architecture}'" in text else None


@functools.cache
def compiled(source: Path, architecture: int) -> tuple[Path, str]:
    """Return a file with the code of a CUDA source, and the report of ptxas; both may be of more architectures."""
    cubin = Path(cubins().name) / f"{source.stem}_{architecture}.cubin"
    return built(source, architecture) or (cubin, compile_with_nvcc(source, architecture, cubin))


@functools.cache
def newest_source() -> float:
    return max(path.stat().st_mtime for path in CSRC.rglob("*") if path.suffix in (".cu", ".h"))


@functools.cache
def cubins() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def compile_with_nvcc(source: Path, architecture: int, cubin: str | Path, *flags: str) -> str:
    """Return the report of ptxas."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ["PATH"]]))
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in CUDA_HOME")
    command = [nvcc, "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3", f"-I{CSRC}"]
    command += ["-Xptxas", "-v", "-Werror", "all-warnings", *native.nvcc_flags(source), *flags]
    command += ["-o", str(cubin), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr
