"""How the native libraries are built: finds the tools, writes a ninja file, runs it. Called by setup.py."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

CSRC = Path(__file__).parent.resolve()
PYTHON_HEADERS = sysconfig.get_paths()["include"]
TOOLKITS = ["/usr/local/cuda", "/opt/cuda"]  # where nvcc lies that is not on PATH; and pip's packages, the newest first
TOOLKITS += sorted(map(str, Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*")), reverse=True)
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
INSTRUCTION_SETS = {"portable": ""}  # best last
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"
# Every other source in cpu/ is compiled once per instruction set.
ONCE = {"dispatch.cpp", "parallel.cpp", "route.cpp", "sums.cpp"}

RULES = """
rule cxx
  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out 2> $out.ptxas || (cat $out.ptxas; false)
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $flags
rule embed
  command = (echo 'R"ptxas('; cat $in; echo ')ptxas"') > $out
rule stub
  command = $cxx -x c -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out
"""


class Missing(Exception):
    """Something that a build needs is not here; the message says what, and how to get it."""


def output_of(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{shlex.join(command)} fails: {done.stderr.strip() or done.returncode}")
    return done.stdout


def find_toolchain() -> dict:
    """Return what the CPU library is built with: compiler, instruction sets it knows, ninja, torch, pybind11."""
    newer = "install GCC 12 or Clang 15, or newer, or set CXX"
    if os.name == "nt":
        raise Missing("on Windows there is no build of them: the kernels need the vector types of GCC and Clang")
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or "g++"]
    if not shutil.which(compiler[0]):
        raise Missing(f"there is no C++ compiler {compiler[0]!r}: {newer}")
    try:
        import ninja
        import pybind11
        import torch
    except ImportError as error:
        raise Missing(f"{error}: pip install ninja pybind11 torch") from None

    def compiles(flags: str) -> bool:
        command = [*compiler, "-std=c++17", *flags.split(), "-fsyntax-only", "-x", "c++", "-"]
        source = b"static_assert(__has_builtin(__builtin_shufflevector));"
        return subprocess.run(command, input=source, capture_output=True).returncode == 0

    sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if compiles(flags)}
    if not sets:
        raise Missing(f"{shlex.join(compiler)} is too old: {newer}")
    return {
        "compiler": shlex.join(compiler),
        "version": output_of(*compiler, "--version").splitlines()[0],
        "instruction_sets": sets,
        "ninja": Path(ninja.BIN_DIR, "ninja"),
        "torch": Path(torch.__file__).parent,
        "torch_version": torch.__version__,
        "pybind11": pybind11.get_include(),
        "has_python_headers": Path(PYTHON_HEADERS, "Python.h").exists(),
    }


def find_nvcc() -> str | None:
    """Return nvcc out of CUDA_HOME, CUDA_PATH, PATH or TOOLKITS, None where there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    before, after = ([f"{home}/bin" for home in folders] for folders in (homes, TOOLKITS))
    return shutil.which("nvcc", path=os.pathsep.join([*before, os.environ.get("PATH", os.defpath), *after]))


def find_cuda() -> dict:
    """Return what the CUDA library is built with: nvcc, its version, flags by architecture."""
    nvcc = find_nvcc()
    if not nvcc:
        raise Missing("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to it")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    known = output_of(nvcc, "--list-gpu-code").split()
    architectures = {}
    for number, ptx in re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", wanted):
        sm = number.replace(".", "")
        if f"sm_{sm.rstrip('af')}" in known:
            code = f"[sm_{sm},compute_{sm}]" if ptx else f"sm_{sm}"
            architectures[number + ptx] = f"-gencode arch=compute_{sm},code={code}"
    if not architectures:
        raise Missing(f"{nvcc} knows none of the architectures {wanted}, but {' '.join(known)}")
    # nvcc may be a wrapper: what it would run says where the toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    return {
        "nvcc": nvcc,
        "version": re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1],
        "libraries": re.search(r"LIBRARIES=(.*)", dry_run)[1],
        "architectures": architectures,
    }


def products(toolchain: dict | None, cuda: dict | None) -> list[str]:
    """Return the names of what `build` makes."""
    if not toolchain:
        return []
    return ["_C"] * toolchain["has_python_headers"] + ["libseemore_cpu"] + ["libseemore_cuda"] * bool(cuda)


def operators(device: str) -> list[str]:
    """Return the operators that a library has: kernels in the folder of its device, and bindings."""
    stems = {source.stem for source in (CSRC / device).iterdir()}
    return sorted(source.stem for source in (CSRC / "bindings").glob("*.cpp") if source.stem in stems)


