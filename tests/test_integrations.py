"""Integrations with BasicSR and spandrel. Environment: requirements-integrations.txt."""

import importlib
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

import seemore_fast
from seemore_fast import accelerate, reference
from seemore_fast.network.config import PRESETS

pytestmark = pytest.mark.slow

OPTIONS = """
network_g: {{type: SeemoReFast, scale: 2, in_chans: 3, num_experts: 3, img_range: 1., num_layers: {num_layers},
  embedding_dim: {embedding_dim}, use_shuffle: {use_shuffle}, lr_space: exp, topk: 1, recursive: {recursive},
  global_kernel_size: 11}}
"""


def plain_model(size: str = "t") -> reference.SeemoRe:
    """Return a plain SeemoRe x2 with all parameters random, also of LayerNorms and biases."""
    torch.manual_seed(0)
    model = reference.SeemoRe(scale=2, **PRESETS[size]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def picture(height: int = 37, width: int = 50) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def torchvision():
    """The torchvision that both frameworks import, made importable beside a torch it was not built for."""
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        module = importlib.import_module("torchvision")
    except RuntimeError:  # a CUDA build beside a CPU torch: its operators do not load
        for name in ("nms", "qnms"):  # needed at import, by no test
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        module = importlib.import_module("torchvision")
    return module


@pytest.fixture(scope="module")
def basicsr(torchvision):
    """The integration module, beside the real BasicSR."""
    old = "torchvision.transforms.functional_tensor"  # torchvision 0.17 removed it, BasicSR 1.4.2 imports it
    if find_spec(old) is None:
        sys.modules[old] = importlib.import_module("torchvision.transforms.functional")
    pytest.importorskip("basicsr", reason="BasicSR is not installed")
    yield importlib.import_module("seemore_fast.integrations.basicsr")
    sys.modules.pop(old, None)


@pytest.fixture
def spandrel(torchvision):
    """The real spandrel; additions of a test to its main registry are removed again."""
    module = pytest.importorskip("spandrel", reason="spandrel is not installed")
    untouched = dict(vars(module.MAIN_REGISTRY))
    yield module
    vars(module.MAIN_REGISTRY).update(untouched)


@pytest.fixture
def integration(spandrel):
    return importlib.import_module("seemore_fast.integrations.spandrel")


def network_options(size: str) -> dict:
    import yaml
    from basicsr.utils.options import ordered_yaml

    return yaml.load(OPTIONS.format(**PRESETS[size]), Loader=ordered_yaml()[0])["network_g"]


@pytest.mark.parametrize("framework", ["basicsr", "spandrel"])
def test_missing_framework(framework, monkeypatch):
    for name in (framework, "basicsr.utils.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"seemore_fast.integrations.{framework}", raising=False)
    importlib.import_module("seemore_fast.integrations")
    with pytest.raises(ImportError, match=f"pip install {framework}"):
        importlib.import_module(f"seemore_fast.integrations.{framework}")


@pytest.mark.parametrize("size", ["t", "l"])
def test_basicsr_builds_from_yml(basicsr, size):
    from basicsr.archs import build_network

    model, plain = build_network(network_options(size)).eval(), plain_model(size)
    assert isinstance(model, seemore_fast.SeemoRe) and type(model).__name__ == "SeemoReFast"
    model.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert_close(model(picture()), plain(picture()))


def test_basicsr_registers_once(basicsr):
    from basicsr.utils.registry import ARCH_REGISTRY, Registry

    fork = Registry("arch of a fork")
    for _ in range(2):
        basicsr = importlib.reload(importlib.import_module("seemore_fast.integrations.basicsr"))
        basicsr.register()
        basicsr.register(fork)
    assert list(fork.keys()) == ["SeemoReFast"]
    for registry in (ARCH_REGISTRY, fork):
        assert issubclass(registry.get("SeemoReFast"), seemore_fast.SeemoRe)


def test_basicsr_trains_and_resumes(basicsr, tmp_path):
    from basicsr.models import build_model

    plain = plain_model()
    torch.save({key: plain.state_dict() for key in ("params", "params_ema")}, tmp_path / "net_g.pth")
    training = {
        "ema_decay": 0.9, "total_iter": 1, "optim_g": {"type": "Adam", "lr": 1e-3},
        "scheduler": {"type": "MultiStepLR", "milestones": [1]}, "pixel_opt": {"type": "L1Loss"},
    }  # fmt: skip
    options = {
        "model_type": "SRModel", "num_gpu": 0, "dist": False, "is_train": True, "network_g": network_options("t"),
        "path": {"pretrain_network_g": str(tmp_path / "net_g.pth"), "models": str(tmp_path)}, "train": training,
    }  # fmt: skip
    model = build_model(options)
    lq = picture(24, 24)
    with torch.no_grad():
        assert_close(model.net_g(lq), plain(lq))
    model.feed_data({"lq": lq, "gt": torch.rand(1, 3, 48, 48)})
    model.optimize_parameters(1)
    model.save_network([model.net_g, model.net_g_ema], "net_g", 1, param_key=["params", "params_ema"])
    saved = torch.load(tmp_path / "net_g_1.pth")
    assert list(saved["params"]) == list(plain.state_dict())
    assert not torch.equal(saved["params"]["conv_2.weight"], plain.conv_2.weight)
    model.test()
    resumed = seemore_fast.load_model(tmp_path / "net_g_1.pth")
    with torch.no_grad():
        assert_close(model.output, resumed(lq))


@pytest.fixture(params=[".pth", ".pth under params", ".safetensors"])
def checkpoint(request, tmp_path):
    """A file with the weights of `plain_model`."""
    suffix, _, key = request.param.partition(" under ")
    path, weights = tmp_path / f"seemore{suffix}", plain_model().state_dict()
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({key: weights} if key else weights, path)
    return path


def test_spandrel_loads_ours_after_install(spandrel, integration, checkpoint):
    before = spandrel.ModelLoader().load_from_file(checkpoint)
    assert type(before.model).__module__.startswith("spandrel.")
    integration.install()
    after = spandrel.ModelLoader().load_from_file(checkpoint)
    assert isinstance(after, spandrel.ImageModelDescriptor)
    assert type(after.model) is seemore_fast.SeemoRe
    assert after.architecture.id == "SeemoReFast"
    for name in ("tags", "scale", "purpose", "input_channels", "output_channels"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.supports_half and after.supports_bfloat16
    assert after.size_requirements.none and after.tiling is spandrel.ModelTiling.DISCOURAGED
    assert_close(after(picture()), before(picture()))
    assert_close(after(picture()), plain_model()(picture()).detach().clamp(0, 1))
    assert after(picture(5, 9)).shape == (1, 3, 10, 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spandrel_keeps_the_dtype(integration, dtype):
    descriptor = integration.SeemoReFastArch().load(plain_model().state_dict()).to(dtype)
    image = picture().to(dtype)
    result = descriptor(image)
    assert result.dtype == dtype
    assert_close(result.float(), plain_model()(image.float()).detach().clamp(0, 1), tolerance=0.02)


def test_spandrel_installs_once_in_the_given_registry(spandrel, integration):
    registry = spandrel.MAIN_REGISTRY.copy()
    for _ in range(2):
        integration.install(registry)
    assert len(registry) == len(spandrel.MAIN_REGISTRY) + 1
    assert "SeemoReFast" not in spandrel.MAIN_REGISTRY
    order = [support.architecture.id for support in registry.architectures("detection")]
    assert order.index("SeemoReFast") == order.index("SeemoRe") - 1
    empty = spandrel.ArchRegistry()
    integration.install(empty)
    assert "SeemoReFast" in empty


def test_spandrel_still_loads_other_architectures(spandrel, integration):
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.SPAN import SPAN

    integration.install()
    for model in (Compact(num_feat=8, num_conv=2, upscale=2), SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8)):
        loaded = spandrel.ModelLoader().load_from_state_dict(model.state_dict())
        assert type(loaded.model) is type(model)


def test_accelerate_a_descriptor_of_spandrel(spandrel, checkpoint):
    descriptor = spandrel.ModelLoader().load_from_file(checkpoint)
    model = accelerate(descriptor)
    theirs, ours = dict(descriptor.model.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    with torch.inference_mode():
        assert_close(model(picture()), descriptor.model(picture()))
