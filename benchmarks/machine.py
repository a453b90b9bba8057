"""Facts about machine, software and commit for every file of results; growth of memory."""

import ctypes
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import seemore_fast

HERE = Path(__file__).resolve().parent  # also where the package has a link to this folder
PACKAGES = ("triton", "onnxruntime", "openvino", "seemore")


def machine_facts(device: torch.device, is_checkout: bool) -> dict:
    """Return what a figure depends on. Without git, SEEMORE_FAST_COMMIT names the commit."""
    shell = partial(subprocess.run, shell=True, capture_output=True, text=True, cwd=HERE)
    commit = shell("git rev-parse HEAD").stdout.strip() if is_checkout else None
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processor": processor(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "commit": commit or os.environ.get("SEEMORE_FAST_COMMIT"),
        "uncommitted": shell("git status --porcelain -- .. :!results").stdout.splitlines() if commit else [],
        "backend_info": seemore_fast.backend_info(),
        "versions": versions | {package: version(package) for package in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def program() -> list[str]:
    """Return the first words of this process's command line."""
    name = Path(sys.argv[0]).name
    if not name.endswith(".py"):
        return [name]
    return ["python", f"benchmarks/{name}"] if name != "__main__.py" else ["python", "-m", "seemore_fast.cli"]


def folder_name(facts: dict) -> str:
    """Return the device's name in a form for folders."""
    return re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()


def processor() -> str:
    """Return the CPU's name as far as the system reports it."""
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def grown_megabytes(call: Callable) -> float | None:
    """Return the largest growth of resident memory during a call in MB; None where Linux does not report it."""
    try:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 1e3
    except OSError:
        return None


def resident(field: str) -> int:
    """Return a field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
