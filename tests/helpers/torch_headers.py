"""Headers of other versions of torch, in build/torch-headers: `make test-all` gets them by running this file.

They come out of wheels for macOS, which are the smallest: 80 MB.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "torch-headers"
PLATFORMS = "macosx_11_0_arm64", "macosx_14_0_arm64", "macosx_15_0_arm64"


def versions() -> dict[str, str]:
    """Return the oldest version of torch that pyproject.toml promises, that of constraints.txt and the newest."""
    promised = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    return {"oldest": promised, "pinned": pinned, "newest": "newest"}


def folder_of(version: str) -> Path:
    """Return the folder of a version's headers, which may not be there yet."""
    return FOLDER / version


def download(version: str):
    """Get the headers of a version, unless they are there."""
    if folder_of(version).exists():
        return
    requirement = {"newest": "torch"}.get(version, f"torch=={version}" + ".*" * (version.count(".") == 1))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", *(f"--platform={platform}" for platform in PLATFORMS)]
        subprocess.run([*command, f"--dest={temporary}", requirement], check=True)
        (wheel,) = Path(temporary).glob("torch-*.whl")
        print(wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            headers = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(temporary, headers)
        os.replace(Path(temporary, "torch", "include"), folder_of(version))


if __name__ == "__main__":
    for version in versions().values():
        download(version)
