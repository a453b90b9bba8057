"""Measure, test and tune on a machine with an NVIDIA GPU, in one call of ten minutes: `make gpu-check`.

    make gpu-check OUTPUT=folder                      or: python benchmarks/gpu_check.py --output folder
    make gpu-check QUICK=1                            in three minutes: the network's figures, and its tests
    make gpu-check ONLY="bench_ tune_triton"          the steps with one of these texts in their names, and the build

In this order:
  1. an inference and a training step of the network on Triton's kernels, alone on the machine;
  2. side by side, the build of the CUDA library for this GPU, Triton's tests meanwhile, then the CUDA library's, the
     network's, and compute-sanitizer; tests of Triton's kernels that fail run again with other instructions and another
     ptxas: those that pass then are the compiler's fault and not ours;
  3. the tuning of backends, whose result all that follows uses;
  4. the network's figures, tests that need most of the memory, and operators, as long as there is time.

The Python that runs it is 3.11 or newer, has torch, triton, ninja, pybind11, numpy and pytest, and is left as it is:
the package is laid out in build/gpu-check/package, with links to the sources. Needs no network and no pip. Without nvcc
or with a library that does not build or load, all the rest runs. A step that fails or is too slow stops no other.

The folder of --output has one file, results.tgz, from the start, written anew after each step and every 15 seconds: a
kill loses nothing that was there. Unpacked in the root of the tree it puts figures into benchmarks/results/<gpu>/, logs
into build/gpu-check/, the table of backends to seemore_fast/preferences.json. gpu_check.json among the figures has the
outcome of every step. Where there is no .git, SEEMORE_FAST_COMMIT tells which commit this is.
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
TRITON = "tests of triton"  # how the names of those steps begin that run again with another compiler
ENVIRONMENT = {
    # The package that is laid out, not the tree's folder of the same name, which Python would find in the current one
    "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",  # what a killed step printed is in its log
    "SEEMORE_FAST_PREFERENCES": str(PREFERENCES),  # what is tuned here counts here, and nothing else
    "TRITON_CACHE_DIR": str(LOGS / "triton"),
}
# Operator: in how many parts its tests of Triton run. A kernel takes 0.4 s to compile, and 6 s the gradients of
# gated_ffn's gate: about 700 for striped_conv, 380 for calibrate, and of those of 6 s 12 for gated_ffn.
PARTS = {
    "norm_pointwise": 1,
    "norm_conv3x3": 4,
    "gated_ffn": 3,
    "low_rank_experts": 2,
    "router": 1,
    "calibrate": 3,
    "striped_conv": 4,
}
OTHERS = ["layer_norm", "pointwise", "conv3x3_shuffle", "rme_block", "sme_block"]
PHOTO, BF16 = "1x36x480x640 bf16", ["--case", "bf16"]
BENCHMARKED = {  # operator, what takes longest first: the case in which torch.compile is timed, too
    "gated_ffn": PHOTO,
    "norm_conv3x3": PHOTO,
    "striped_conv": "1x36x480x640 K=11 bf16",
    "calibrate": "1x36x480x640 recursive=2 bf16",
    "norm_pointwise": PHOTO,
    "low_rank_experts": PHOTO,
    "router": PHOTO,
}
INFERENCE = ["--case", "T x4 640x480 bf16"]
LIMITED = "2_to_31 or out_of_memory"  # tests that want most of the GPU's memory: alone on it
SECONDS, QUICK_SECONDS = 570, 170
LARGEST_CACHE = 48 * 2**20  # bytes of compiled kernels that are brought along


@functools.cache
def native():
    """Return csrc/build.py, which knows where the tools are and builds with them."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str) -> str | None:
    """Return the path of a tool of the CUDA toolkit: beside nvcc, on PATH, or where nvcc is looked for."""
    beside = [str(Path(nvcc).parent)] if (nvcc := native().find_nvcc()) else []
    folders = [*beside, os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in native().TOOLKITS)]
    return shutil.which(name, path=os.pathsep.join(folders))


# The steps


def script(name: str, *options: str, seconds: int, title: str = "", optional: bool = False) -> Step:
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    return Step(title or f"benchmark {name}", command, seconds, optional)


def pytest(name: str, stems: list[str], *options: str, seconds: int = 240, **more) -> Step:
    """Return a step of tests; its log names each as it ends, and has why those failed that did."""
    files = [f"tests/test_{stem}.py" for stem in stems]
    cache = f"cache_dir={LOGS / 'pytest' / slug(name)}"  # has which failed
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb", "short", "--maxfail", "20", "--durations", "5"]
    return Step(name, [*command, "-o", cache, "--device", "cuda", *files, *options], seconds, **more)


def sanitizer(name: str, *options: str) -> Step:
    found = tool("compute-sanitizer")
    if not found:
        return Step(name, "there is no compute-sanitizer beside nvcc or on PATH", 0)
    step = pytest(name, ["gpu"], "-k", "small_shapes and not triton", after="build")
    # every tensor is an allocation of its own: beyond its end is outside, not in a neighbour
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [found, "--tool", name, "--error-exitcode", "1", *options, *step.command]
    return step._replace(command=command, environment=environment)


def figures() -> list[Step]:
    """Return the two that count, with the least that they take."""
    least = ["--device", "cuda", "--no-compile", "--runs", "10", "--results", str(RESULTS), "--name"]
    return [
        script(
            "compare_peers", *INFERENCE, *least, "first_inference", seconds=60, title="benchmark of inference, first"
        ),
        script("bench_model", *BF16, *least, "first_training", seconds=95, title="benchmark of training, first"),
    ]


def build_step(capability: tuple[int, int]) -> Step:
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip()  # profiler and sanitizer then name lines
    environment = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability), "NVCC_APPEND_FLAGS": flags}
    return Step("build", [sys.executable, __file__, "--build"], 240, environment=environment)


def network_tests() -> list[Step]:
    return [
        pytest(f"{TRITON}, network", ["triton_network", "recompute"], "-k", "not compiled"),
        pytest("tests of the network", ["gpu_network"], "-k", f"not ({LIMITED})", after="build"),
    ]


def tests() -> list[Step]:
    """Return steps that run side by side: nothing in them is timed."""
    without_triton = "-k", "not triton and not cuda_host"
    parts = [(stem, f"{part}/{parts}") for stem, parts in PARTS.items() for part in range(1, parts + 1)]
    return [
        *network_tests(),
        *(
            pytest(f"tests of cuda {part}", [*PARTS, *OTHERS], *without_triton, "--part", part, after="build")
            for part in ("1/3", "2/3", "3/3")
        ),
        pytest("tests of the GPU", ["gpu"], "-k", f"not ({LIMITED})", after="build"),
        sanitizer("memcheck", "--report-api-errors", "no"),
        sanitizer("racecheck"),
        *(pytest(f"{TRITON}, {stem} {part}", [stem], "-k", "triton", "--part", part) for stem, part in parts),
        pytest("tests of the model", ["model"], *without_triton, after="build"),
    ]


def again(steps: list[Step], results: list[dict]) -> list[Step]:
    """Return the steps of Triton that failed, to repeat the tests that did with other code for the same kernels.

    The products are mma.sync, not wgmma or tcgen05, and the toolkit's ptxas assembles them instead of Triton's, or
    Triton's without optimizing where there is no other.
    """
    ptxas = tool("ptxas")
    assembler = dict.fromkeys(["TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"], ptxas)
    environment = {"DISABLE_MMA_V3": "1", "DISABLE_MMA_V5": "1"}
    environment |= assembler if ptxas else {"DISABLE_PTXAS_OPT": "1"}
    begun = "failed: exit status", "failed: not done"
    failed = {result["step"] for result in results if result["outcome"].startswith(begun)}
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
    """Return steps that run one after another, what matters most first."""
    device = ["--device", "cuda"]
    written = [*device, "--compile", "--results", str(RESULTS)]
    steps = [
        script("compare_peers", *device, "--no-compile", "--runs", "10", seconds=110, optional=True),
        script("bench_model", *device, "--no-compile", "--runs", "10", seconds=90, optional=True),
        pytest("tests of the memory's limit", ["gpu", "gpu_network"], "-k", LIMITED, seconds=120)._replace(
            optional=True
        ),
    ]
    for name, case in (("compare_peers", INFERENCE), ("bench_model", BF16)):
        options = [*written, *case, "--runs", "10", "--name", f"{name}_compiled"]
        steps.append(script(name, *options, seconds=100, title=f"benchmark {name}, torch.compile", optional=True))
    steps += [script(f"bench_{stem}", *device, seconds=60, optional=True) for stem in BENCHMARKED]
    for stem, case in BENCHMARKED.items():
        options, title = (
            [*written, "--case", case, "--name", f"{stem}_compiled"],
            f"benchmark bench_{stem}, torch.compile",
        )
        steps.append(script(f"bench_{stem}", *options, seconds=60, title=title, optional=True))
    steps.append(script("gpu_dry_run", "--json", seconds=60, optional=True))
    configurations = ["--seconds", "100", "--output", str(LOGS / "configurations.json")]
    steps.append(script("tune_triton", *configurations, seconds=120, title="benchmark tune_triton", optional=True))
    return steps


