"""The built sdist and wheel, each installed where nothing of the tree can be imported."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.native_build import native

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


# Not in Triton's interpreter, which is for the tests of kernels.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*command, cwd, env=ENVIRONMENT):
    """Return all that a command prints; it has to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Return (sdist, wheel); the wheel is built of the sdist, so the sdist is whole."""
    folder = tmp_path_factory.mktemp("dist")
    one_architecture = {**ENVIRONMENT, "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder, env=one_architecture)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def test_contents(archives):
    sdist, wheel = archives
    for name in (
        "py.typed",
        "weights/seemore_t_x2.safetensors",
        "weights/seemore_t_x2.md",
        "demo/chelsea.png",
        "kernels/__init__.py",
        "kernels/striped_conv.py",
        "kernels/configurations.json",
        "benchmarks/inference.py",
        "libseemore_cpu.so",
        "build_info.json",
    ):
        assert f"seemore_fast/{name}" in names_in(wheel)
    assert ("seemore_fast/libseemore_cuda.so" in names_in(wheel)) == bool(native.find_nvcc())
    assert not any("/results/" in name for name in names_in(wheel))
    assert "linux" in wheel.name
    assert {name.split("/")[0].split("-")[0] for name in names_in(wheel)} == {"seemore_fast"}, "no other module"
    assert sum(info.compress_size for info in zipfile.ZipFile(wheel).infolist()) < 5e6
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "kernels/__init__.py",
        "kernels/configurations.json",
        "csrc/native_build.py",
        "csrc/params/views.h",
        "csrc/cpu/simd/vec.h",
        "csrc/cuda/ops/striped_conv.cu",
    }
    assert wanted | {"tests/conftest.py", "Makefile", "LICENSE", "NOTICE"} <= in_sdist
    assert not any(name.endswith((".so", ".o", "build_info.json")) for name in in_sdist)


def install(wheel, folder):
    """Return the Python of a fresh virtual environment with the wheel; torch and the rest come from this one."""
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=folder)
    # Only now, and behind the new environment's own packages; editable installs of this one do not come along.
    Path(site.splitlines()[-1], "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    return install(archives[1], tmp_path_factory.mktemp("venv"))


def test_the_installed_wheel_works(installed, tmp_path):
    code = (
        "import importlib.util, seemore_fast.kernels; assert importlib.util.find_spec('kernels') is None; "
        "import seemore_fast; print(seemore_fast.__file__)"
    )
    assert str(installed.parents[1]) in run(installed, "-c", code, cwd=tmp_path), "the tree was imported, not the wheel"
    run(installed, "-m", "seemore_fast.demo", "-o", tmp_path / "demo", cwd=tmp_path)
    command = installed.parent / "seemore-fast"
    run(command, "upscale", tmp_path / "demo/chelsea_x2.png", "-o", tmp_path / "big.png", cwd=tmp_path)
    assert (tmp_path / "big.png").stat().st_size > 10_000
    assert '"seemore_t_x2"' in run(command, "info", cwd=tmp_path)
    options = "--quick", "--no-compile", "--runs", "1", "--case", "growth", "--results", tmp_path
    assert f"figures in {tmp_path}" in run(command, "benchmark", "inference", *options, cwd=tmp_path)


def test_the_suite_passes_on_the_installed_wheel(installed, tmp_path):
    """The tests are copied out of the tree, so that `seemore_fast` can only be the installed one."""
    run("cp", "-r", ROOT / "tests", tmp_path, cwd=tmp_path)
    stems = "model", "checkpoint", "cli", "image_files", "upscaler", "conformance", "striped_conv", "backends"
    files = [f"tests/test_{stem}.py" for stem in stems]
    one_operator = "(striped_conv or not conformance)"
    # triton and cuda_host need the tree's csrc/
    options = "-q", "-x", "-m", "not slow", "-k", f"not triton and not cuda_host and {one_operator}"
    assert " passed" in run(installed, "-m", "pytest", *options, *files, cwd=tmp_path)


FACTS = (
    "import json, torch, seemore_fast; info = seemore_fast.backend_info(); "
    "y = seemore_fast.load_model('seemore_t_x2')(torch.full((1, 3, 20, 24), 0.5)); "
    "print(json.dumps([info['available'], info['unavailable'], list(y.shape)]))"
)


def facts(python, folder):
    return json.loads(run(python, "-c", FACTS, cwd=folder).splitlines()[-1])


def test_the_installed_wheel_has_the_native_libraries(installed, tmp_path):
    available, unavailable, shape = facts(installed, tmp_path)
    assert available[:2] == ["reference", "cpu"]
    assert "was not built" not in unavailable.get("cuda", "was not built" if native.find_nvcc() else "")
    assert shape == [1, 3, 40, 48]


@pytest.mark.parametrize("library", ["libseemore_cpu.so", "_C*.so"])
def test_a_broken_library_does_not_stop_the_package(archives, tmp_path, library):
    python = install(archives[1], tmp_path)
    (path,) = tmp_path.glob(f"lib/*/site-packages/seemore_fast/{library}")
    path.write_bytes(b"foreign")
    available, unavailable, shape = facts(python, tmp_path)
    assert shape == [1, 3, 40, 48]
    if library == "libseemore_cpu.so":
        assert available == ["reference"]
        assert "libseemore_cpu.so does not load in torch" in unavailable["cpu"]
    else:
        assert available[:2] == ["reference", "cpu"]


def build_wheel(folder, path, **environment):
    """Build from a copy of the tree with only the given programs on PATH."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    tools = folder / "bin"
    tools.mkdir()
    for tool in path:
        (tools / tool).symlink_to(shutil.which(tool))
    hidden = {"CUDA_HOME", "CUDA_PATH", "CXX", "SEEMORE_FAST_NATIVE", "SEEMORE_FAST_CUDA"}
    env = {key: value for key, value in ENVIRONMENT.items() if key not in hidden}
    env |= {"PATH": str(tools), **environment}
    command = "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, source
    return run(sys.executable, *command, cwd=folder, env=env), next(folder.glob("*.whl"))


