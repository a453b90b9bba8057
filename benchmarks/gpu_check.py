"""Measure, test and tune on a machine with an NVIDIA GPU, in one call of ten minutes: `make gpu-check`.

    make gpu-check OUTPUT=folder                      or: python benchmarks/gpu_check.py --output folder
    make gpu-check QUICK=1                            in three minutes: the network's figures, and its tests
    make gpu-check ONLY="kernels tune_triton"         the steps with one of these texts in their names, and the build

In this order:
  1. inference and a training step of the network on Triton's kernels, alone on the machine;
  2. in parallel, the build of the CUDA library for this GPU and Triton's tests, then the tests of the CUDA library and
     of the network, and compute-sanitizer; failed tests of Triton's kernels run again with other instructions and
     another ptxas: if they pass then, the compiler is at fault;
  3. the tuning of backends, whose result is used by all that follows;
  4. the network's figures, tests that need most of the memory, and operators, as time permits.

It needs Python 3.11 or newer with torch, triton, ninja, pybind11, numpy and pytest, and installs nothing: the package
is laid out in build/gpu-check/package, with links to the sources. It needs no network and no pip. Without nvcc, or with
a library that does not build or load, everything else runs. A step that fails or is too slow does not stop the others.

The folder of --output contains one file from the start, results.tgz, rewritten after each step and every 15 seconds: a
kill loses nothing. Unpacked in the root of the tree, it puts figures into benchmarks/results/<gpu>/, logs into
build/gpu-check/ and the table of backends into seemore_fast/preferences.json. gpu_check.json among the figures contains
the outcome of every step. Without .git, SEEMORE_FAST_COMMIT names the commit.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script, without the package
    sys.path.insert(0, str(ROOT))
    __package__ = "benchmarks"

from .steps import Runner, Step, archive, slug  # noqa: E402

LOGS = ROOT / "build" / "gpu-check"
PACKAGE = LOGS / "package" / "seemore_fast"
PREFERENCES = ROOT / "seemore_fast" / "preferences.json"
RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = "libseemore_cuda"
TRITON = "tests of triton"  # beginning of the names of steps that run again with another compiler
ENVIRONMENT = {
    # The package that is laid out, not the tree's folder of the same name in the current folder
    "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",  # logs contain the output of killed steps
    "SEEMORE_FAST_PREFERENCES": str(PREFERENCES),  # only the result of this tuning is used
    "TRITON_CACHE_DIR": str(LOGS / "triton"),
}
# Operators, each with Triton's kernels in the file of its name. A kernel takes 0.4 s to compile, and 700 are tested of
# one operator: its tests run in PARTS parts.
OPERATORS = sorted(
    path.stem for path in (ROOT / "kernels").glob("[!_]*.py") if (ROOT / "seemore_fast" / "ops" / path.name).exists()
)
PARTS = 3
OTHERS = ["conformance", "layer_norm", "blocks"]
PHOTO, BF16 = ["--case", "1x36x480x640*bf16"], ["--case", "bf16"]
INFERENCE = ["--case", "T x4 640x480 bf16"]
LIMITED = "2_to_31 or out_of_memory"  # tests that need most of the GPU's memory, and run alone
BUDGET_S, QUICK_BUDGET_S = 570, 170
MAX_CACHE = 48 * 2**20  # bytes of compiled kernels that the archive may contain


@functools.cache
def native():
    """Return csrc/native_build.py, which finds the tools and builds with them."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "native_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str | None:
    """Return the path of a tool of the CUDA toolkit: beside nvcc, on PATH, or in a toolkit's usual place."""
    beside = [str(Path(nvcc).parent)] if (nvcc := native().find_nvcc()) else []
    folders = [*beside, os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in native().TOOLKITS)]
    return shutil.which(name, path=os.pathsep.join(folders))


# The steps


def script(name: str, *options: str, seconds: int, title: str = "", optional: bool = False) -> Step:
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    return Step(title or f"benchmark {name}", command, seconds, optional)


def pytest(name: str, stems: list[str], *options: str, seconds: int = 240, **more) -> Step:
    """Return a step of tests, whose log has the outcome of each test as it ends, and the reasons of failures."""
    files = [f"tests/test_{stem}.py" for stem in stems]
    cache = f"cache_dir={LOGS / 'pytest' / slug(name)}"  # for --last-failed
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb", "short", "--maxfail", "20", "--durations", "5"]
    return Step(name, [*command, "-o", cache, "--device", "cuda", *files, *options], seconds, **more)


def sanitizer(name: str, *options: str) -> Step:
    found = tool("compute-sanitizer")
    if not found:
        return Step(name, "there is no compute-sanitizer beside nvcc or on PATH", 0)
    step = pytest(name, ["gpu"], "-k", "small_shapes and not triton", after="build")
    # every tensor is an allocation of its own: an access beyond its end is out of bounds
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [found, "--tool", name, "--error-exitcode", "1", *options, *step.command]
    return step._replace(command=command, environment=environment)


