"""``seemore-fast train``: a training run from a configuration."""

import argparse
import sys

from ..errors import ConfigError, UsageError
from .exits import DONE

HELP = "Train a network from a YAML configuration; torchrun runs it on several GPUs or machines."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("config", help="a recipe of the package (t_x2, ...), a .yml file, or an option file of BasicSR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.train=photos data.batch=8")
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="continue from the newest checkpoint in `out` or from a file"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop after this step, with a checkpoint")


def run(options: argparse.Namespace) -> int:
    """Train; a run that was asked to stop and has saved its state counts as done."""
    try:
        from ..training.loading import load_config
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'seemore-fast[train]'") from None
    from ..training.distributed import init_distributed
    from ..training.trainer import Trainer

    config, notes = load_config(options.config, options.overrides)
    if options.until is not None and options.until < 1:
        raise UsageError(f"--until is {options.until}, expected at least 1")
    world = init_distributed(options.device)
    try:
        if world.is_first:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        Trainer(config, world, options.resume).run(options.until)
    except ConfigError as error:
        raise ConfigError(f"{options.config}: {error}") from None
    finally:
        world.close()
    return DONE
