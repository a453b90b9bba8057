"""nvcc, and the figures of its report."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import CSRC

KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")


FIGURES = {
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill stores": re.compile(r"(\d+) bytes spill stores"),
    "spill loads": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+) bytes smem"),  # static; kernels assert that their dynamic one fits
}


def compile_with_nvcc(source: Path, architecture: int, cubin: str | Path, *flags: str) -> str:
    """Return the report of ptxas."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ["PATH"]]))
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in CUDA_HOME")
    command = [nvcc, "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3", f"-I{CSRC}"]
    command += ["-Xptxas", "-v", "-Werror", "all-warnings", *flags, "-o", str(cubin), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr
