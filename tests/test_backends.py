"""Choice of backend, and what is said where there is none."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.backends import usable

import seemore_fast
from seemore_fast import backends, ops, reference, set_backend, use_backend
from seemore_fast.backends import Kernel, backend_for_device, current_backend, native, select_backend, selection

HERE = "cpu" if backends.unsupported_reason("cpu") is None else "reference"
has_cpu_library = pytest.mark.skipif(HERE == "reference", reason=str(backends.unsupported_reason("cpu")))


def striped_tensors(dtype=torch.float32):
    shapes = (1, 2, 3, 3), (2, 1, 1, 3), (2,), (2, 1, 3, 1), (2,)
    return [torch.rand(shape, dtype=dtype) for shape in shapes]


@pytest.fixture
def recorded(monkeypatch):
    """A backend called "other", first of all for striped_conv on the CPU in float32; returns its calls."""
    calls = []

    class Other:
        @staticmethod
        def striped_conv(y, *inputs):
            calls.append(inputs)
            y.fill_(7)

    functions = selection._functions
    monkeypatch.setattr(selection, "BACKENDS", (*backends.BACKENDS, "other"))
    reason = selection.unsupported_reason
    monkeypatch.setattr(selection, "unsupported_reason", lambda name, *d: None if name == "other" else reason(name, *d))
    monkeypatch.setattr(selection, "_functions", lambda name, op: Other if name == "other" else functions(name, op))
    kernels = [Kernel("other", "cpu", (torch.float32,), least=18), *backends.KERNELS["striped_conv"]]
    monkeypatch.setitem(backends.KERNELS, "striped_conv", kernels)
    return calls


def test_setter_and_context_manager(recorded):
    x = striped_tensors()[0]
    with use_backend("auto"):
        use_backend("other")
        assert backend_for_device() == select_backend("striped_conv", x) == "other"
        with use_backend("reference"):
            assert backend_for_device() == select_backend("striped_conv", x) == "reference"
            with use_backend("other"):
                assert backend_for_device() == "other"
            assert backend_for_device() == "reference"
        assert backend_for_device() == "other"
        use_backend("auto")
        assert select_backend("striped_conv", x) == "other"
    assert seemore_fast.backend_info()["backend"] == "auto"


def test_context_restores_the_outer_choice_also_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend_for_device() == HERE


def test_operators_run_the_chosen_kernel(recorded):
    tensors = striped_tensors()
    assert (ops.striped_conv(*tensors) == 7).all()
    assert len(recorded) == 1
    with use_backend("reference"):
        torch.testing.assert_close(ops.striped_conv(*tensors), reference.striped_conv(*tensors), rtol=0, atol=0)
    assert len(recorded) == 1


def test_what_a_backend_lacks_runs_elsewhere(recorded):
    assert select_backend("striped_conv", torch.rand(1, 2, 3, 3, dtype=torch.float64)) == HERE
    assert select_backend("striped_conv", torch.rand(1, 1, 1, 3)) == HERE  # fewer than `least` elements
    with use_backend("other"):
        assert select_backend("striped_conv", torch.rand(1, 1, 1, 3)) == "other"  # asked for by name
        assert select_backend("striped_conv", torch.rand(1, 2, 3, 3, dtype=torch.float64)) == "reference"
        assert select_backend("gated_ffn", torch.rand(1, 2, 3, 3)) == "reference"
    assert select_backend("striped_conv", torch.rand(1, 2, 3, 3, dtype=torch.float16)) == "reference"
    assert select_backend("striped_conv", torch.rand(1, 2, 3, 3, device="meta")) == "reference"


@has_cpu_library
def test_backward_of_a_kernel_runs_on_a_kernel_whatever_is_chosen_then():
    tensors = [t.requires_grad_() for t in striped_tensors(torch.float64)]
    y = ops.striped_conv(*tensors)
    with use_backend("reference"):
        found = torch.autograd.grad(y.square().sum(), tensors)
        expected = torch.autograd.grad(ops.striped_conv(*tensors).square().sum(), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [n for n, why in usable().items() if why and n in backends.BACKENDS])
def test_a_missing_backend_gives_its_reason(name):
    with pytest.raises(
        RuntimeError, match=f"^backend '{name}' is not available: {re.escape(backends.unsupported_reason(name))}"
    ):
        use_backend(name)


@pytest.mark.parametrize("name", usable())
def test_backends_not_tested_here_are_listed(name):
    """The operators' tests leave out what cannot run here; this one skips with the reason."""
    if reason := usable()[name]:
        pytest.skip(f"{name}: {reason}")
    have = {kernel.backend for kernel in backends.KERNELS["striped_conv"]}
    assert name == "reference" or name.split()[0].split("_")[0] in have


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="'fast', expected one of: auto, reference, cpu, cuda, triton"):
        use_backend("fast")


def test_every_operator_has_a_reference_and_every_kernel_an_operator():
    assert all(callable(getattr(reference, name)) for name in ops.__all__)
    assert set(backends.KERNELS) <= {*ops.__all__, "network"}  # the whole model, called through SeemoRe


