"""Weights from files: layouts, detection, overrides, and everything a file can be instead."""

import os
import pickle
import zipfile
from unittest.mock import Mock

import pytest
import torch
from helpers.networks import SMALL, T
from safetensors.torch import save_file

from seemore_fast import SeemoRe, load_model, reference, seemore_b, seemore_l, seemore_t
from seemore_fast.network.checkpoint import CheckpointError, detect_config, save_model, shipped_models, unwrap


@pytest.fixture(scope="module")
def tiny():
    """A T: its depth and width are a published pair, so nothing has to be assumed."""
    torch.manual_seed(0)
    return seemore_t(2)


def assert_same(loaded, model):
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


WRAPPINGS = {
    "bare": lambda weights: weights,
    "params": lambda weights: {"params": weights},
    "params_ema": lambda weights: {"params_ema": weights, "params": {k: v + 1 for k, v in weights.items()}},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights},
    "nested": lambda weights: {"model": {"state_dict": weights}},
    "DDP": lambda weights: {"params": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "compiled": lambda weights: {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_pickled_layouts(tmp_path, tiny, wrap):
    torch.save(wrap(tiny.state_dict()), tmp_path / "weights.pth")
    assert_same(load_model(tmp_path / "weights.pth"), tiny)
    assert_same(load_model(str(tmp_path / "weights.pth")), tiny)


@pytest.mark.parametrize("wrap", ["bare", "compiled"])  # safetensors holds no dictionaries
def test_safetensors_layouts(tmp_path, tiny, wrap):
    save_file(WRAPPINGS[wrap](tiny.state_dict()), tmp_path / "weights.safetensors")
    assert_same(load_model(tmp_path / "weights.safetensors"), tiny)


@pytest.mark.parametrize("build", [seemore_t, seemore_b, seemore_l])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_sizes_are_detected(build, scale):
    with torch.device("meta"):
        model = build(scale)
    assert detect_config(model.state_dict()) == model.config


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=3, in_chans=1),
        dict(num_experts=5, lr_space="double"),
        dict(num_experts=6, lr_space="linear", global_kernel_size=7),
        dict(scale=1),
        dict(num_experts=1),
    ],
)
def test_other_shapes_are_detected(change):
    with torch.device("meta"):
        model = SeemoRe(**{**T, "scale": 2, **change})
        detected = detect_config(model.state_dict())
        rebuilt = SeemoRe(**detected)
    assert {n: p.shape for n, p in rebuilt.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    assert detected | {"lr_space": None} == model.config | {"lr_space": None}  # several may have the same ranks


# What no shape of a tensor tells
HIDDEN = dict(use_shuffle=False, topk=2, recursive=1, img_range=2.0)


def test_an_unknown_size_assumes_and_says_so(tmp_path):
    model = SeemoRe(**SMALL | HIDDEN)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    with pytest.warns(UserWarning, match="assuming use_shuffle=True, recursive=2, topk=1"):
        loaded = load_model(tmp_path / "own.pth")
    assert loaded.config == {**model.config, "use_shuffle": True, "topk": 1, "recursive": 2, "img_range": 1.0}


@pytest.mark.filterwarnings("error")
def test_overrides_win(tmp_path):
    model = SeemoRe(**SMALL | HIDDEN)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert_same(load_model(tmp_path / "own.pth", **HIDDEN), model)


@pytest.mark.filterwarnings("error")
def test_saved_models_remember_their_configuration(tmp_path):
    model = SeemoRe(**SMALL | HIDDEN)
    save_model(model, tmp_path / "own.safetensors", step=7)
    assert_same(load_model(tmp_path / "own.safetensors"), model)
    assert os.listdir(tmp_path) == ["own.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "own.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_weights_in_other_types_load_as_float32(tmp_path, tiny):
    torch.save({name: tensor.half() for name, tensor in tiny.state_dict().items()}, tmp_path / "half.pth")
    loaded = load_model(tmp_path / "half.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.conv_1.weight, tiny.conv_1.weight, rtol=1e-3, atol=1e-4)


def test_shipped_models_load_by_name():
    assert shipped_models(), "the package ships at least one model"
    for name in shipped_models():
        model = load_model(name)
        assert name.endswith(f"x{model.scale}")
    torch.testing.assert_close(seemore_t(2, pretrained=True).state_dict(), load_model("seemore_t_x2").state_dict())


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'seemore_x_x9'.*seemore_t_x2"):
        load_model("seemore_x_x9")
    with pytest.raises(ValueError, match=r"seemore_l_x4.*seemore_t_x2"):
        seemore_l(4, pretrained=True)


def test_what_does_not_fit_is_named(tmp_path, tiny):
    weights = tiny.state_dict()
    del weights["body.3.global_block.ffn.gate.bias"]
    weights["stray"] = torch.zeros(1)
    weights["conv_2.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth.*missing.*body\.3\.global_block\.ffn\.gate\.bias") as caught:
        load_model(tmp_path / "bad.pth")
    assert "1 unexpected (stray)" in str(caught.value)
    assert "conv_2.bias is (7,), expected (36,)" in str(caught.value)


def test_a_wrong_scale_is_named(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "x2.pth")
    with pytest.raises(CheckpointError, match=r"upsampler.0.weight is \(12, 36, 3, 3\), expected \(48, 36, 3, 3\)"):
        load_model(tmp_path / "x2.pth", scale=4)


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("kind", ["zip", "bare pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "zip":
        torch.save({"params": Payload()}, "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"evil\.pth.*could run code"):
        load_model("evil.pth")
    assert not (tmp_path / "pwned").exists()


def broken_files(tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    torch.save(seemore_t(2).state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("hello.txt", "hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"params": {"conv_1.weight": 3}}, tmp_path / "number.pth")
    torch.save({"conv_1.weight": torch.zeros(64, 3, 9, 9), "conv_2.weight": torch.zeros(1)}, tmp_path / "srcnn.pth")
    torch.save({"conv_1.weight": torch.zeros(3)}, tmp_path / "flat.pth")
    torch.save({}, tmp_path / "nothing.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "integer_key.pth")
    whole = seemore_t(2).state_dict()
    torch.save({name: tensor.int() for name, tensor in whole.items()}, tmp_path / "integers.pth")
    torch.save({**whole, "norm.bias": torch.zeros(36).to_sparse()}, tmp_path / "sparse.pth")
    taps = {n: t[..., :10] if n.endswith("attn.conv.0.weight") else t for n, t in whole.items()}
    torch.save(taps, tmp_path / "even_taps.pth")
    (tmp_path / "weights.bin").write_text("")
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "whole.pth")


def test_broken_files_are_named(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_model(tmp_path / name)


@pytest.mark.parametrize("config", ["[1]", "null", '{"unknown": 1}'])
def test_strange_metadata_is_ignored(tmp_path, tiny, config):
    save_file(tiny.state_dict(), tmp_path / "odd.safetensors", {"config": config})
    assert_same(load_model(tmp_path / "odd.safetensors"), tiny)


@pytest.mark.parametrize(
    "config", ["not json", '{"topk": 99}', '{"recursive": 40}', '{"recursive": "2"}', '{"img_range": "1"}']
)
def test_impossible_metadata_is_named(tmp_path, tiny, config):
    save_file(tiny.state_dict(), tmp_path / "odd.safetensors", {"config": config})
    message = "" if config == "not json" else ": (topk|recursive|img_range) is"
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors{message}"):
        load_model(tmp_path / "odd.safetensors")


def test_averaged_models_and_upper_case_names_load(tmp_path, tiny):
    torch.save(torch.optim.swa_utils.AveragedModel(tiny).state_dict(), tmp_path / "EMA.PTH")
    assert_same(load_model(tmp_path / "EMA.PTH"), tiny)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        load_model(tmp_path)


def test_strange_ranks_are_named(tiny):
    weights = tiny.state_dict()
    weights["body.0.local_block.block.moe_layer.experts.2.conv_1.weight"] = torch.zeros(9, 36, 1, 1)
    with pytest.raises(CheckpointError, match=r"ranks \(2, 4, 9\)"):
        detect_config(weights)


def test_unwrap_refuses_what_is_no_state_dict():
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        unwrap(torch.zeros(1))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, tiny):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    monkeypatch.setattr("safetensors.torch.save_file", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_the_plain_model_takes_the_same_weights(tiny):
    plain = reference.SeemoRe(**tiny.config)
    assert plain.load_state_dict(tiny.state_dict())
