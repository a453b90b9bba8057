"""Analysis of networks, against counts and gradients computed another way; and its command."""

import numpy as np
import pytest
import torch
from helpers.images import noise
from helpers.tables import read_csv
from PIL import Image
from torch.nn.functional import channel_shuffle

from seemore_fast import SeemoRe, cli
from seemore_fast.analysis import features, operations, receptive, routing
from seemore_fast.evaluation.pairs import find_pairs
from seemore_fast.network.checkpoint import save_model
from seemore_fast.network.config import PRESETS
from seemore_fast.network.inspection import forward_hooks

plots = pytest.importorskip("seemore_fast.analysis.plots", reason="needs matplotlib")


def network(**overrides) -> SeemoRe:
    torch.manual_seed(3)
    return SeemoRe(**{"scale": 2, **PRESETS["t"], "num_layers": 2, "embedding_dim": 12, **overrides}).eval()


@pytest.fixture
def folder(tmp_path):
    """Two images of a data set called Noise."""
    folder = tmp_path / "Noise"
    folder.mkdir()
    for name in ("one", "two"):
        Image.fromarray(noise(50, 44, 3)).save(folder / f"{name}.png")
    return folder


# Operations


@pytest.mark.parametrize(("preset", "scale"), operations.PUBLISHED)
def test_operations_add_up_to_the_published_totals(preset, scale):
    """Rows cut off because the scale does not divide them change the last digit at most."""
    config = {"scale": scale, **PRESETS[preset]}
    parameters, macs = operations.total(operations.operations(config, 720 // scale, 1280 // scale))
    published = operations.PUBLISHED[preset, scale]
    with torch.device("meta"):
        assert parameters == published[0] == sum(p.numel() for p in SeemoRe(**config).parameters())
    assert macs / 1e9 == pytest.approx(published[1], abs=0.06)


def test_operations_count_the_largest_experts():
    c, pixels = 12, 32 * 48
    for topk, ranks in ((1, 8), (2, 8 + 4), (3, 8 + 4 + 2)):
        config = network(topk=topk).config
        macs = operations.operations(config, 32, 48)["low_rank_experts"].macs
        assert macs == config["num_layers"] * pixels * (3 * c * ranks + c * c)  # with the projection


def test_operations_of_small_maps():
    config = network(num_layers=1).config
    small = (35 // 4) * (50 // 4) * 12 * 16 + (35 // 16) * (50 // 16) * 12 * (16 + 9 + 12)
    assert operations.operations(config, 35, 50)["calibrate"].macs == small


# Routing


def test_usage_is_the_choice_of_the_router():
    model, x = network(topk=2), torch.rand(3, 3, 40, 36)
    usage = routing.expert_usage(model, x)
    assert usage.shape == (2, 3) and usage.sum(dim=1).tolist() == [6, 6]
    f = model.conv_1(x - model.mean)
    block = model.body[0].local_block
    u = channel_shuffle(block.block.conv_1(block.norm_1(f)), 2)
    a = block.block.conv_2(u.chunk(2, dim=1)[0])
    chosen = block.block.moe_layer.gate.body[2](a.mean(dim=(2, 3))).topk(2).indices
    assert usage[0].tolist() == torch.bincount(chosen.flatten(), minlength=3).tolist()


def test_hooks_leave_the_model_unchanged():
    model, x = network(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        routing.expert_usage(model, x)
        features.feature_maps(model, x)
        assert torch.equal(model(x), before)
    assert model.is_unmodified()


def test_shares_ranks_and_trend():
    choices = [
        routing.Choice("A", "1", torch.tensor([[1, 0, 0], [0, 0, 1]])),
        routing.Choice("A", "2", torch.tensor([[0, 1, 0], [0, 0, 1]])),
        routing.Choice("A", "3", None, "damaged"),
        routing.Choice("B", "4", torch.tensor([[0, 0, 1], [1, 0, 0]])),
    ]
    shares = routing.usage_by_set(choices)
    assert shares["A"].tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
    assert routing.mean_rank(shares["A"], [2, 4, 8]).tolist() == [3, 8]
    assert routing.trend(shares["A"], [2, 4, 8]) == pytest.approx(1)
    assert routing.trend(shares["B"], [2, 4, 8]) == pytest.approx(-1)
    assert np.isnan(routing.trend(torch.ones(1, 3) / 3, [2, 4, 8]))


def test_a_damaged_and_a_too_large_image_do_not_affect_the_rest(folder, monkeypatch):
    def usage(model, x, real=routing.expert_usage):
        return real(model, x) if calls.append(x) or len(calls) > 1 else x.new_empty(2**60)

    calls = []
    monkeypatch.setattr(routing, "expert_usage", usage)
    (folder / "bad.png").write_bytes(b"no image")
    bad, large, *rest = routing.choices_of(network(), "Noise", find_pairs(folder, 2))
    assert bad.usage is None and "bad.png" in bad.error
    assert large.usage is None and large.error.startswith(f"{folder}") and "memory" in large.error
    assert rest and all(choice.usage is not None for choice in rest)


# Features and receptive field


def test_feature_maps_are_of_inputs_and_outputs():
    model, x = network(), torch.rand(1, 3, 40, 36)
    maps = features.feature_maps(model, x)
    assert {name: (len(m.before), len(m.after)) for name, m in maps.items()} == {"MoRE": (2, 2), "SEE": (2, 2)}
    seen, see = [], model.body[1].global_block.block
    with torch.no_grad(), forward_hooks([see], lambda module, inputs, output: seen.extend((inputs[0], output))):
        model(x)
    for recorded, feature in zip((maps["SEE"].before[1], maps["SEE"].after[1]), seen, strict=True):
        torch.testing.assert_close(recorded, feature[0].abs().mean(dim=0))


def test_receptive_field_of_a_mean():
    blur = torch.nn.Sequential(torch.nn.AvgPool2d(5, stride=1, padding=2), torch.nn.Upsample(scale_factor=2))
    field = receptive.receptive_field(blur, torch.rand(2, 3, 33, 33))
    wanted = torch.zeros(33, 33)
    wanted[14:19, 14:19] = 1 / 25
    torch.testing.assert_close(field, wanted)
    assert [receptive.side_of(field, share) for share in (0.03, 0.5, 1.0)] == [1, 5, 5]


def test_receptive_field_of_a_network_against_differences():
    """One input pixel at a time, in float64, so that differences are exact enough."""
    model, x = network(num_layers=1).double(), torch.rand(1, 3, 17, 17, dtype=torch.float64, requires_grad=True)
    model.requires_grad_(False)
    field = receptive.receptive_field(model, x.detach())
    middle = lambda image: model(image)[..., 16:18, 16:18].mean()  # noqa: E731
    (gradient,) = torch.autograd.grad(middle(x), x)
    for place in ((0, 0, 8, 8), (0, 1, 3, 12), (0, 2, 16, 0)):
        step = torch.zeros_like(x)
        step[place] = 1e-5
        moved = (middle(x + step) - middle(x - step)) / 2e-5
        assert gradient[place].item() == pytest.approx(moved.item(), rel=1e-5, abs=1e-12)
    wanted = gradient[0].abs().sum(dim=0)
    torch.testing.assert_close(field.double(), wanted / wanted.sum(), rtol=1e-5, atol=1e-9)


# The command


@pytest.fixture
def weights(tmp_path):
    save_model(network(), tmp_path / "small.safetensors")
    return str(tmp_path / "small.safetensors")


def test_routing_command(folder, weights, tmp_path, capsys):
    picture, table = tmp_path / "routing.png", tmp_path / "routing.csv"
    arguments = ["analyze", "routing", "--model", weights, "--data", str(folder)]
    assert cli.main([*arguments, "-o", str(picture), "--csv", str(table)]) == 0
    assert "Noise: mean rank by group" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert min(image.size) > 200
    rows = read_csv(table)
    assert [(row["image"], row["group"]) for row in rows] == [("one", "1"), ("one", "2"), ("two", "1"), ("two", "2")]
    assert all(sum(int(row[f"rank_{rank}"]) for rank in (2, 4, 8)) == 1 for row in rows)


@pytest.mark.parametrize("kind", ["features", "receptive --size 32"])
def test_picture_commands(kind, folder, weights, tmp_path):
    picture = tmp_path / "picture.svg"
    arguments = ["--model", weights, "--image", str(folder / "one.png"), "-o", str(picture)]
    assert cli.main(["analyze", *kind.split(), *arguments]) == 0
    assert "</svg>" in picture.read_text()


def test_operations_of_a_variant_and_of_a_model(capsys):
    def parameters(*arguments):
        assert cli.main(["analyze", "operations", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line[:30].strip(): int(line[30:41].replace(",", "")) for line in lines[2:]}

    whole = parameters()
    assert whole["published"] == whole["all"] and whole == parameters("--model", "seemore_t_x2")
    narrow = parameters("model.global_kernel_size=7", "model.num_layers=3")
    assert narrow.keys() == whole.keys() - {"published"}
    assert narrow["striped_conv (SEE)"] < whole["striped_conv (SEE)"] / 2


def test_operations_command(capsys):
    assert cli.main(["analyze", "operations", "--preset", "b", "--scale", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["published", "505,952", "26.3"]
    assert lines[-2].split()[1:3] == ["505,952", "26.34"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["routing", "--data", "{folder}/nowhere"], "does not exist"),
        (["routing", "--data", "{folder}", "-o", "{folder}/a.bmp"], "expected .png, .svg, .pdf"),
        (["routing", "--data", "{folder}", "-o", "{folder}/no/a.png"], "does not exist: create it first"),
        (["features", "--image", "{folder}/nothing.png"], "nothing.png"),
        (["receptive", "--image", "{folder}/one.png", "--size", "64"], "to 44 (the image"),
        (["receptive", "--model", "seemore_z", "--image", "{folder}/one.png"], "there is no shipped model"),
        (["operations", "--output-size", "720p"], "expected WxH"),
        (["operations", "--model", "seemore_t_x2", "--preset", "b"], "--model defines the whole network"),
        (["operations", "model.topk=4"], "topk"),
        (["operations", "model.depth=4"], "there is no key model.depth"),
        (["operations", "data.batch=4"], "data.batch=4: expected a key of model"),
        (["operations", "model.preset=b"], "model.preset=b: expected a key of model"),
    ],
)
def test_wrong_usage_is_explained(arguments, said, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["analyze", *(word.format(folder=folder) for word in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["Noise"]
