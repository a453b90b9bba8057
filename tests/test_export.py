"""Exported graphs route by themselves, at sizes and for images other than those they were traced with."""

import pytest
import torch
from helpers.networks import SMALL, route_apart

from seemore_fast import SeemoRe, reference

# torch treats a size of one apart from all others, so the aggregated map must stay larger: 2 * 4^recursive.
DYNAMIC = {
    "x": {
        0: torch.export.Dim("batch", min=1, max=64),
        2: torch.export.Dim("height", min=32),
        3: torch.export.Dim("width", min=32),
    }
}
SIZES = [(1, 32, 32), (3, 33, 47), (4, 64, 50)]


@pytest.fixture(params=[SeemoRe, reference.SeemoRe], ids=["fused", "plain"])
def model(request):
    return request.param(**SMALL).eval()


def images(batch, height, width):
    """Return images of unlike brightness: with `route_apart`, they choose different experts."""
    brightness = torch.tensor([0.1, 1, 0.5, 2])[:batch, None, None, None]
    return torch.rand(batch, 3, height, width) * brightness


@torch.no_grad()
def test_exported_program_routes_by_itself(model):
    assert len(route_apart(model, images(4, 24, 40)).unique()) > 1
    program = torch.export.export(model, (images(2, 48, 64),), dynamic_shapes=DYNAMIC, strict=False).module()
    for size in SIZES:
        x = images(*size)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_onnx_graph_routes_by_itself(model, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="the exported file is run by onnxruntime")
    assert len(route_apart(model, images(4, 24, 40)).unique()) > 1
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(2, 48, 64),), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = images(*size)
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(y, model(x), rtol=0, atol=1e-5)
