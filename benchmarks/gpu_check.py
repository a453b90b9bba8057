"""Build, test, sanitize and measure on a machine with an NVIDIA GPU: `make gpu-check`.

    python benchmarks/gpu_check.py --seconds 570
    python benchmarks/gpu_check.py --quick            # in three minutes: the network's tests, and its times

The Python that runs it is 3.11 or newer, has torch, triton, ninja, pybind11, numpy and pytest, and is left as it is:
the package is laid out in build/gpu-check/package, with links to the sources. Needs nvcc, but no network and no pip. A
step that fails does not stop the others; the exit status tells. Figures and every step's duration go to
benchmarks/results/<gpu>/, output to build/gpu-check/.
"""

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
PACKAGE = LOGS / "package" / "seemore_fast"
# The package that is laid out, not the tree's folder of the same name, which Python would find in the current one
ENVIRONMENT = {"PYTHONPATH": str(PACKAGE.parent), "PYTHONSAFEPATH": "1"}
TOOLKIT = "/usr/local/cuda"  # where it is if nothing says where
BENCHMARKED = {  # operator: the case in which torch.compile is timed, too
    "striped_conv": "1x36x480x640 K=11 bf16",
    "depthwise_gate": "1x36x480x640 bf16",
    "calibrate": "1x36x480x640 recursive=2 bf16",
    "router": "1x36x480x640 bf16",
    "norm_pointwise": "1x36x480x640 bf16",
    "gated_ffn": "1x36x480x640 bf16",
    "norm_conv3x3": "1x36x480x640 bf16",
    "low_rank_experts": "1x36x480x640 bf16",
}
OTHERS = ["layer_norm", "pointwise", "conv3x3_shuffle", "rme_block", "sme_block"]
QUICK_SECONDS = 170


class Step(NamedTuple):
    name: str
    command: list[str] | str  # or why it cannot run here
    seconds: int  # at most
    optional: bool = False  # left out without a word if there is no time
    environment: dict[str, str] | None = None


def pytest(name: str, stems: list[str], *options: str, seconds: int = 300) -> Step:
    files = [f"tests/test_{stem}.py" for stem in stems]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--device", "cuda", "--durations", "5", *files, *options]
    return Step(name, [*command, "-p", "no:cacheprovider"], seconds)


def network_tests() -> list[Step]:
    return [
        pytest("tests of the network", ["triton_network", "recompute"], "-k", "not compiled"),
        pytest("tests of the network on the GPU", ["gpu_network"]),
    ]


def tests() -> list[Step]:
    """Return steps that may run at the same time: nothing in them is timed."""
    without_triton = "-k", "not triton and not cuda_host"
    return [
        *network_tests(),
        pytest("tests of operators", [*BENCHMARKED, *OTHERS], *without_triton),
        pytest("tests of the model", ["model"], *without_triton),
        # its compiler takes its time: four processes
        pytest("tests of triton, values", ["striped_conv"], "-k", "triton and test_values"),
        pytest("tests of triton, stencils", [*BENCHMARKED][:4], "-k", "triton and not test_values"),
        pytest("tests of triton, layers", [*BENCHMARKED][4:6], "-k", "triton"),
        pytest("tests of triton, more layers", [*BENCHMARKED][6:], "-k", "triton"),
        pytest("tests of the GPU", ["gpu"]),
        sanitizer("memcheck", "--report-api-errors", "no"),
        sanitizer("racecheck"),
    ]


def sanitizer(tool: str, *options: str) -> Step:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    found = shutil.which("compute-sanitizer", path=path)
    if not found:
        return Step(tool, f"there is no compute-sanitizer on PATH, in CUDA_HOME/bin or {TOOLKIT}/bin", 0)
    step = pytest(tool, ["gpu"], "-k", "small_shapes and not triton")
    # every tensor is an allocation of its own: beyond its end is outside, not in a neighbour
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [found, "--tool", tool, "--error-exitcode", "1", *options, *step.command]
    return step._replace(command=command, environment=environment)


def script(name: str, *options: str, seconds: int = 120, optional: bool = False) -> Step:
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda", *options]
    return Step(f"benchmark {name}", command, seconds, optional)


def quick_benchmarks() -> list[Step]:
    """Return the two cases that count, without torch.compile; nothing is written."""
    return [
        script("compare_peers", "--no-compile", "--case", "T x4 640x480 bf16", "--runs", "10"),
        script("bench_model", "--no-compile", "--case", "bf16", "--runs", "10"),
    ]


