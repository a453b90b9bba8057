"""What a figure depends on beside the code that made it: written into every file of results."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import seemore_fast

HERE = Path(__file__).resolve().parent  # also where the package has a link to this folder
PACKAGES = ("triton", "onnxruntime", "openvino", "seemore")  # whose versions are told beside torch's


def machine_facts(device: torch.device, is_checkout: bool) -> dict:
    """Return what a figure depends on beside the code that made it, and which code that is.

    SEEMORE_FAST_COMMIT tells the commit of files that came without git.
    """
    shell = partial(subprocess.run, shell=True, capture_output=True, text=True, cwd=HERE)
    found = shell("git rev-parse HEAD").stdout.strip() if is_checkout else None
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processor": processor(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "commit": found or os.environ.get("SEEMORE_FAST_COMMIT"),
        "uncommitted": shell("git status --porcelain -- .. :!results").stdout.splitlines() if found else [],
        "backend_info": seemore_fast.backend_info(),
        "versions": versions,
    }


def program() -> list[str]:
    """Return the words that begin the command line of this process."""
    name = Path(sys.argv[0]).name
    if not name.endswith(".py"):
        return [name]
    return ["python", f"benchmarks/{name}"] if name != "__main__.py" else ["python", "-m", "seemore_fast.cli"]


def folder_name(facts: dict) -> str:
    """Return the device's name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()


def processor() -> str:
    """Return the CPU's name as far as the system tells it."""
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