def figures() -> list[Step]:
    """Return the two most important benchmarks with the fewest options."""
    found = []
    for name, case, seconds in (("inference", INFERENCE, 60), ("training", BF16, 95)):
        options = ["--device", "cuda", "--no-compile", "--runs", "10", "--results", str(RESULTS)]
        options += [*case, "--name", f"first_{name}"]
        found.append(script(name, *options, seconds=seconds, title=f"benchmark of {name}, first"))
    return found


def build_step(capability: tuple[int, int]) -> Step:
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip()  # source lines for profiler and sanitizer
    environment = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability), "NVCC_APPEND_FLAGS": flags}
    return Step("build", [sys.executable, __file__, "--build"], 240, environment=environment)


def network_tests() -> list[Step]:
    return [
        pytest(f"{TRITON}, network", ["triton_network", "recompute"], "-k", "not compiled"),
        pytest("tests of the network", ["gpu_network"], "-k", f"not ({LIMITED})", after="build"),
        pytest("tests of training steps", ["gpu_training"], after="build"),
    ]


def tests() -> list[Step]:
    """Return steps that run in parallel: nothing in them is timed."""
    without_triton = "-k", "not triton and not cuda_host"
    parts = [f"{part}/{PARTS}" for part in range(1, PARTS + 1)]
    return [
        *network_tests(),
        *(
            pytest(f"tests of cuda {part}", [*OPERATORS, *OTHERS], *without_triton, "--part", part, after="build")
            for part in parts
        ),
        pytest("tests of the GPU", ["gpu"], "-k", f"not ({LIMITED})", after="build"),
        sanitizer("memcheck", "--report-api-errors", "no"),
        sanitizer("racecheck"),
        *(
            pytest(f"{TRITON}, {stem} {part}", ["conformance", stem], "-k", f"triton and {stem}", "--part", part)
            for stem in OPERATORS
            for part in parts
        ),
        pytest("tests of the model", ["model"], *without_triton, after="build"),
    ]


def again(steps: list[Step], results: list[dict]) -> list[Step]:
    """Return steps that repeat the failed tests of Triton's kernels with other machine code for the same kernels.

    Products are mma.sync instead of wgmma or tcgen05, assembled by the toolkit's ptxas instead of Triton's, or by
    Triton's without optimization if there is no other.
    """
    ptxas = tool("ptxas")
    assembler = dict.fromkeys(["TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"], ptxas)
    environment = {"DISABLE_MMA_V3": "1", "DISABLE_MMA_V5": "1"}
    environment |= assembler if ptxas else {"DISABLE_PTXAS_OPT": "1"}
    started = "failed: exit status", "failed: not done"
    failed = {result["step"] for result in results if result["outcome"].startswith(started)}
    options = ["--last-failed", "--last-failed-no-failures", "none"]
    return [
        step._replace(name=f"{step.name}, other compiler", command=[*step.command, *options], environment=environment)
        for step in steps
        if step.name in failed and step.name.startswith(TRITON)
    ]


def tuning() -> list[Step]:
    options = ["--device", "cuda", "--runs", "5", "--output", str(PREFERENCES)]
    return [script("tune_backends", *options, seconds=100)]


def benchmarks() -> list[Step]:
    """Return steps that run one after another, the most important ones first."""
    timed = partial(script, optional=True)
    device, network = ["--device", "cuda"], (("inference", INFERENCE, 110), ("training", BF16, 90))
    written = [*device, "--compile", "--results", str(RESULTS)]
    steps = [timed(name, *device, "--no-compile", "--runs", "10", seconds=seconds) for name, _, seconds in network]
    limited = pytest("tests of the memory's limit", ["gpu", "gpu_network"], "-k", LIMITED, seconds=120)
    steps.append(limited._replace(optional=True))
    for name, case, _ in network:
        options = [*written, *case, "--runs", "10", "--name", f"{name}_compiled"]
        steps.append(timed(name, *options, seconds=100, title=f"benchmark {name}, torch.compile"))
    for name in OPERATORS:
        options = [*device, "--operators", name]
        steps.append(timed("operators", *options, seconds=60, title=f"benchmark kernels {name}"))
    for name in OPERATORS:
        options = [*written, *PHOTO, "--operators", name, "--name", f"{name}_compiled"]
        title = f"benchmark kernels {name}, torch.compile"
        steps.append(timed("operators", *options, seconds=90, title=title))
    steps.append(timed("gpu_dry_run", "--json", seconds=60))
    steps.append(timed("tune_triton", "--seconds", "100", "--output", str(LOGS / "configurations.json"), seconds=120))
    return steps


# The package


