"""``seemore-fast analyze``: routing, features, receptive field and cost of a network."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..analysis.features import feature_maps
from ..analysis.operations import PUBLISHED, operations, total
from ..analysis.receptive import receptive_field, side_of
from ..analysis.routing import as_batch, choices_of, mean_rank, trend, usage_by_set, write_csv
from ..errors import UsageError
from ..evaluation.pairs import find_sets, read_plain
from ..io.atomic import replacing, unwritable_reason
from ..network.checkpoint import load_model
from ..network.config import PRESETS
from ..network.inspection import moe_layers
from ..network.model import SeemoRe
from .exits import DONE, FAILED

HELP = "Analyze a network: routing, features, receptive field, operations."
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the kinds of analysis, and their arguments."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    routing = kinds.add_parser("routing", help="heat map of the experts each group chooses, by data set")
    features = kinds.add_parser("features", help="features before and after MoRE and SEE, as in the paper's Figure 5")
    receptive = kinds.add_parser("receptive", help="picture of the effective receptive field, by gradient")
    operations = kinds.add_parser("operations", help="table of parameters and multiply-adds by operator")
    for kind in (routing, features, receptive):
        name = kind.prog.rpartition(" ")[2]
        kind.add_argument("--model", default="seemore_t_x2", metavar="NAME|PATH", help="shipped model or weights file")
        kind.add_argument("-o", "--output", type=Path, default=Path(f"{name}.png"), help=f"default: {name}.png")
    routing.add_argument(
        "--data", required=True, action="append", type=Path, metavar="DIR",
        help="folder of HR images, or one that contains HR and LR_bicubic/X<scale>; may be repeated",
    )  # fmt: skip
    routing.add_argument("--csv", type=Path, metavar="FILE", help="also write a row per image and group")
    for kind in (features, receptive):
        kind.add_argument("--image", required=True, type=Path, metavar="FILE", help="the network's input")
    receptive.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the analyzed centre of the image (default: up to 64)"
    )
    operations.add_argument("variant", nargs="*", metavar="key=value", help="such as model.global_kernel_size=7")
    operations.add_argument("--model", metavar="NAME|PATH", help="default: --preset")
    operations.add_argument("--preset", choices=("t", "b", "l"), help="default: t")
    operations.add_argument("--scale", type=int, choices=(2, 3, 4), help="of the preset (default: 2)")
    operations.add_argument(
        "--output-size", default="1280x720", metavar="WxH", help="of the upscaled image (default: 1280x720)"
    )


def run(options: argparse.Namespace) -> int:
    """Run one kind of analysis."""
    picture = vars(options).get("output")
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"{picture} ends in {picture.suffix!r}, expected {', '.join(PICTURES)}")
    for path in (picture, vars(options).get("csv")):
        if path and (reason := unwritable_reason(path)):
            raise UsageError(reason)
    kinds = {"routing": _routing, "features": _features, "receptive": _receptive, "operations": _operations}
    return kinds[options.kind](options)


def _routing(options: argparse.Namespace) -> int:
    plots, model = _plots(), _model(options.model)
    sets = find_sets(options.data, model.scale)
    choices, ranks = [], moe_layers(model)[0].ranks
    every = (choice for name, pairs in sets.items() for choice in choices_of(model, name, pairs))
    try:
        for choice in tqdm(every, "routing", sum(map(len, sets.values())), unit="image"):
            choices.append(choice)
    finally:  # an interrupted run still reports its results
        shares = usage_by_set(choices)
        for name, share in shares.items():
            print(f"{name}: mean rank by group {', '.join(f'{rank:.2f}' for rank in mean_rank(share, ranks))}")
            print(f"{'':{len(name)}}  correlation with depth {trend(share, ranks):+.2f} (below 0: deeper, lower)")
        if options.csv and choices:
            with replacing(options.csv) as temporary:
                write_csv(temporary, choices, ranks)
        if shares:
            title = f"Experts chosen by {_name(options.model)}"
            plots.save(plots.heat_map(shares, ranks, title), options.output)
            print(f"wrote {options.output}")
    failed = [choice for choice in choices if choice.error]
    for choice in failed:
        print(f"left out: {choice.error}", file=sys.stderr)
    return FAILED if failed else DONE


def _features(options: argparse.Namespace) -> int:
    plots, model = _plots(), _model(options.model)
    maps = feature_maps(model, _image(options.image))
    title = f"Mean magnitude of features, {_name(options.model)}, {options.image.name}"
    plots.save(plots.grid(maps, title), options.output)
    print(f"wrote {options.output}")
    return DONE


def _receptive(options: argparse.Namespace) -> int:
    plots, model, x = _plots(), _model(options.model), _image(options.image)
    most = min(x.shape[2:])
    size = min(64, most) if options.size is None else options.size
    if not model.min_size <= size <= most:
        raise UsageError(
            f"the analyzed part of {options.image} has {size} pixels a side, expected {model.min_size} (the network's "
            f"minimum) to {most} (the image's): give another --size or image"
        )
    top, left = ((n - size) // 2 for n in x.shape[2:])
    field = receptive_field(model, x[:, :, top : top + size, left : left + size])
    sides = {share: side_of(field, share) for share in (0.5, 0.9, 0.99)}
    for share, side in sides.items():
        print(f"{share:.0%} of the gradient of the middle pixel lies within {side}x{side} pixels")
    plots.save(plots.field_picture(field, sides, f"Receptive field of {_name(options.model)}"), options.output)
    print(f"wrote {options.output}")
    return DONE


def _operations(options: argparse.Namespace) -> int:
    if options.model and (options.preset or options.scale or options.variant):
        raise UsageError("--model defines the whole network: leave out --preset, --scale and key=value")
    if options.model:
        config, title = _model(options.model).config, _name(options.model)
    else:
        preset, scale = options.preset or "t", options.scale or 2
        config = _variant(preset, scale, options.variant)
        title = ", ".join([f"{preset.upper()} x{scale}", *options.variant])
    size = next((size for size, own in PRESETS.items() if all(config[key] == own[key] for key in own)), None)
    known = PUBLISHED.get((size or "", config["scale"]))
    width, height = _size(options.output_size, config["scale"])
    table = operations(config, height // config["scale"], width // config["scale"])
    every = total(table)
    print(f"{title}, {width}x{height} pixels of output")
    print(f"{'operator':<30} {'parameters':>10} {'GMAC':>8} {'share':>6}")
    for name, cost in [*table.items(), ("all", every)]:
        print(f"{name:<30} {cost.parameters:>10,} {cost.macs / 1e9:>8.2f} {cost.macs / every.macs:>6.1%}")
    if known and (width, height) == (1280, 720):
        print(f"{'published':<30} {known[0]:>10,} {known[1]:>8.1f}")
    return DONE


def _variant(preset: str, scale: int, overrides: list[str]) -> dict:
    """Return the arguments of a published network with overrides, in the form of a recipe's."""
    if not overrides:
        return {"scale": scale, **PRESETS[preset]}
    for line in overrides:
        if not line.startswith("model.") or line.startswith(("model.preset", "model.scale")):
            raise UsageError(f"{line}: expected a key of model other than preset and scale, which are options")
    try:
        from ..training.config import Model
        from ..training.loading import build
        from ..training.sections import Section
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'seemore-fast[train]'") from None

    class Variant(Section):
        model: Model

    content = {"model": {"preset": preset, "scale": scale}}
    try:
        return SeemoRe(**build(Variant, content, "--preset", overrides).model.arguments()).config
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def _size(text: str, scale: int) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) >= scale for part in parts):
        raise UsageError(f"--output-size is {text!r}, expected WxH, at least {scale}x{scale}, such as 1280x720")
    return int(parts[0]), int(parts[1])


def _plots():
    try:
        from ..analysis import plots
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'seemore-fast[analyze]'") from None
    return plots


def _model(name: str):
    try:
        model = load_model(name)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    if model.in_chans != 3:
        raise UsageError(f"{name} takes {model.in_chans} channels, expected 3: images are read as RGB")
    return model.requires_grad_(False).eval()


def _image(path: Path):
    return as_batch(read_plain(path))


def _name(model: str) -> str:
    return Path(model).stem
