"""The build of the native libraries: finds the tools, writes a ninja file, runs it. Called by setup.py."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

CSRC = Path(__file__).parent.resolve()
PYTHON_HEADERS = sysconfig.get_paths()["include"]
CXXFLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}"]
INSTRUCTION_SETS = {"portable": ""}  # best last
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"
# Every other source in cpu/ is compiled once per instruction set.
ONCE = ("dispatch/dispatch.cpp", "tile/parallel.cpp", "ops/router_decision.cpp", "ops/sums.cpp")

CUDA_LIBRARY = "libseemore_cuda"
TOOLKITS = ["/usr/local/cuda", "/opt/cuda"]  # where nvcc lies that is not on PATH; and pip's packages, the newest first
TOOLKITS += sorted(map(str, Path(sysconfig.get_paths()["purelib"], "nvidia").glob("cu*")), reverse=True)
CUDA_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0+PTX 12.0+PTX"  # PTX of 12.0 does not serve 11.0
OLDEST_ARCHITECTURE = 75
FAMILIES = {  # as torch.utils.cpp_extension names them
    "maxwell+tegra": "5.3",
    "maxwell": "5.0 5.2+PTX",
    "pascal": "6.0 6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
}
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # before the compiler in CXX

RULES = """
rule cxx
  command = $cxx $cflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $nvccflags $flags -MD -MF $out.d -c $in -o $out 2> $out.ptxas || (cat $out.ptxas; false)
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $flags
rule stub
  command = $cxx -x c -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out
"""


class Missing(Exception):
    """Something that a build needs is not here or does not work; the message says what, and how to get it."""


def output_of(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{shlex.join(command)} fails: {first_lines(done.stderr) or done.returncode}")
    return done.stdout


def first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:400]


def oldest_torch() -> tuple[int, int]:
    """Return the oldest version of torch that pyproject.toml promises: the libraries keep to its stable ABI."""
    promise = re.search(r'"torch>=(\d+)\.(\d+)"', (CSRC.parent / "pyproject.toml").read_text())
    return int(promise[1]), int(promise[2])


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler."""
    if os.name == "nt":
        raise Missing("on Windows there is no build of them: the kernels need the vector types of GCC and Clang")
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or "g++"]
    if not shutil.which(compiler[0]):
        raise Missing(f"there is no C++ compiler {compiler[0]!r}: install GCC 12 or Clang 15, or newer, or set CXX")
    return compiler


def find_toolchain() -> dict:
    """Return what the CPU library is built with: compiler, instruction sets it knows, ninja, torch, pybind11."""
    compiler = find_compiler()
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
        raise Missing(f"{shlex.join(compiler)} is too old: install GCC 12 or Clang 15, or newer, or set CXX")
    return {
        "compiler": compiler,
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
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))}
    architectures, dropped = choose_architectures(wanted, known)
    if not architectures:
        names = " ".join(f"sm_{number}" for number in sorted(known))
        raise Missing(f"{nvcc} knows none of the architectures {wanted}, but {names}")
    version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
    if not version:
        raise Missing(f"{nvcc} --version names no release")
    host = host_compiler()
    # nvcc may be a wrapper: what it would run says where the toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", *host, "-c", "x.cu"], capture_output=True, text=True).stderr
    libraries = re.search(r"LIBRARIES=(.*)", dry_run)
    if not libraries:
        raise Missing(f"{nvcc} does not name its libraries: {first_lines(dry_run)}")
    check_nvcc([nvcc, *host, next(iter(architectures.values()))])
    return {
        "nvcc": nvcc,
        "host": host,
        "version": version[1],
        "libraries": shlex.split(libraries[1]),
        "architectures": architectures,
        "dropped": f"nvcc {version[1]} or the kernels do not have {' '.join(dropped)}" if dropped else None,
    }


