"""``seemore-fast info``: available backends, with the reasons for unavailable ones, devices, models and versions."""

import argparse
import json

from ..backends import backend_info
from ..network.checkpoint import shipped_models

HELP = "Print the backends, the devices, the shipped models and the versions, as JSON."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments: none."""


def run(options: argparse.Namespace) -> int:
    """Print them."""
    print(json.dumps({**backend_info(), "models": shipped_models()}, indent=2))
    return 0