# The package


def lay_out():
    """Make the package of links to the sources, as setup.py would, without libraries."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    others = "__pycache__", "build_info.json"  # the second says what the tree's own libraries were built with
    sources = [p for p in (ROOT / "seemore_fast").iterdir() if p.suffix != ".so" and p.name not in others]
    for path in [*sources, ROOT / "kernels", ROOT / "benchmarks"]:
        (PACKAGE / path.name).symlink_to(path)


def build():
    """Compile the CUDA library for TORCH_CUDA_ARCH_LIST and put it into the package, if it can be used there."""
    try:
        toolchain, cuda = native().find_toolchain(), native().find_cuda()
        names = [name for name in native().products(toolchain, cuda) if name != "libseemore_cpu"]
        built = native().build(LOGS / "native", toolchain, cuda, names)
    except (native().Missing, subprocess.CalledProcessError) as error:
        raise SystemExit(f"there is no CUDA library, Triton's kernels do its work: {error}") from None
    for name in names:
        shutil.copy2(built[name], PACKAGE / f"{name}.so")
    info = native().facts(toolchain, cuda) | {"left_out": {"libseemore_cpu": "gpu-check builds for the GPU alone"}}
    (PACKAGE / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    question = "import torch; from seemore_fast import backends"
    question += "; raise SystemExit(backends.why_not('cuda', torch.device('cuda', 0)))"
    if subprocess.run([sys.executable, "-c", question]).returncode:
        (PACKAGE / f"{LIBRARY}.so").unlink()
        raise SystemExit(f"{LIBRARY}.so was built and cannot be used, Triton's kernels do its work")


# What comes back


def machine(torch) -> dict:
    """Return what the outcomes depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": said(query),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "nvcc": said([tool("nvcc") or "nvcc", "--version"]),
        "commit": said(["git", "rev-parse", "HEAD"]) or os.environ.get("SEEMORE_FAST_COMMIT"),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(command: list[str]) -> str | None:
    """Return the last line that a command prints, None where there is no such command or it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line for line in reversed(lines) if line), None)


def brought(folder: Path) -> Iterator[Path]:
    """Yield what the archive has: figures, logs, what was tuned, and compiled kernels as long as they are few."""
    yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from sorted(LOGS.glob("*.log"))
    yield from (path for path in (PREFERENCES, LOGS / "configurations.json") if path.exists())
    kernels = list((LOGS / "triton").glob("*/*"))
    if sum(map(size, kernels)) <= LARGEST_CACHE:
        yield from kernels


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a temporary file of a step that runs
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=LOGS, help="folder of results.tgz (default: build/gpu-check)")
    parser.add_argument("--seconds", type=float, help=f"for everything; the rest is left out (default: {SECONDS})")
    parser.add_argument("--quick", action="store_true", help=f"the network alone, in {QUICK_SECONDS} s")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only steps with one of these in their names")
    parser.add_argument("--build", action="store_true", help="only build, for TORCH_CUDA_ARCH_LIST")
    options = parser.parse_args()
    if options.build:
        return build()
    start = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignored it: for the steps
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of the steps, which end, too
    import torch  # only now: --help needs none

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here")
    facts = machine(torch)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    folder = RESULTS / slug(facts["device"]).lower()
    for needed in (folder, LOGS, options.output):
        needed.mkdir(parents=True, exist_ok=True)

    def save(results: list[dict]):
        told = facts | {"seconds": round(time.monotonic() - start, 1), "steps": results}
        kind = "_quick" if options.quick else "_only" if options.only else ""
        try:
            (folder / f"gpu_check{kind}.json").write_text(json.dumps(told, indent=2) + "\n")
            archive(options.output / "results.tgz", ROOT, brought(folder))
        except OSError as error:  # a full disk is no reason to stop
            print(f"not saved: {error}", flush=True)

    for log in [] if options.only else LOGS.glob("*.log"):  # of another time
        log.unlink()
    save([])
    lay_out()
    deadline = start + (options.seconds or (QUICK_SECONDS if options.quick else SECONDS))
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
    finally:  # also where somebody stops this
        save(runner.results)
    print(f"\n{time.monotonic() - start:.0f} s altogether, figures in {folder}, all in {options.output}/results.tgz")
    for result in runner.results:
        print(f"{result['seconds']:8.1f} s  {result['step']}: {result['outcome']}; {result['last_line']}")
    raise SystemExit(any(result["outcome"].startswith("failed") for result in runner.results))


if __name__ == "__main__":
    main()