COMPILER = "g++", "gcc", "as", "ld", "sh"


def test_where_the_cuda_library_is_left_out_the_cpu_library_is_built_alone(tmp_path):
    printed, wheel = build_wheel(tmp_path, path=COMPILER, TORCH_CUDA_ARCH_LIST="Fermi")  # wherever nvcc lies
    (reason,) = set(re.findall("the CUDA library is left out: (.*)", printed))  # each run of setup.py prints it
    assert "seemore_fast/libseemore_cpu.so" in names_in(wheel)
    assert "seemore_fast/libseemore_cuda.so" not in names_in(wheel)
    info = json.loads(zipfile.ZipFile(wheel).read("seemore_fast/build_info.json"))
    assert info["left_out"] == {"libseemore_cuda": reason}


@pytest.mark.parametrize(
    ("tools", "environment", "reason"),
    [
        ((), {}, "there is no C++ compiler"),
        (COMPILER, {"SEEMORE_FAST_NATIVE": "0"}, "switched off by SEEMORE_FAST_NATIVE=0"),
    ],
    ids=["no compiler", "switched off"],
)
def test_a_pure_wheel_works(tmp_path, tools, environment, reason):
    printed, wheel = build_wheel(tmp_path, path=tools, **environment)
    assert environment or f"the native libraries are left out: {reason}" in printed
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names_in(wheel))
    folder = tmp_path / "environment"
    folder.mkdir()
    available, unavailable, shape = facts(install(wheel, folder), tmp_path)
    assert (available, shape) == (["reference"], [1, 3, 40, 48])
    assert f"libseemore_cpu.so was not built: {reason}" in unavailable["cpu"]


def test_the_same_wheel_works_in_the_newest_torch(archives, tmp_path):
    """`make test-all` makes the environment; the wheel was built with the torch of this one."""
    python = Path(os.environ.get("SEEMORE_FAST_NEWEST", ROOT / ".venv-newest"), "bin", "python")
    if not python.exists():
        pytest.skip("no environment with the newest torch: `make test-all` makes one")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", archives[1], cwd=tmp_path)
    newest = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path).splitlines()[-1]
    assert newest != torch.__version__
    available, unavailable, shape = facts(python, tmp_path)
    assert available[:2] == ["reference", "cpu"]
    assert shape == [1, 3, 40, 48]
    if "cuda" not in available:  # loaded, then found no GPU
        assert unavailable["cuda"] == "torch finds no usable NVIDIA GPU"
    run("cp", "-r", ROOT / "tests", tmp_path, cwd=tmp_path)
    files = "tests/test_conformance.py", "tests/test_striped_conv.py"
    options = "-q", "-x", "-k", "striped_conv and not triton and not cuda_host", *files
    assert " passed" in run(python, "-m", "pytest", *options, cwd=tmp_path)
