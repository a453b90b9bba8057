"""What the build looks for, and what it says where something is missing. Builds themselves: test_packaging.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, cuda_host
from helpers.native_build import native

NVCC_ENVIRONMENT = ("NVCC_THREADS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty folder as PATH; returns a function that puts a script there."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", *NVCC_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    for name in ("SEEMORE_FAST_NATIVE", "SEEMORE_FAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "TOOLKITS", [])

    def put(name, script):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return put


NVCC = """case "$1" in
--list-gpu-code) printf 'sm_80\\nsm_90\\nsm_120\\n';;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
--dryrun) echo '#$ LIBRARIES= "-L/toolkit/lib"' >&2;;
esac"""


WITHOUT_TOOLKITS = """
import runpy, sys
sys.path.insert(0, "csrc")
import native_build
native_build.TOOLKITS = []
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(*arguments, folder=ROOT, **environment):
    """Run setup.py, which looks for everything at once; return (exit status, what it printed)."""
    command = [sys.executable, "-c", WITHOUT_TOOLKITS, *(arguments or ["--quiet", "--version"])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
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
        ("9.0a 9.0", ["9.0", "9.0a"]),
        ("12.0f", ["12.0f"]),
        ("sm_90,80", ["8.0", "9.0"]),
        ("Hopper", ["9.0+PTX"]),
        ("Ampere;12.0", ["8.0+PTX", "12.0"]),  # nvcc has no 8.6, of which Ampere wants PTX
        ("all", ["8.0", "9.0", "12.0+PTX"]),
        ("8.0;9.0;10.0+PTX", ["8.0", "9.0+PTX"]),
    ],
)
def test_architectures(tools, monkeypatch, listed, built):
    """Those asked for that nvcc knows; the flags name each once, PTX where asked for."""
    tools("g++", "echo g++ 12")
    tools("nvcc", NVCC)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    found = native.find_cuda()
    for name, flag in found["architectures"].items():
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        assert flag == f"-gencode=arch=compute_{number},code={code}"
    # PTX moves to the newest of those that are built, where the one that had it is not
    assert list(found["architectures"]) == (built if listed != "Ampere;12.0" else ["8.0", "12.0+PTX"])
    assert found["version"] == "13.0"
    assert found["libraries"] == ["-L/toolkit/lib"]


def test_architectures_of_this_machine(tools, monkeypatch):
    import torch

    tools("g++", "echo g++ 12")
    tools("nvcc", NVCC)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    gpus = [(8, 0), (9, 0), (10, 3), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    assert list(native.find_cuda()["architectures"]) == ["8.0", "9.0+PTX"]  # whose PTX serves 10.3
    gpus.clear()
    with pytest.raises(native.Missing, match="TORCH_CUDA_ARCH_LIST is native, but torch finds no GPU here"):
        native.find_cuda()


@pytest.mark.parametrize("listed", ["Hopper;Fermi 2", "9", "sm_9x", "9.0+ptx2", "compute"])
def test_an_architecture_that_is_not_understood_is_named(tools, monkeypatch, listed):
    tools("g++", "echo g++ 12")
    tools("nvcc", NVCC)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(native.Missing, match=r"TORCH_CUDA_ARCH_LIST has '\S+', expected numbers such as 9\.0"):
        native.find_cuda()


def test_an_architecture_that_nvcc_lacks_is_left_out_and_said(tools):
    tools("g++", "echo g++ 12")
    tools("nvcc", NVCC)
    status, printed = setup(TORCH_CUDA_ARCH_LIST="7.0;8.0;8.7")
    assert status == 0
    assert "CUDA architectures are left out: nvcc 13.0 or the kernels do not have 7.0 8.7" in printed


def test_no_known_architecture_is_missing_not_a_crash(tools, monkeypatch):
    tools("nvcc", NVCC)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0")
    with pytest.raises(native.Missing, match=r"knows none of the architectures 5\.0, but sm_80 sm_90 sm_120"):
        native.find_cuda()


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo broken installation >&2; exit 3", "nvcc --list-gpu-code fails: broken installation"),
        (NVCC.replace("release", "version"), "nvcc --version names no release"),
        (NVCC.replace("LIBRARIES=", "NOTHING="), 'nvcc does not name its libraries: #$ NOTHING= "-L/toolkit/lib"'),
        (
            NVCC.replace("esac", "*) printf '#error --\\n unsupported GNU version!' >&2; exit 1;;\nesac"),
            "compiles nothing (set NVCC_CCBIN to a compiler that it supports, or CUDA_HOME to a toolkit that works): "
            "#error -- unsupported GNU version!",
        ),
    ],
)
def test_an_nvcc_that_does_not_work_is_missing_with_what_it_said(tools, script, said):
    tools("g++", "echo g++ 12")
    tools("nvcc", script)
    with pytest.raises(native.Missing, match=re.escape(said)):
        native.find_cuda()


