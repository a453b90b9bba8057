"""`make gpu-check` without a GPU: main in a tree of stubs, and its steps."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.benchmarks import processes
from helpers.gpu import CALLS, HUGE, huge_tensors

from seemore_fast.benchmarks import gpu_check, steps
from seemore_fast.benchmarks.steps import Step

STUBS = {
    "stubs/torch.py": """
        __version__ = "2.stub"
        class version: cuda = "13.0"
        class cuda:
            is_available = lambda: True
            get_device_name = lambda: "NVIDIA Stub 1"
            get_device_capability = lambda: (9, 0)
        device = lambda kind, index: (kind, index)
        """,
    # Every test and benchmark: prints its environment, and fails or hangs if STUB_FAILS or STUB_HANGS is in its command
    "stubs/stub_step.py": """
        import os, pathlib, sys, time
        command = " ".join(sys.argv)
        table = pathlib.Path(os.environ["SEEMORE_FAST_PREFERENCES"])
        print(f"preferences: {table.read_text() if table.exists() else None}")
        print("mma v3 is off:", os.environ.get("DISABLE_MMA_V3"), "ptxas:", os.environ.get("TRITON_PTXAS_PATH"))
        print("arguments:", command)
        if "tune_backends" in command:
            pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text("what was tuned")
        has = lambda name: os.environ.get(name) and os.environ[name] in command
        while has("STUB_HANGS"):
            time.sleep(0.1)
        print("1 failed" if has("STUB_FAILS") else "1 passed")
        sys.exit(bool(has("STUB_FAILS")))
        """,
    "stubs/pytest.py": "import stub_step",
    "csrc/native_build.py": """
        import os, pathlib
        TOOLKITS = []
        class Missing(Exception): pass
        def find_nvcc():
            nvcc = pathlib.Path(os.environ["PATH"], "nvcc")
            return str(nvcc) if nvcc.exists() else None
        def find_toolchain(): return {}
        def find_cuda():
            if "nvcc" in os.environ["STUB_LACKS"]: raise Missing("there is no nvcc")
            return {}
        def products(toolchain, cuda): return ["_C", "libseemore_cpu", "libseemore_cuda"]
        def facts(toolchain, cuda): return {"nvcc": "13.0"}
        def build(folder, toolchain, cuda, names):
            assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0" and "-lineinfo" in os.environ["NVCC_APPEND_FLAGS"]
            folder.mkdir(exist_ok=True)
            for name in names: (folder / f"{name}.so").touch()
            return {name: folder / f"{name}.so" for name in names}
        """,
    "seemore_fast/__init__.py": "",
    "seemore_fast/backends/__init__.py": """
        import os
        reason = "it has an undefined symbol" if "symbol" in os.environ["STUB_LACKS"] else None
        unsupported_reason = lambda *backend: reason
        """,
    "kernels/__init__.py": "",
    "benchmarks/__init__.py": "",
}
FOLDER = "benchmarks/results/nvidia-stub-1"


def names(of: list[Step]) -> list[str]:
    return [step.name for step in of]


class Tree:
    """A checkout of stubs with the real gpu_check, and the archive that it leaves in `out`."""

    def __init__(self, root: Path):
        self.root, self.out, real = root, root / "out", gpu_check.ROOT / "benchmarks"
        for name, text in STUBS.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = text.strip("\n").splitlines()
            path.write_text("\n".join(line.removeprefix(8 * " ") for line in lines))
        (root / "seemore_fast" / "ops").mkdir()
        for stem in gpu_check.OPERATORS:
            (root / "kernels" / f"{stem}.py").touch()
            (root / "seemore_fast" / "ops" / f"{stem}.py").touch()
        for path in real.glob("*.py"):
            if path.name in ("gpu_check.py", "steps.py"):
                shutil.copy(path, root / "benchmarks")
            elif not (root / "benchmarks" / path.name).exists():
                (root / "benchmarks" / path.name).write_text("import stub_step")

    def start(self, *options: str, lacks: str = "", **environment: str) -> subprocess.Popen:
        command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(self.out), *options]
        environment |= {"STUB_LACKS": lacks, "PYTHONPATH": str(self.root / "stubs"), "PATH": str(self.root / "bin")}
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
        out = (self.root / "printed").open("w")
        return subprocess.Popen(command, cwd=self.root, stdout=out, stderr=out, env={**kept, **environment})

    def run(self, *options: str, **more: str) -> int:
        return self.start(*options, **more).wait(300)

    def printed(self) -> str:
        return (self.root / "printed").read_text()

    def archived(self) -> dict[str, str]:
        with tarfile.open(self.out / "results.tgz") as tar:
            return {f.name: tar.extractfile(f).read().decode() for f in tar.getmembers() if f.isfile()}

    def outcomes(self, kind: str = "") -> dict[str, str]:
        """Return {step: outcome}, in the order in which they ended, of the archive."""
        results = json.loads(self.archived()[f"{FOLDER}/gpu_check{kind}.json"])["steps"]
        return {result["step"]: result["outcome"] for result in results}

    def log(self, step: str) -> str:
        return self.archived()[f"build/gpu-check/{steps.slug(step)}.log"]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "a tree")


def assert_order(order: list[str], repeated: list[str]):
    first, last = names(gpu_check.figures()), names([*gpu_check.tuning(), *gpu_check.benchmarks()])
    assert order[: len(first)] == first and order[-len(last) :] == last
    beside = order[len(first) : -len(last)]
    assert beside[len(beside) - len(repeated) :] == repeated
    assert set(beside) == {"build", *names(gpu_check.tests()), *repeated}


def test_all_steps_run_in_order_and_later_ones_use_the_tuning(tree):
    assert tree.run() == 0
    outcomes = tree.outcomes()
    assert_order(list(outcomes), [])
    # the sanitizer may be here, and finds no program for a GPU in these
    assert {outcomes[name] for name in outcomes if "check" not in name} == {"passed"}
    for step in gpu_check.figures() + gpu_check.tests():
        if "check" not in step.name:
            assert "preferences: None" in tree.log(step.name)
    for step in gpu_check.benchmarks():
        assert "preferences: what was tuned" in tree.log(step.name)
    assert tree.archived()["seemore_fast/preferences.json"] == "what was tuned"
    assert list(tree.root.glob("**/seemore_fast/libseemore_cuda.so"))
    assert not list(tree.root.glob("**/libseemore_cpu.so"))


def test_without_nvcc_the_rest_runs_and_failed_tests_run_again_with_another_compiler(tree):
    """Again run only those of Triton, and only the tests that failed."""
    ptxas = tree.root / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.touch(0o755)
    name = "tests of triton, calibrate 2/3"
    again = f"{name}, other compiler"
    assert tree.run(lacks="nvcc", STUB_FAILS="tests/test_calibrate.py -k triton and calibrate --part 2/3") == 1
    outcomes = tree.outcomes()
    assert_order(list(outcomes), [again])
    failed = {step for step, outcome in outcomes.items() if outcome != "passed" and "check" not in step}
    assert failed == {"build", name, again}
    assert "no CUDA library, Triton's kernels are used instead: there is no nvcc" in tree.log("build")
    assert "mma v3 is off: None ptxas: None" in tree.log(name)
    assert f"mma v3 is off: 1 ptxas: {ptxas}" in tree.log(again)
    assert "--last-failed --last-failed-no-failures none" in tree.log(again)
    caches = {tree.log(step).split("cache_dir=")[1].split("--device")[0] for step in (name, again)}
    assert len(caches) == 1


def test_a_library_that_does_not_load_is_left_out(tree):
    assert tree.run("--only", "build", lacks="symbol") == 1
    assert "it has an undefined symbol" in tree.log("build") and "does not load" in tree.log("build")
    assert not list(tree.root.glob("**/seemore_fast/libseemore_cuda.so"))


def test_quick_and_only(tree):
    assert tree.run("--quick") == 0
    assert set(tree.outcomes("_quick")) == {"build", *names(gpu_check.figures() + gpu_check.network_tests())}
    assert tree.run("--only", "first", "router") == 0
    steps_of_all = [*gpu_check.figures(), *gpu_check.tests(), *gpu_check.benchmarks()]
    expected = [name for name in names(steps_of_all) if "first" in name or "router" in name]
    assert set(tree.outcomes("_only")) == {"build", *expected} and len(expected) > 3


def test_a_kill_leaves_the_archive(tree):
    """With every step that had ended; what is printed last may be a moment ahead."""
    chance = random.Random(0)
    for _ in range(3):
        shutil.rmtree(tree.out, ignore_errors=True)
        process = tree.start()
        while not (tree.out / "results.tgz").exists():
            assert process.poll() is None, tree.printed()
        time.sleep(chance.uniform(0, 1))
        process.kill()
        process.wait()
        heads = [line for line in tree.printed().splitlines() if line.endswith(" s") and ": " in line]
        ended = [line.rsplit(", ", 1)[0] for line in heads]  # without the seconds: "name: outcome"
        saved = [f"{name}: {outcome}" for name, outcome in tree.outcomes().items()]
        assert saved == ended[: len(saved)]
        assert len(ended) - len(saved) <= os.cpu_count()  # those that ended together
        assert all(
            f"build/gpu-check/{steps.slug(line.split(':')[0])}.log" in tree.archived()
            for line in saved
            if "skipped" not in line
        )


def test_a_termination_ends_the_steps(tree):
    process = tree.start(STUB_HANGS="inference.py")
    log = tree.root / "build/gpu-check/benchmark-of-inference-first.log"
    while not (log.exists() and "arguments" in log.read_text()):
        assert process.poll() is None, tree.printed()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 1
    assert not processes(tree.root)
    assert tree.outcomes() == {} and "arguments" in tree.log("benchmark of inference, first")


# What the steps are


def test_tools_are_found_beside_nvcc_on_path_or_in_a_toolkit(tmp_path, monkeypatch):
    def make(*parts: str) -> str:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
        return str(path)

    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(gpu_check.native(), "TOOLKITS", [str(tmp_path / "toolkit")])
    assert "no compute-sanitizer" in gpu_check.sanitizer("memcheck").command
    assert gpu_check.tool("nvcc") is None
    for folder in (["toolkit", "bin"], ["PATH"]):
        assert gpu_check.tool("compute-sanitizer") != (found := make(*folder, "compute-sanitizer"))
        assert gpu_check.tool("compute-sanitizer") == found
    make("CUDA_HOME", "bin", "nvcc")
    assert gpu_check.tool("compute-sanitizer") == found
    beside = make("CUDA_HOME", "bin", "compute-sanitizer")
    step = gpu_check.sanitizer("memcheck")
    assert step.command[:3] == [beside, "--tool", "memcheck"] and step.environment and step.after == "build"
    assert "small_shapes and not triton" in step.command


def test_the_build_makes_the_cuda_library_or_reports_why_not(tmp_path, monkeypatch):
    """With the real csrc/native_build.py: the CUDA library alone."""
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_check, "PACKAGE", tmp_path)
    monkeypatch.setattr(gpu_check.native(), "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"no CUDA library, Triton's kernels are used instead: there is no nvcc"):
        gpu_check.build()
    monkeypatch.setattr(gpu_check.native(), "find_cuda", dict)
    asked = []
    monkeypatch.setattr(gpu_check.native(), "build", lambda *arguments: asked.append(arguments) or {})
    monkeypatch.setattr(gpu_check.native(), "products", lambda *what: ["_C", "libseemore_cpu", "libseemore_cuda"])
    with pytest.raises(KeyError):  # nothing was built
        gpu_check.build()
    assert asked[0][0] == tmp_path / "native" and asked[0][3] == ["_C", "libseemore_cuda"]


def test_files_of_steps_exist_and_names_are_unique():
    every = [*gpu_check.figures(), *gpu_check.tests(), *gpu_check.tuning(), *gpu_check.benchmarks()]
    assert len({steps.slug(step.name) for step in every}) == len(every)
    for step in every:
        files = [word for word in step.command if word.startswith(("tests/", "benchmarks/")) and word.endswith(".py")]
        assert files or isinstance(step.command, str)
        assert all((gpu_check.ROOT / file).exists() for file in files), step


def test_the_network_takes_at_most_three_minutes():
    assert sum(step.seconds + steps.GRACE_S for step in gpu_check.figures()) < 180


def test_tests_that_do_not_fit_the_memory_are_skipped(monkeypatch):
    """The backward of gated_ffn holds 71 GB for the largest image: by its tensors' sizes, in Triton."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (71 * 10**9, 80 * 10**9))
    with pytest.raises(pytest.skip.Exception, match="GB of GPU memory needed, 71 free"):
        huge_tensors(CALLS["gated_ffn"], "cuda", HUGE)


def test_parts_contain_each_test_once():
    import conftest

    parts = []
    for part in ("1/3", "2/3", "3/3"):
        config = SimpleNamespace(getoption={"--part": part}.get)
        session = SimpleNamespace(config=config, items=list(range(40)))
        conftest.pytest_collection_finish(session)
        assert len(session.items) >= 13
        parts += session.items
    assert sorted(parts) == list(range(40))
