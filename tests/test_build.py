"""What the build looks for, and what it says where something is missing. Builds themselves: test_packaging.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402

sys.path.remove(str(ROOT / "csrc"))


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty folder as PATH; returns a function that puts a script there."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SEEMORE_FAST_NATIVE", "SEEMORE_FAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name, script):
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return put


NVCC = """case "$1" in
--list-gpu-code) printf 'sm_80\\nsm_90\\nsm_120\\n';;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
--dryrun) echo '#$ LIBRARIES= "-L/toolkit/lib"' >&2;;
esac"""


def setup(*arguments, **environment):
    """Run setup.py, which looks for everything at once; return (exit status, what it printed)."""
    command = [sys.executable, "setup.py", "--quiet", *(arguments or ["--version"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout + done.stderr


def test_without_a_compiler_the_package_is_pure_and_says_so_once(tools):
    status, printed = setup()
    assert status == 0
    assert printed.count("left out") == 1
    assert "seemore-fast: the native libraries are left out: there is no C++ compiler 'g++': install GCC 12" in printed


def test_without_nvcc_the_cuda_library_is_left_out(tools):
    tools("g++", "echo g++ 12")
    status, printed = setup()
    assert status == 0
    assert "the CUDA library is left out: there is no nvcc: install the CUDA toolkit, or set CUDA_HOME" in printed
    assert printed.count("left out") == 1


@pytest.mark.parametrize(
    "switches, message",
    [
        ({"SEEMORE_FAST_NATIVE": "1"}, "SEEMORE_FAST_NATIVE=1, but there is no C++ compiler 'g++': install"),
        ({"SEEMORE_FAST_CUDA": "1"}, "SEEMORE_FAST_CUDA=1, but there is no native build"),
        ({"SEEMORE_FAST_NATIVE": "0", "SEEMORE_FAST_CUDA": "1"}, "SEEMORE_FAST_CUDA=1, but there is no native build"),
        ({"SEEMORE_FAST_NATIVE": "yes"}, "SEEMORE_FAST_NATIVE is 'yes', expected auto, 0 or 1"),
        ({"CXX": "no-such-compiler -O2", "SEEMORE_FAST_NATIVE": "1"}, "there is no C++ compiler 'no-such-compiler'"),
    ],
)
def test_what_is_demanded_and_missing_is_an_error(tools, switches, message):
    status, printed = setup(**switches)
    assert status != 0
    assert message in printed
    assert "Traceback" not in printed


def test_switched_off_is_silent(tools):
    tools("g++", "echo g++ 12")
    assert "left out" not in setup(SEEMORE_FAST_NATIVE="0")[1]
    assert "left out" not in setup(SEEMORE_FAST_CUDA="0")[1]


def test_a_compiler_that_is_too_old_is_named(tools):
    tools("g++", "exit 1")
    with pytest.raises(native.Missing, match=r"^g\+\+ is too old: install GCC 12|/g\+\+ is too old"):
        native.find_toolchain()


def test_instruction_sets_that_the_compiler_lacks_are_left_out(tools):
    tools("g++", 'case "$*" in *avx512*) exit 1;; *) echo compiler 9;; esac')
    found = native.find_toolchain()
    assert list(found["instruction_sets"]) == [name for name in native.INSTRUCTION_SETS if "512" not in name]


@pytest.mark.parametrize(
    "listed, built",
    [
        (None, ["8.0", "9.0", "12.0+PTX"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0a 7.5", ["9.0a"]),
    ],
)
def test_architectures(tools, monkeypatch, listed, built):
    """Those asked for that nvcc knows; the flags name each once, PTX where asked for."""
    tools("nvcc", NVCC)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    found = native.find_cuda()
    assert list(found["architectures"]) == built
    assert found["version"] == "13.0"
    assert "-L/toolkit/lib" in found["libraries"]
    for name, flag in found["architectures"].items():
        assert ("code=[sm_" in flag) == name.endswith("+PTX")


def test_no_known_architecture_is_missing_not_a_crash(tools, monkeypatch):
    tools("nvcc", NVCC)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0")
    with pytest.raises(native.Missing, match=r"knows none of the architectures 5\.0, but sm_80 sm_90 sm_120"):
        native.find_cuda()


def test_an_nvcc_that_does_not_run_is_left_out_with_what_it_said(tools):
    tools("g++", "echo g++ 12")
    tools("nvcc", "echo broken installation >&2; exit 3")
    status, printed = setup()
    assert status == 0
    assert "nvcc --list-gpu-code fails: broken installation" in printed


def test_cuda_home_goes_before_path(tools, tmp_path, monkeypatch):
    tools("nvcc", NVCC)
    (tmp_path / "toolkit/bin").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(native.Missing, match="there is no nvcc"):
        native.find_cuda()


def test_products():
    with_headers, without = {"has_python_headers": True}, {"has_python_headers": False}
    assert native.products(None, None) == []
    assert native.products(with_headers, None) == ["_C", "libseemore_cpu"]
    assert native.products(without, {}) == ["libseemore_cpu"]
    assert native.products(with_headers, {"nvcc": "nvcc"}) == ["_C", "libseemore_cpu", "libseemore_cuda"]


def test_cuda_kernels_keep_everything_in_registers():
    """As ptxas said when the library was built, for every kernel and architecture."""
    info = pytest.importorskip("seemore_fast._C", reason="_C was not built")
    resources = info.kernel_resources()
    if not resources:
        pytest.skip("the CUDA library was not built")
    built = {f"sm_{name.removesuffix('+PTX').replace('.', '')}" for name in info.build_info()["cuda_architectures"]}
    assert {architecture for _, architecture in resources} == built
    for kernel, taken in resources.items():
        assert taken["stack"] == taken["spills"] == 0, kernel
        assert 0 < taken["registers"] <= 255, kernel
