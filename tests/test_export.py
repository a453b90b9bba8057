"""`seemore-fast export`, and graphs of both networks: they route by themselves, at sizes other than the traced one."""

import re

import pytest
import torch
from helpers.networks import SMALL, route_apart

from seemore_fast import SeemoRe, load_model, reference
from seemore_fast.cli import main
from seemore_fast.network import export
from seemore_fast.network.checkpoint import save_model


def images(batch, height, width):
    """Return images of unlike brightness: with `route_apart`, they choose different experts."""
    brightness = torch.tensor([0.1, 1, 0.5, 2])[:batch, None, None, None]
    return torch.rand(batch, 3, height, width) * brightness


def decided(model_class):
    """Return a small network that chooses different experts for different images."""
    model = model_class(**SMALL).eval()
    with torch.no_grad():
        assert len(route_apart(model, images(4, 24, 40)).unique()) > 1
    return model


@pytest.fixture
def model(tmp_path):
    """A network of ours, saved as small.safetensors."""
    model = decided(SeemoRe)
    save_model(model, tmp_path / "small.safetensors")
    return model


def exported(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    assert main(["export", "--model", str(tmp_path / "small.safetensors"), "-o", str(path)]) == 0
    return path


def assert_same_results(run, model):
    """Compare a program with the network it was made of, at other sizes than the traced one."""
    for size in [(1, 32, 32), (3, 33, 47), (4, 64, 50)]:
        x = images(*size)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-5)


def run_onnx(path):
    """Return the function that an ONNX file is."""
    runtime = pytest.importorskip("onnxruntime", reason="the exported file is run by onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["enlarged"], {"image": x.numpy()})[0])


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_come_back(model, tmp_path, ending):
    path, known = exported(tmp_path, ending), {name: SMALL[name] for name in ("use_shuffle", "recursive", "topk")}
    again = load_model(path, **known)
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_the_published_layout(model, tmp_path):
    content = torch.load(exported(tmp_path, ".pth"), weights_only=True)
    assert set(content) == {"params", "params_ema"} and set(content["params"]) == set(model.state_dict())


def test_an_onnx_file_runs_at_other_sizes(model, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    path = exported(tmp_path, ".onnx")
    assert "at least 32 pixels a side" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.data"))
    assert_same_results(run_onnx(path), model)


def test_a_program_of_torch_runs_at_other_sizes(model, tmp_path):
    assert_same_results(torch.export.load(exported(tmp_path, ".pt2")).module(), model)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_plain_network_routes_by_itself(tmp_path, ending):
    model, path = decided(reference.SeemoRe), tmp_path / f"plain{ending}"
    model.min_size, model.in_chans = 16, 3  # what an export asks ours for
    export.export(model, path)
    assert_same_results(run_onnx(path) if ending == ".onnx" else torch.export.load(path).module(), model)


@pytest.mark.parametrize(
    "told, status, message",
    [
        (["-o", "out.txt"], 2, "out.txt ends in '.txt', expected one of .safetensors, .pth"),
        (["-o", "nowhere/out.pth"], 2, "the folder .*nowhere does not exist"),
        (["--model", "seemore_q_x2", "-o", "out.pth"], 2, "there is no shipped model 'seemore_q_x2'"),
        (["--model", "broken.pth", "-o", "out.pth"], 1, "broken.pth is not a plain file of weights"),
    ],
)
def test_what_cannot_be_exported(tmp_path, monkeypatch, capsys, told, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    assert main(["export", *told]) == status
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pth"]
