"""The command line: ``seemore-fast COMMAND``."""

import argparse
import io
import sys

from .._version import __version__
from ..errors import CheckpointError, SeemoreError, TrainingError
from . import analyze, benchmark, evaluate, export, info, train, upscale
from .exits import FAILED, INTERRUPTED, USAGE


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted."""

    parser = argparse.ArgumentParser(prog="seemore-fast", description="Fast SeemoRe super-resolution.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (upscale, train, evaluate, analyze, export, benchmark, info):
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train" and not any(word.startswith("-") for word in rest):
        options.overrides += rest  # that come after an option, where argparse looks for none
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be undecodable
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return options.run(options)
    except SeemoreError as error:
        print(f"seemore-fast {options.command}: {error}", file=sys.stderr)
        return FAILED if isinstance(error, (CheckpointError, TrainingError)) else USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # such as a closed standard output
        print(f"seemore-fast {options.command}: {error}", file=sys.stderr)
        return FAILED