def lay_out():
    """Make a package of links to the sources, as setup.py would, without libraries."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    excluded = "__pycache__", "build_info.json"  # the second is about the tree's own libraries
    sources = [p for p in (ROOT / "seemore_fast").iterdir() if p.suffix != ".so" and p.name not in excluded]
    for path in [*sources, ROOT / "kernels", ROOT / "benchmarks"]:
        (PACKAGE / path.name).symlink_to(path)


def build():
    """Compile the CUDA library for TORCH_CUDA_ARCH_LIST and put it into the package, if it loads there."""
    try:
        toolchain, cuda = native().find_toolchain(), native().find_cuda()
        names = [name for name in native().products(toolchain, cuda) if name != "libseemore_cpu"]
        built = native().build(LOGS / "native", toolchain, cuda, names)
    except (native().Missing, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no CUDA library, Triton's kernels are used instead: {error}") from None
    for name in names:
        shutil.copy2(built[name], PACKAGE / f"{name}.so")
    info = native().facts(toolchain, cuda) | {"left_out": {"libseemore_cpu": "gpu-check builds for the GPU alone"}}
    (PACKAGE / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    question = "import torch; from seemore_fast import backends"
    question += "; raise SystemExit(backends.unsupported_reason('cuda', torch.device('cuda', 0)))"
    if subprocess.run([sys.executable, "-c", question]).returncode:
        (PACKAGE / f"{LIBRARY}.so").unlink()
        raise SystemExit(f"{LIBRARY}.so was built but does not load, Triton's kernels are used instead")


# Results


def machine(torch) -> dict:
    """Return the GPU and the versions of software, on which the outcomes depend."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": last_line(query),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "nvcc": last_line([tool("nvcc") or "nvcc", "--version"]),
        "commit": last_line(["git", "rev-parse", "HEAD"]) or os.environ.get("SEEMORE_FAST_COMMIT"),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_line(command: list[str]) -> str | None:
    """Return the last line that a command prints; None if it is missing or fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line for line in reversed(lines) if line), None)


def archived_files(folder: Path) -> Iterator[Path]:
    """Yield figures, logs, results of the tuning and, unless they are too many, compiled kernels."""
    yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from sorted(LOGS.glob("*.log"))
    yield from (path for path in (PREFERENCES, LOGS / "configurations.json") if path.exists())
    kernels = list((LOGS / "triton").glob("*/*"))
    if sum(map(size, kernels)) <= MAX_CACHE:
        yield from kernels


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a temporary file of a running step
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=LOGS, help="folder of results.tgz (default: build/gpu-check)")
    parser.add_argument("--seconds", type=float, help=f"limit of the whole run (default: {BUDGET_S})")
    parser.add_argument("--quick", action="store_true", help=f"run the network's steps alone, in {QUICK_BUDGET_S} s")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="run only steps with one of these in their names")
    parser.add_argument("--build", action="store_true", help="only build, for TORCH_CUDA_ARCH_LIST")
    options = parser.parse_args()
    if options.build:
        return build()
    start = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the steps inherit it, even if a shell ignored it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # ends the steps, too
    import torch  # not needed for --help

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here")
    facts = machine(torch)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    folder = RESULTS / slug(facts["device"]).lower()
    for needed in (folder, LOGS, options.output):
        needed.mkdir(parents=True, exist_ok=True)

    def save(results: list[dict]):
        outcomes = facts | {"seconds": round(time.monotonic() - start, 1), "steps": results}
        kind = "_quick" if options.quick else "_only" if options.only else ""
        try:
            (folder / f"gpu_check{kind}.json").write_text(json.dumps(outcomes, indent=2) + "\n")
            archive(options.output / "results.tgz", ROOT, archived_files(folder))
        except OSError as error:  # a full disk does not stop the run
            print(f"not saved: {error}", flush=True)

    for log in [] if options.only else LOGS.glob("*.log"):  # of an earlier run
        log.unlink()
    save([])
    lay_out()
    deadline = start + (options.seconds or (QUICK_BUDGET_S if options.quick else BUDGET_S))
    runner = Runner(ROOT, LOGS, deadline, ENVIRONMENT, save)

    def chosen(steps: list[Step]) -> list[Step]:
        return [step for step in steps if not options.only or any(text in step.name for text in options.only)]

    try:
        for step in chosen(figures()):
            runner.run([step])
        tested = chosen(network_tests() if options.quick else tests())
        results = runner.run([build_step(facts["capability"]), *tested], share=1 if options.quick else 0.5)
        runner.run(again(tested, results), share=0.3)
        for step in chosen([] if options.quick else [*tuning(), *benchmarks()]):
            runner.run([step])
    finally:  # after an interrupt, too
        save(runner.results)
    print(
        f"\n{time.monotonic() - start:.0f} s in total, figures in {folder}, everything in {options.output}/results.tgz"
    )
    for result in runner.results:
        print(f"{result['seconds']:8.1f} s  {result['step']}: {result['outcome']}; {result['last_line']}")
    raise SystemExit(any(result["outcome"].startswith("failed") for result in runner.results))


if __name__ == "__main__":
    main()