def test_an_nvcc_that_does_not_work_is_left_out_or_an_error(tools):
    tools("g++", "echo g++ 12")
    tools("nvcc", "echo broken installation >&2; exit 3")
    status, printed = setup()
    assert status == 0
    assert printed.count("left out") == 1
    assert "nvcc --list-gpu-code fails: broken installation" in printed
    status, printed = setup(SEEMORE_FAST_CUDA="1")
    assert status != 0
    assert re.search(r"SEEMORE_FAST_CUDA=1, but \S+nvcc --list-gpu-code fails: broken installation", printed)
    assert "Traceback" not in printed


def test_nvcc_is_found_in_the_order_of_what_was_said_most_explicitly(tools, tmp_path, monkeypatch):
    assert native.find_nvcc() is None
    monkeypatch.setattr(native, "TOOLKITS", [f"{tmp_path}/missing", f"{tmp_path}/usual"])
    usual = tools("usual/bin/nvcc", NVCC)
    assert native.find_nvcc() == usual
    on_path = tools("nvcc", NVCC)
    assert native.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/stale")
    assert native.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_PATH", f"{tmp_path}/path")
    by_path = tools("path/bin/nvcc", NVCC)
    assert native.find_nvcc() == by_path
    by_home = tools("stale/bin/nvcc", NVCC)
    assert native.find_nvcc() == by_home


@pytest.mark.parametrize(
    "environment, passed",
    [
        ({}, True),
        ({"CXX": "ccache {cxx} -O1"}, True),
        ({"NVCC_CCBIN": "/usr/bin/g++-12"}, False),
        ({"NVCC_PREPEND_FLAGS": "-ccbin=/conda/bin/c++"}, False),
        ({"NVCC_APPEND_FLAGS": "--compiler-bindir /conda/bin"}, False),
        ({"NVCC_APPEND_FLAGS": "-lineinfo"}, True),
    ],
)
def test_nvcc_takes_our_compiler_unless_told_another(tools, tmp_path, monkeypatch, environment, passed):
    cxx = tools("g++", "echo g++ 12")
    tools("ccache", "")
    tools("nvcc", f'echo "$*" >> {tmp_path}/calls\n{NVCC}')
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(cxx=cxx))
    assert native.find_cuda()["host"] == (["-ccbin", cxx] if passed else [])
    compiles = [call for call in (tmp_path / "calls").read_text().splitlines() if "kernel.cu" in call]
    assert len(compiles) == 1
    assert (f"-ccbin {cxx}" in compiles[0]) == passed


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"MAX_JOBS": "1"}, 1),
        ({"MAX_JOBS": "10"}, 1),
        ({"MAX_JOBS": "20"}, 2),
        ({"MAX_JOBS": "1", "NVCC_THREADS": "3"}, 3),
    ],
)
def test_nvcc_has_no_more_threads_than_there_are_jobs(tools, monkeypatch, environment, threads):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert native.nvcc_threads(files=10) == threads


# A compiler that writes nothing but empty files, and refuses to where an argument did not arrive as it was meant.
COMPILER = """case "$*" in *--version*) echo compiler 12;; esac
while [ $# -gt 0 ]; do
    case "$1" in
    -o) : > "$2";;
    -c) [ -e "$2" ] || { echo "error: there is no file $2"; exit 1; };;
    -I*) [ -d "${1#-I}" ] || { echo "error: there is no folder ${1#-I}"; exit 1; };;
    esac
    shift
done
"""


@pytest.fixture
def tree(tools, tmp_path):
    """What setup.py needs of the tree, in a folder with a name that ninja and shells would take apart."""
    tree = tmp_path / "a b$c:d"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "seemore_fast/__init__.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for folder in ("kernels", "benchmarks"):
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").touch()
    tools("cat", f'exec {shutil.which("cat", path=os.defpath)} "$@"')
    return tree


def built_in(tree):
    """Return the libraries that `setup.py build` made, and what it wrote of them."""
    package = tree / "out/seemore_fast"
    return {path.name.partition(".")[0] for path in package.glob("*.so")}, json.loads(
        (package / "build_info.json").read_text()
    )