def build(folder: Path, toolchain: dict, cuda: dict | None, names: list[str] | None = None) -> dict[str, Path]:
    """Build in `folder` what changed since the last time, all products or those named; return the files by name."""
    torch, sets = toolchain["torch"], toolchain["instruction_sets"]
    with_torch = f"-O2 -DTORCH_TARGET_VERSION=0x020a000000000000ULL -isystem {torch}/include"  # loads in torch >= 2.10
    # IEEE results but for fused multiply-add; errno and traps, which nobody looks at, would keep loops scalar.
    kernel = "-O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    lines = [
        f"cxx = {toolchain['compiler']}",
        f"cflags = -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -I{CSRC}",
    ]
    if cuda:
        architectures = " ".join(cuda["architectures"].values())
        lines.append(f"nvcc = {cuda['nvcc']}")
        lines.append(f"nvccflags = -std=c++17 -O3 --threads 4 -Xptxas -v -I{CSRC} {architectures} $")
        lines.append("  -Xcompiler -fPIC,-fvisibility=hidden")
    lines.append(RULES)

    def compile(source, name: str, flags: str) -> str:
        lines.append(f"build {name}.o: cxx {CSRC / source}\n  flags = {flags}")
        return f"{name}.o"

    def compile_bindings(device: str) -> list[str]:
        """Those of the operators for which `device` has kernels."""
        flags = f"{with_torch} -I{CSRC}/{device} -I{CSRC}/bindings"
        sources = [f"bindings/{operator}.cpp" for operator in operators(device)]
        return [compile(source, f"{device}_bindings_{Path(source).stem}", flags) for source in sources]

    def link(name: str, objects: list[str], flags: str):
        lines.append(f"build {name}.so: link {' '.join(objects)}\n  flags = {flags}")

    choices = " ".join(f"X({name})" for name in sets)
    objects = compile_bindings("cpu")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in ONCE:
            flags = f"{with_torch} -DSEEMORE_INSTRUCTION_SETS='{choices}'"
            objects.append(compile(source, f"cpu_{source.stem}", flags))
        else:
            for name, flags in sets.items():
                flags = f"{kernel} -DSEEMORE_ISA={name} {flags}"
                objects.append(compile(source, f"cpu_{source.stem}_{name}", flags))
    link("libseemore_cpu", objects, f"-L{torch}/lib -ltorch_cpu")

    if cuda:
        objects = [*compile_bindings("cuda"), compile("cuda/library.cpp", "cuda_library", with_torch)]
        kernels = {f"cuda_{source.stem}.o": source for source in sorted((CSRC / "cuda").glob("*.cu"))}
        lines += [f"build {name} | {name}.ptxas: nvcc {source}" for name, source in kernels.items()]
        lines.append(f"build ptxas.inc: embed {' '.join(f'{name}.ptxas' for name in kernels)}")
        objects += kernels
        lines.append(f"build libtorch_cuda.so: stub {CSRC}/cuda/libtorch_cuda_stub.c")
        flags = (
            f"-L{torch}/lib -ltorch_cpu {cuda['libraries']} -lcudart_static -lrt -lpthread -ldl -Wl,--exclude-libs,ALL"
        )
        link("libseemore_cuda", [*objects, "libtorch_cuda.so"], flags)

    if toolchain["has_python_headers"]:
        facts = {
            "COMPILER": toolchain["version"],
            "TORCH": toolchain["torch_version"],
            "INSTRUCTION_SETS": " ".join(sets),
            "NVCC": cuda["version"] if cuda else "",
            "ARCHITECTURES": " ".join(cuda["architectures"]) if cuda else "",
        }
        flags = f"-O2 -isystem {toolchain['pybind11']} -isystem {PYTHON_HEADERS}"
        flags += "".join(f" '-DSEEMORE_{name}=\"{value}\"'" for name, value in facts.items())
        objects = [compile("info.cpp", "info", flags)]
        objects.append(compile("ptxas_report.cpp", "ptxas_report", "-I. -DSEEMORE_PTXAS" if cuda else ""))
        if cuda:
            lines[-1] = lines[-1].replace("\n", " | ptxas.inc\n", 1)
        link("_C", objects, "-undefined dynamic_lookup" if platform.system() == "Darwin" else "")

    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*lines, ""])
    if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != text:
        (folder / "build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    built = {name: folder / f"{name}.so" for name in names or products(toolchain, cuda)}
    subprocess.run([toolchain["ninja"], "-C", folder, *jobs, *(path.name for path in built.values())], check=True)
    return built
