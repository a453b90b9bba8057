"""The built sdist and wheel, each installed where nothing of the tree can be imported."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Return (sdist, wheel); the wheel is built of the sdist, so the sdist is whole."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_contents(archives):
    sdist, wheel = archives
    in_wheel = zipfile.ZipFile(wheel).namelist()
    for name in (
        "weights/seemore_t_x2.safetensors",
        "weights/seemore_t_x2.md",
        "demo/chelsea.png",
        "kernels/__init__.py",
    ):
        assert f"seemore_fast/{name}" in in_wheel
    assert {name.split("/")[0].split("-")[0] for name in in_wheel} == {"seemore_fast"}, "no other top-level module"
    assert sum(info.compress_size for info in zipfile.ZipFile(wheel).infolist()) < 5e6
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/__init__.py", "csrc/README.md", "tests/conftest.py", "Makefile", "LICENSE", "NOTICE"} <= in_sdist


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """Return the Python of a fresh virtual environment with the wheel; torch and the rest come from this one."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    here = run(
        sys.executable, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])", cwd=folder
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
    run(python, "-m", "pip", "install", "--no-deps", archives[1], cwd=folder)
    # Only now, and behind the new environment's own packages; editable installs of `here` do not come along.
    Path(site.strip(), "dependencies.pth").write_text(here)
    return python


def test_the_installed_wheel_works(installed, tmp_path):
    where = run(installed, "-c", "import seemore_fast; print(seemore_fast.__file__)", cwd=tmp_path)
    assert str(installed.parents[1]) in where, "the tree was imported, not the wheel"
    code = (
        "import importlib.util, seemore_fast.kernels; assert importlib.util.find_spec('kernels') is None; "
        "import seemore_fast; print(seemore_fast.load_model('seemore_t_x2').scale)"
    )
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "2"
    run(installed, "-m", "seemore_fast.demo", "-o", tmp_path / "demo", cwd=tmp_path)
    command = installed.parent / "seemore-fast"
    run(command, "upscale", tmp_path / "demo/chelsea_x2.png", "-o", tmp_path / "big.png", cwd=tmp_path)
    assert (tmp_path / "big.png").stat().st_size > 10_000
    assert '"seemore_t_x2"' in run(command, "info", cwd=tmp_path)


def test_the_suite_passes_on_the_installed_wheel(installed, tmp_path):
    """The tests are copied out of the tree, so that `seemore_fast` can only be the installed one."""
    run("cp", "-r", ROOT / "tests", tmp_path, cwd=tmp_path)
    files = [f"tests/test_{stem}.py" for stem in ("model", "checkpoint", "cli", "image_files", "upscaler")]
    assert " passed" in run(installed, "-m", "pytest", "-q", "-x", "-m", "not slow", *files, cwd=tmp_path)