def test_paths_with_special_characters(tools, tree):
    cxx = tools("x y/g++", COMPILER)
    tools("nvcc", NVCC.replace("esac", f"*) {COMPILER};;\nesac"))
    status, printed = setup("build", "--build-lib", "out", folder=tree, CXX=f"'{cxx}' '-DTWO=a b'")
    assert status == 0, printed
    libraries, info = built_in(tree)
    assert {"libseemore_cpu", "libseemore_cuda"} <= libraries
    assert info["nvcc"] == "13.0"
    assert info["cuda_architectures"] == ["8.0", "9.0", "12.0+PTX"]
    assert info["instruction_sets"] == list(native.INSTRUCTION_SETS)
    assert info["left_out"] == {"cuda_architectures": "nvcc 13.0 or the kernels do not have 7.5 8.6 8.9 10.0"}


def test_cuda_kernels_that_do_not_compile_cost_only_their_library(tools, tree, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "-j2 --jobserver-auth=3,4")  # as under `make -j`, whose descriptors are not there
    tools("g++", COMPILER)
    fails = "case $* in */sums.cu*) echo 'sums.cu(3): error: no such thing' >&2; exit 1;; esac"
    tools("nvcc", NVCC.replace("esac", f"*) {fails}\n{COMPILER};;\nesac"))
    status, printed = setup("build", "--build-lib", "out", folder=tree)
    assert status == 0, printed
    libraries, info = built_in(tree)
    assert "libseemore_cpu" in libraries
    assert "libseemore_cuda" not in libraries
    reason = "libseemore_cuda.so does not compile: sums.cu(3): error: no such thing"
    assert info["left_out"]["libseemore_cuda"] == reason
    assert (info["nvcc"], info["cuda_architectures"]) == (None, [])
    assert f"seemore-fast: the CUDA library is left out: {reason}" in printed
    status, printed = setup("build", "--build-lib", "demanded", folder=tree, SEEMORE_FAST_CUDA="1")
    assert status != 0
    assert f"SEEMORE_FAST_CUDA=1, but {reason}" in printed


def test_cpu_kernels_that_do_not_compile_are_an_error(tools, tree):
    fails = "case $* in */router.cpp*) echo 'router.cpp:3: error: no such thing' >&2; exit 1;; esac\n"
    tools("g++", fails + COMPILER)
    status, printed = setup("build", "--build-lib", "out", folder=tree)
    assert status != 0
    assert "does not compile: router.cpp:3: error: no such thing" in printed


def test_a_library_in_use_is_replaced_and_not_overwritten(tools, tree):
    """A process that has mapped it goes on with the old one."""
    tools("g++", COMPILER)
    assert setup("build_ext", "--inplace", folder=tree)[0] == 0
    library = tree / "seemore_fast/libseemore_cpu.so"
    with open(library) as mapped:
        built = tree / "build" / f"native-{sys.implementation.cache_tag}" / library.name
        built.write_text("newer")
        os.utime(built, (2**31, 2**31))
        assert setup("build_ext", "--inplace", folder=tree)[0] == 0
        assert mapped.read() == ""
    assert library.read_text() == "newer"
    assert json.loads((library.parent / "build_info.json").read_text())["left_out"].keys() == {"libseemore_cuda"}


@pytest.mark.parametrize(
    "switches, reason",
    [({}, "there is no C++ compiler 'g++'"), ({"SEEMORE_FAST_NATIVE": "0"}, "switched off by SEEMORE_FAST_NATIVE=0")],
)
def test_a_pure_build_says_why_it_is_one(tools, tree, switches, reason):
    (tree / "seemore_fast/build_info.json").write_text('{"left_out": {}}')  # of an earlier build in the tree
    status, printed = setup("build", "--build-lib", "out", folder=tree, **switches)
    assert status == 0, printed
    libraries, info = built_in(tree)
    assert libraries == set()
    assert info["left_out"].keys() == {"libseemore_cpu", "libseemore_cuda"}
    assert all(why.startswith(reason) for why in info["left_out"].values())


def test_products():
    with_headers, without = {"has_python_headers": True}, {"has_python_headers": False}
    assert native.products(None, None) == []
    assert native.products(with_headers, None) == ["_C", "libseemore_cpu"]
    assert native.products(without, {}) == ["libseemore_cpu"]
    assert native.products(with_headers, {"nvcc": "nvcc"}) == ["_C", "libseemore_cpu", "libseemore_cuda"]


def test_what_is_promised_is_what_is_built_for():
    """The oldest torch stands in pyproject.toml alone; its stable ABI is what all libraries are compiled for."""
    text = (ROOT / "pyproject.toml").read_text()
    major, minor = native.oldest_torch()
    assert set(re.findall(r'"torch\b[^"]*"', text)) == {f'"torch>={major}.{minor}"'}
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"
    for device in ("cpu", "cuda"):
        assert target in native.flags_with_torch(device, Path("headers"), ["portable"])
    assert target == cuda_host.TARGET
    assert f"PyTorch {major}.{minor}+" in (ROOT / "README.md").read_text()