def host_compiler() -> list[str]:
    """Return the options that make nvcc use our compiler, none where its own environment names another one."""
    flags = " ".join(os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"))
    if os.environ.get("NVCC_CCBIN") or re.search(r"-ccbin|--compiler-bindir", flags):
        return []
    return ["-ccbin", next(word for word in find_compiler() if Path(word).name not in LAUNCHERS)]


def check_nvcc(command: list[str]):
    """Raise Missing, with its first words, unless nvcc compiles a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text("#include <string>\n__global__ void kernel() {}\n")
        command = [*command, "-std=c++17", "-c", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = first_lines(done.stderr or done.stdout) or f"exit status {done.returncode}"
        mend = "set NVCC_CCBIN to a compiler that it supports, or CUDA_HOME to a toolkit that works"
        raise Missing(f"{shlex.join(command[:3])} compiles nothing ({mend}): {said}")


def choose_architectures(wanted: str, known: set[int]) -> tuple[dict[str, str], list[str]]:
    """Return nvcc's flag of each architecture to build, by name, and those wanted that are not known.

    Takes what torch's TORCH_CUDA_ARCH_LIST takes: 9.0, 9.0a, 12.0+PTX, Hopper, native; and All, 90, sm_90. Where PTX is
    wanted of an architecture that is not known, the newest known one has it.
    """
    chosen: dict[tuple[int, str], bool] = {}  # whether with PTX
    dropped, wants_ptx = [], False
    for number, suffix, ptx in parse_architectures(wanted, known):
        wants_ptx |= ptx
        if number not in known or number < OLDEST_ARCHITECTURE:
            dropped.append(f"{number // 10}.{number % 10}{suffix}")
        else:
            chosen[number, suffix] = ptx or chosen.get((number, suffix), False)
    if chosen and wants_ptx and not any(chosen.values()):
        chosen[max(chosen)] = True
    flags = {}
    for (number, suffix), ptx in sorted(chosen.items()):
        code = f"[sm_{number}{suffix},compute_{number}{suffix}]" if ptx else f"sm_{number}{suffix}"
        name = f"{number // 10}.{number % 10}{suffix}{'+PTX' * ptx}"
        flags[name] = f"-gencode=arch=compute_{number}{suffix},code={code}"
    return flags, dropped


def parse_architectures(wanted: str, known: set[int]) -> list[tuple[int, str, bool]]:
    """Return (number, suffix, with PTX) of each word; Missing for one that is not understood."""
    found = []
    for word in re.split(r"[;,\s]+", wanted.strip(";, \t\n")):
        name = word.lower()
        number = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+ptx)?", name)
        if number:
            found.append((int(number[1] + number[2]), number[3], bool(number[4])))
        elif name in FAMILIES:
            found += parse_architectures(FAMILIES[name], known)
        elif name in ("all", "native"):
            numbers = {n for n in known if n >= OLDEST_ARCHITECTURE} if name == "all" else visible_gpus(known)
            found += [(n, "", n == max(numbers)) for n in numbers]
        else:
            raise Missing(
                f"TORCH_CUDA_ARCH_LIST has {word!r}, expected numbers such as 9.0, 9.0a or 12.0+PTX, names such as "
                "Ampere or Hopper, All, or native"
            )
    return found


def visible_gpus(known: set[int]) -> set[int]:
    """Return the architectures of this machine's GPUs, or the newest before them that nvcc knows."""
    import torch

    gpus = {
        10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    }
    if not gpus:
        raise Missing("TORCH_CUDA_ARCH_LIST is native, but torch finds no GPU here: expected numbers such as 9.0")
    return {max((n for n in known if n <= gpu), default=gpu) for gpu in gpus}


def products(toolchain: dict | None, cuda: dict | None) -> list[str]:
    """Return the names of what `build` makes."""
    if not toolchain:
        return []
    return ["_C"] * toolchain["has_python_headers"] + ["libseemore_cpu"] + [CUDA_LIBRARY] * bool(cuda)


def facts(toolchain: dict | None, cuda: dict | None) -> dict:
    """Return what the products were built with, as build_info.json has it."""
    return {
        "compiler": toolchain and toolchain["version"],
        "torch": toolchain and toolchain["torch_version"],
        "instruction_sets": list(toolchain["instruction_sets"]) if toolchain else [],
        "nvcc": cuda and cuda["version"],
        "cuda_architectures": list(cuda["architectures"]) if cuda else [],
    }


def operators(device: str) -> list[str]:
    """Return the operators that a library has: those with bindings, and kernels or a folder of them for its device."""
    stems = {source.stem for folder in (CSRC / device, CSRC / device / "ops") for source in folder.iterdir()}
    return sorted(source.stem for source in (CSRC / "bindings").glob("*.cpp") if source.stem in stems)


def sources_with_torch(device: str) -> list[Path]:
    """Return those sources of a library, relative to csrc, that may include torch's headers."""
    rest = [f"cpu/{name}" for name in ONCE] if device == "cpu" else ["cuda/common/library.cpp"]
    return [Path("bindings", f"{operator}.cpp") for operator in operators(device)] + [Path(name) for name in rest]


def flags_with_torch(device: str, headers: Path, instruction_sets: list[str]) -> list[str]:
    """Return the flags of those sources; `headers` is the folder of torch's."""
    major, minor = oldest_torch()
    choices = " ".join(f"X({name})" for name in instruction_sets)
    return [
        "-O2",
        f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#018x}ULL",
        f"-DSEEMORE_INSTRUCTION_SETS={choices}",
        f"-DSEEMORE_DEVICE=<bindings/{device}_device.h>",
        "-isystem",
        str(headers),
    ]


def quoted(*words) -> str:
    """Return words as a value in a ninja file that the shell takes apart again."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escaped(path) -> str:
    """Return a path as it stands in a build line of a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def nvcc_flags(source: Path) -> list[str]:
    """Return nvcc's flags for one source. The network's kernels need all registers that two blocks leave them."""
    return ["-Xptxas", "--register-usage-level=0"] if source.parent.name == "network" else []


def nvcc_threads(files: int) -> int:
    """Return how many architectures nvcc compiles at a time: NVCC_THREADS, else what ninja's jobs leave over."""
    jobs = int(os.environ.get("MAX_JOBS") or (os.cpu_count() or 1) + 2)  # ninja's own default
    return int(os.environ.get("NVCC_THREADS") or -(-jobs // files))


def build(folder: Path, toolchain: dict, cuda: dict | None, names: list[str] | None = None) -> dict[str, Path]:
    """Build in `folder` what changed since the last time, all products or those named; return the files by name.

    Raises Missing, with the first error, where one does not compile.
    """
    torch, sets = toolchain["torch"], toolchain["instruction_sets"]
    # IEEE results but for fused multiply-add; errno and traps, which are not read, would keep loops scalar.
    kernel = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    lines = [f"cxx = {quoted(*toolchain['compiler'])}", f"cflags = {quoted(*CXXFLAGS)}"]
    kernels = {f"cuda_{source.stem}.o": source for source in sorted((CSRC / "cuda").rglob("*.cu"))}
    if cuda:
        nvccflags = ["-std=c++17", "-O3", "--threads", nvcc_threads(len(kernels)), "-Xptxas", "-v", f"-I{CSRC}"]
        nvccflags += [*cuda["host"], *cuda["architectures"].values(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        lines += [f"nvcc = {quoted(cuda['nvcc'])}", f"nvccflags = {quoted(*nvccflags)}"]
    lines.append(RULES)

    def compile(source, name: str, *flags) -> str:
        lines.append(f"build {name}.o: cxx {escaped(CSRC / source)}\n  flags = {quoted(*flags)}")
        return f"{name}.o"

    def compile_with_torch(device: str) -> list[str]:
        flags = flags_with_torch(device, torch / "include", list(sets))
        sources = sources_with_torch(device)
        names = [f"{device}_{source.parent.name}_{source.stem}" for source in sources]
        return [compile(source, name, *flags) for source, name in zip(sources, names, strict=True)]

    def link(name: str, objects: list[str], *flags):
        lines.append(f"build {name}.so: link {' '.join(objects)}\n  flags = {quoted(*flags)}")

    objects = compile_with_torch("cpu")
    for source in sorted((CSRC / "cpu").rglob("*.cpp")):
        if str(source.relative_to(CSRC / "cpu")) not in ONCE:
            for name, flags in sets.items():
                flags = [*kernel, f"-DSEEMORE_ISA={name}", *flags.split()]
                objects.append(compile(source, f"cpu_{source.stem}_{name}", *flags))
    link("libseemore_cpu", objects, f"-L{torch}/lib", "-ltorch_cpu")

    if cuda:
        objects = [*compile_with_torch("cuda"), *kernels, "libtorch_cuda.so"]
        for name, source in kernels.items():
            lines.append(
                f"build {name} | {name}.ptxas: nvcc {escaped(source)}\n  flags = {quoted(*nvcc_flags(source))}"
            )
        lines.append(f"build libtorch_cuda.so: stub {escaped(CSRC / 'cuda/common/libtorch_cuda_stub.c')}")
        system = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
        link(CUDA_LIBRARY, objects, f"-L{torch}/lib", "-ltorch_cpu", *cuda["libraries"], *system)

    if toolchain["has_python_headers"]:
        objects = [compile("info.cpp", "info", "-O2", "-isystem", toolchain["pybind11"], "-isystem", PYTHON_HEADERS)]
        link("_C", objects, *(["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []))

    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*lines, ""])
    if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != text:
        (folder / "build.ninja").write_text(text)
    built = {name: folder / f"{name}.so" for name in names or products(toolchain, cuda)}
    run_ninja(toolchain["ninja"], folder, [path.name for path in built.values()])
    return built


def run_ninja(ninja: Path, folder: Path, targets: list[str]):
    """Make the targets; print what ninja does, and raise Missing with the first error."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja, "-C", folder, *jobs, *targets]
    # `make -j` above offers ninja a jobserver by descriptors that do not reach it: ninja would end with an error
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    error = None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            if error is None and re.search(r"\berror(\s*| #\w+):|\bfatal\b|cannot find -l|undefined reference", line):
                error = line.strip()
    if running.returncode:
        raise Missing(f"{', '.join(targets)} does not compile: {error or f'exit status {running.returncode}'}")