def benchmarks() -> list[Step]:
    """Return steps that run one after another, what matters most first."""
    written = ["--results", "benchmarks/results"]
    steps = [
        script("tune_backends", "--runs", "5", "--output", "seemore_fast/preferences.json", seconds=90),
        script("compare_peers", "--no-compile", "--runs", "10"),
        script("bench_model", "--no-compile", "--runs", "10"),
    ]
    for name, case in (("compare_peers", "T x4 640x480 bf16"), ("bench_model", "bf16")):
        options = "--compile", "--case", case, "--runs", "10", *written, "--name", f"{name}_compiled"
        steps.append(script(name, *options, seconds=100, optional=True)._replace(name=f"{name}, torch.compile"))
    steps += [script(f"bench_{operator}", seconds=240) for operator in reversed(BENCHMARKED)]
    for operator, case in BENCHMARKED.items():
        options = "--compile", "--case", case, *written, "--name", f"{operator}_compiled"
        step = script(f"bench_{operator}", *options, seconds=60, optional=True)
        steps.append(step._replace(name=f"{step.name}, torch.compile"))
    return steps


class Run:
    """A step that has been started, or why not."""

    def __init__(self, step: Step, deadline: float):
        self.step, self.start, self.process = step, time.monotonic(), None
        self.log = LOGS / (re.sub(r"\W+", "-", step.name) + ".log")
        left = deadline - self.start
        if isinstance(step.command, str):
            self.outcome = f"skipped: {step.command}"
        elif left < (step.seconds if step.optional else 5):
            self.outcome = f"skipped: {left:.0f} s left" if step.optional else "failed: no time left"
        else:
            self.limit = self.start + min(step.seconds, left)
            with self.log.open("w") as log:
                # in a session of its own, so that all that it starts ends with it
                self.process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **ENVIRONMENT, **(step.environment or {})},
                    start_new_session=True,
                )
            atexit.register(self.kill)  # if somebody stops us

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def finish(self) -> dict:
        """Wait until it ends or its time is over; print and return what came of it."""
        if self.process:
            try:
                status = self.process.wait(max(self.limit - time.monotonic(), 0))
                self.outcome = "passed" if status == 0 else f"failed: exit status {status}"
            except subprocess.TimeoutExpired:
                self.kill()
                self.outcome = f"failed: not done after {self.limit - self.start:.0f} s"
        seconds = round(time.monotonic() - self.start, 1) if self.process else 0
        print(f"\n{self.step.name}: {self.outcome}, {seconds} s", flush=True)
        if self.process:
            lines = self.log.read_text(errors="replace").splitlines()
            is_short = self.outcome == "passed" and not self.step.name.startswith("benchmark")
            print("\n".join(lines[-3:] if is_short else lines[-60:]), flush=True)
        return {"step": self.step.name, "outcome": self.outcome, "seconds": seconds}


def together(steps: list[Step], deadline: float) -> list[dict]:
    """Run steps at the same time; each one's duration is until it is found to have ended, the quickest first."""
    waiting, done = [Run(step, deadline) for step in steps], []
    while waiting:
        ended = [run for run in waiting if not run.process or run.process.poll() is not None]
        ended += [run for run in waiting if run not in ended and time.monotonic() > run.limit]
        done += [run.finish() for run in ended]
        waiting = [run for run in waiting if run not in ended]
        time.sleep(0.2)
    return done


def build():
    """Compile for TORCH_CUDA_ARCH_LIST and lay the package out, as setup.py would."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build as native

    built = native.build(LOGS / "native", native.find_toolchain(), native.find_cuda())
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    sources = [p for p in (ROOT / "seemore_fast").iterdir() if p.suffix != ".so" and p.name != "__pycache__"]
    for path in [*sources, ROOT / "kernels", ROOT / "benchmarks"]:
        (PACKAGE / path.name).symlink_to(path)
    for name, library in built.items():
        shutil.copy2(library, PACKAGE / f"{name}.so")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="for everything; what does not fit is left out (default: 570)")
    parser.add_argument("--quick", action="store_true", help=f"what matters most, in {QUICK_SECONDS} s")
    parser.add_argument("--build", action="store_true", help="only build, for TORCH_CUDA_ARCH_LIST")
    options = parser.parse_args()
    if options.build:
        return build()
    import torch  # only now: --help needs none

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here")
    gpu = torch.cuda.get_device_name()
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    for needed in (folder, LOGS):
        needed.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done, deadline = [], start + (options.seconds or (QUICK_SECONDS if options.quick else 570))

    def note(*results: dict):
        done.extend(results)
        facts = {"device": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "steps": done}
        facts["seconds"] = round(time.monotonic() - start, 1)
        (folder / f"gpu_check{'_quick' * options.quick}.json").write_text(json.dumps(facts, indent=2) + "\n")

    architecture = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    note(Run(Step("build", [sys.executable, __file__, "--build"], 300, environment=architecture), deadline).finish())
    if done[0]["outcome"] == "passed":
        note(*together(network_tests() if options.quick else tests(), deadline))
        for step in quick_benchmarks() if options.quick else benchmarks():
            note(Run(step, deadline).finish())
    print(f"\n{time.monotonic() - start:.0f} s altogether, figures in {folder}")
    for result in done:
        print(f"{result['seconds']:8.1f} s  {result['step']}: {result['outcome']}")
    raise SystemExit(any(result["outcome"].startswith("failed") for result in done))


if __name__ == "__main__":
    main()
