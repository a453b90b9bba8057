"""What all tests share: the device they run on, the oracle, and where the image data is."""

import importlib.util
import operator
import os
from pathlib import Path

import pytest
import torch
from helpers.backends import Backend, assert_computed, calls
from helpers.cases import is_beyond_turns
from helpers.images import pixels
from helpers.networks import SMALL


def pytest_configure(config):
    if not config.getoption("--device").startswith("cuda"):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    from helpers import interpreter  # imports triton, which reads TRITON_INTERPRET

    with interpreter.quicker():
        yield


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device the tests run on: cpu (default) or cuda")
    parser.addoption("--part", default="1/1", help="such as 2/4: every fourth of the tests, beginning with the second")
    parser.addoption("--data", default=os.environ.get("SEEMORE_FAST_DATA"), help="folder with test/Set5 and train/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device").startswith("cuda")
    without_kernel = [item for item in items if not has_kernel(arguments_of(item))]
    config.hook.pytest_deselected(items=without_kernel)
    items[:] = [item for item in items if item not in set(without_kernel)]
    for item in items:
        arguments = arguments_of(item)
        if arguments.get("backend") == "triton" or item.path.name.startswith("test_triton"):
            item.add_marker("triton")
        if on_gpu:
            continue
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: --device cuda"))
        if arguments.get("backend") == "triton" and is_too_much_to_interpret(item):
            item.add_marker("slow")


def arguments_of(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def has_kernel(arguments: dict) -> bool:
    """Return whether the backend of a test, if it has one, has kernels for its dtype and taps."""
    backend = arguments.get("backend")
    return not isinstance(backend, Backend) or backend.serves(arguments)


def is_too_much_to_interpret(item) -> bool:
    """Return whether a test, which takes seconds in Triton's interpreter, adds little to those with other arguments.

    Float16 adds little to bfloat16, and combinations of parametrisations to those that take each value in turn.
    """
    if item.callspec.params.get("dtype") == torch.float16:
        return True
    marks = [mark for mark in item.iter_markers("parametrize") if mark.args[0] not in ("backend", "dtype")]
    if len(marks) < 2:
        return False
    positions = [position(mark, item.callspec.params) for mark in marks]
    return is_beyond_turns([len(mark.args[1]) for mark in marks], positions)


def position(mark: pytest.Mark, arguments: dict) -> int:
    """Return which of the values of a parametrisation a test has."""
    names, values = mark.args
    given = [arguments[name.strip()] for name in names.split(",")]
    for i, value in enumerate(values):
        own = value.values if isinstance(value, type(pytest.param())) else value if "," in names else [value]
        if all(map(operator.is_, own, given)):
            return i
    raise LookupError(f"{given} are none of the values of {names}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Fail a test that passes but is named after a backend that did not compute it."""
    calls.clear()
    result = yield
    backend = arguments_of(pyfuncitem).get("backend")
    if isinstance(backend, Backend):
        assert_computed(backend, pyfuncitem.get_closest_marker("falls_back"))
    return result


@pytest.fixture(scope="session")
def device(request) -> str:
    device = request.config.getoption("--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch finds no CUDA device here", returncode=4)
    return device


def pytest_collection_finish(session):
    """Leave the part of the tests that is asked for, after all other choices."""
    part, parts = map(int, session.config.getoption("--part").split("/"))
    session.items[:] = session.items[part - 1 :: parts]


@pytest.fixture(scope="session")
def data(request) -> Path:
    folder = request.config.getoption("--data")
    if not folder:
        pytest.skip("no image data: give --data or SEEMORE_FAST_DATA, a folder with test/Set5")
    return Path(folder)


@pytest.fixture(scope="session")
def oracle():
    """The SeemoRe class of the PyPI package `seemore`, an independent port of the published code."""
    if importlib.util.find_spec("seemore") is None:
        pytest.skip("the oracle, PyPI's seemore, is not installed")
    return pytest.importorskip("seemore.module", reason="the oracle needs cv2").SeemoRe


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def exact_float32():
    """On CUDA, compare in true float32: TF32 is a choice of the user, not of a test."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def harness(monkeypatch):
    """benchmarks/harness.py; nothing that it sets for the process outlives a test."""
    from seemore_fast.benchmarks import harness

    monkeypatch.setattr(harness, "keep_memory", lambda: None)
    threads = torch.get_num_threads()
    with harness.functorch_config.patch(donated_buffer=True):
        yield harness
    torch.set_num_threads(threads)


@pytest.fixture
def small_model(device):
    """A SeemoRe of two groups of 12 channels, in evaluation mode."""
    from seemore_fast import SeemoRe

    return SeemoRe(**SMALL).to(device).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from seemore_fast import SeemoRe
    from seemore_fast.network.checkpoint import save_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_model(SeemoRe(**SMALL), path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder to work in, with photo.png, 20x16."""
    from PIL import Image

    Image.fromarray(pixels(3)).save(tmp_path / "photo.png")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def upscale(weights, capsys):
    """Run the command with the small model; return (exit status, all that was printed)."""
    from seemore_fast.cli import main

    def run(*arguments, model=weights):
        device = [] if "--devices" in arguments else ["--device", "cpu"]
        try:
            status = main(["upscale", *device, "--model", str(model), *map(str, arguments)])
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out + printed.err

    return run


@pytest.fixture
def work(tmp_path):
    """A folder with photos to learn from, two to measure, and tiny.yml (helpers.training)."""
    from helpers.training import make_work

    return make_work(tmp_path)


@pytest.fixture
def browser(tmp_path):
    from helpers.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()
