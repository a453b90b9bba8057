"""The CUDA kernels on the CPU: csrc/cuda/**/*.cu compiled by g++ into operators of torch.ops.seemore_cuda_host.

cuda_host.h says how kernels run and which faults show. They take CPU tensors and serve tests alone.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .. import ROOT

HERE = Path(__file__).parent
CACHE = ROOT / "build" / "cuda_host"
TORCH = Path(torch.__file__).parent

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # which refuses jumps from fiber to fiber
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10
SANITIZE = ["-O0", "-fsanitize=address", "-fno-omit-frame-pointer"]


class Unavailable(RuntimeError):
    """The library cannot be built here; the message says what is missing."""


def library(sanitize: bool = False) -> Path:
    """Return the library of all operators, built if it is missing or older than its sources.

    With `sanitize` it reports what it reads and writes out of bounds; a process of `asan_environment` can load it.
    """
    kernels = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    bindings = [ROOT / "csrc" / "bindings" / f"{source.stem}.cpp" for source in kernels]
    sources = [*filter(Path.exists, bindings), *kernels, HERE / "record.cu"]
    torch_flags = [
        TARGET,
        "-DSEEMORE_DEVICE=<host_device.h>",
        "-isystem",
        f"{TORCH}/include",
        f"-L{TORCH}/lib",
        "-ltorch_cpu",
    ]
    return compile_library("seemore_cuda_host", sources, CACHE, torch_flags, sanitize)


def compile_library(
    name: str, sources: Sequence[Path], folder: Path, flags: Sequence[str] = (), sanitize: bool = False
) -> Path:
    """Return a library of `sources`, which include csrc/cuda/common/launch.h; its name hashes all that goes in."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("no g++ on PATH")
    search = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(cuda_headers())]
    command = [compiler, *FLAGS, *(SANITIZE if sanitize else []), *search, *flags]

    included = [HERE, *(ROOT / "csrc" / folder for folder in ("params", "bindings", "cuda"))]
    headers = [header for folder in included for header in sorted(folder.rglob("*.h"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    ingredients = [repr((command, torch.__version__)).encode(), version]
    ingredients += [path.read_bytes() for path in [*headers, *sources]]
    digest = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in ingredients)).hexdigest()[:16]
    stem = f"lib{name}{'_asan' if sanitize else ''}"
    path = folder / f"{stem}-{digest}.so"
    if path.exists():
        return path

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{scratch}/{number}.o" for number in range(len(sources))]
        compiled = [
            pool.submit(run, [*command, "-x", "c++", "-c", str(source), "-o", object])
            for source, object in zip(sources, objects, strict=True)
        ]
        for future in compiled:
            future.result()
        run([compiler, "-shared", "-o", f"{scratch}/{path.name}", *objects, *command[1:]])
        for outdated in folder.glob(f"{stem}-*.so"):
            outdated.unlink(missing_ok=True)
        os.replace(f"{scratch}/{path.name}", path)  # at once: another process may look for it
    return path


def run(command: Sequence[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")


def cuda_headers() -> Path:
    """Return the include folder of a CUDA toolkit."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [nvcc_home(), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for home in filter(None, homes):
        include = Path(home, "include")
        if (include / "cuda_bf16.h").exists():
            return include
    raise Unavailable("no headers of a CUDA toolkit: CUDA_HOME is not set, no nvcc on PATH, none in /usr/local/cuda*")


def nvcc_home() -> str | None:
    """Return the toolkit's folder that nvcc reports: on PATH there may be a link or a script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
    return top and top[1]


def asan_environment() -> dict[str, str]:
    """Return the environment of a process that may load a library made with `sanitize`."""
    preload = []
    for name in ("libasan.so", "libstdc++.so"):  # the latter, too: else exceptions of Python's extensions end it
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            raise Unavailable(f"g++ has no {name}")
        preload.append(str(path.resolve()))
    return {**os.environ, "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}


ORDERS = ["forward", "backward", "shuffled"]


def available(build, *arguments, **options):
    try:
        return build(*arguments, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


def run_python(code: str, *arguments, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")


def load(path: Path):
    torch.ops.load_library(str(path))
    return torch.ops.seemore_cuda_host
