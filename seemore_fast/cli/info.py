"""``seemore-fast info``: what is available here, and why the rest is not."""

import argparse
import json

HELP = "Print the backends, the devices, the shipped models and the versions, as JSON."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments: none."""


def run(options: argparse.Namespace) -> int:
    """Print the facts."""
    from .. import backend_info
    from ..network.checkpoint import shipped_models

    print(json.dumps({**backend_info(), "models": shipped_models()}, indent=2))
    return 0