def test_backend_info_says_what_is_there_and_why_not():
    info = seemore_fast.backend_info()
    assert info["backend"] == "auto"
    assert set(info["available"]) | set(info["unavailable"]) == {"reference", "cpu", "cuda", "triton"}
    assert not set(info["available"]) & set(info["unavailable"])
    assert all(info["unavailable"].values())
    assert info["seemore_fast"] == seemore_fast.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"]["available"] == torch.cuda.is_available()
    assert info["cuda"]["available"] or info["cuda"]["reason"]
    if HERE == "cpu":
        assert info["cpu"]["instruction_set"] in info["cpu"]["instruction_sets"]
        assert info["cpu"]["instruction_sets"][0] == "portable"
        assert "cpu" in info["operators"]["striped_conv"]
    if isinstance(info["build"], dict):
        assert set(info["cpu"]["instruction_sets"]) <= set(info["build"]["instruction_sets"])


# The native libraries


def test_a_missing_library_says_how_to_get_one(tmp_path):
    reason = native.load(tmp_path / "libnone.so")
    assert re.match(r"libnone\.so was not built; to build it, reinstall .*SEEMORE_FAST_NATIVE=1", reason)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01\x01" + bytes(100)])
def test_a_broken_library_is_a_reason_not_an_error(tmp_path, content):
    path = tmp_path / "libseemore_cpu.so"
    path.write_bytes(content)
    assert native.load(path).startswith(f"{path} does not load in torch {torch.__version__}: ")


def printed_by(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@has_cpu_library
@pytest.mark.parametrize("name", native.instruction_sets()[:1] if HERE == "cpu" else [])
def test_the_environment_forces_an_instruction_set(name):
    code = "import seemore_fast; print(seemore_fast.backend_info()['cpu']['instruction_set'])"
    assert printed_by(code, SEEMORE_FAST_CPU=name) == name


@has_cpu_library
def test_a_wrong_instruction_set_leaves_the_reference(tmp_path):
    code = "import seemore_fast as s; i = s.backend_info(); print(i['available'][:1], i['unavailable']['cpu'])"
    printed = printed_by(code, SEEMORE_FAST_CPU="mmx")
    assert printed.startswith(
        "['reference'] SEEMORE_FAST_CPU is 'mmx', expected one that this processor and this build"
    )
    assert "portable" in printed


@has_cpu_library
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"instruction set is 'mmx', expected one of: portable"):
        native.use_instruction_set("mmx")


@has_cpu_library
@pytest.mark.parametrize("at", [0, 500, 999])
def test_exceptions_inside_a_parallel_region_reach_python(at):
    with pytest.raises(RuntimeError, match=f"thrown at {at}$"):
        torch.ops.seemore_cpu.throw_in_parallel(1000, at)
    torch.ops.seemore_cpu.throw_in_parallel(1000, 1000)  # beyond the end: nothing is thrown, and the pool still works


@has_cpu_library
def test_instruction_sets_share_no_inline_function():
    """One that the linker merged could run AVX-512 code on a processor without it."""
    symbols = subprocess.run(["nm", "-C", *native_objects()], capture_output=True, text=True, check=True).stdout
    weak = set(re.findall(r"^[0-9a-f]* +[VWu] (.*)$", symbols, re.MULTILINE))
    ours = r"seemore::(portable|avx2|avx512|avx512_bf16)::|^DW\.ref\."  # the latter are data
    assert not {name for name in weak if not re.search(ours, name)}


def native_objects():
    folder = Path(__file__).parent.parent / "build" / f"native-{sys.implementation.cache_tag}"
    found = [
        path for path in folder.glob("cpu_*.o") if re.search(r"_(portable|avx2|avx512|avx512_bf16)\.o$", path.name)
    ]
    if not found:
        pytest.skip("the library was not built in this tree")
    return map(str, found)


def test_import_brings_nothing_that_takes_long():
    code = (
        "import torch, sys; before = set(sys.modules); import seemore_fast; "
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('seemore_fast')))"
    )
    assert not {"PIL", "safetensors", "tqdm", "onnx", "triton"} & set(printed_by(code).split())


def test_a_choice_is_its_threads_own():
    """`use_backend` holds in its thread, `set_backend` in all that have no choice of their own."""
    seen = {}

    def look(name):
        seen[name] = current_backend()

    def run(name):
        thread = threading.Thread(target=look, args=(name,))
        thread.start()
        thread.join()

    with use_backend("reference"):
        look("here")
        run("in another thread")
    try:
        set_backend("reference")
        look("after set_backend")
        run("in another thread after set_backend")
        with use_backend("auto"):
            look("with a choice of its own")
    finally:
        set_backend("auto")
    assert seen == {
        "here": "reference",
        "in another thread": "auto",
        "after set_backend": "reference",
        "in another thread after set_backend": "reference",
        "with a choice of its own": "auto",
    }


def test_a_compiled_graph_is_compiled_again_for_another_backend():
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.rand(1, 2, 5, 5)
    call = torch.compile(lambda x: ops.router(x, x.new_ones(3, 2), 1)[1], backend=compiler, fullgraph=True)
    for name in ("reference", "auto", "reference"):
        with use_backend(name):
            call(x)
    assert len(graphs) == 2
