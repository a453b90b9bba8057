"""Compare the loop of `seemore-fast train` with its bare step on one batch: what data, records and checkpoints cost.

    seemore-fast benchmark loop --data photos         (or: python benchmarks/training_loop.py ...)

Both are T for scale 2 on 8 patches of 64x64 pixels with Adam and averaged weights, in turns. The loop cuts its patches,
shows its progress, writes a line of records and, at the end of each turn, a checkpoint. A run writes loop.json.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from seemore_fast.benchmarks import command, harness

SETTING = ["model.preset=t", "model.scale=2", "data.batch=8", "data.patch=64", "steps=1000000000", "log.every=10",
           "validation.every=1000000000", "checkpoint.every=1000000000"]  # fmt: skip
STEPS, TURNS = 50, 5
QUICK = ["model.num_layers=1", "model.embedding_dim=12", "data.batch=2", "data.patch=16"]
LEAST = 0.95  # of the bare step's speed
BARE, LOOP = f"{harness.OURS} bare step", f"{harness.OURS} loop"


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: only a run of full length writes)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.turns < 1:
        parser.error("--steps and --turns are to be at least 1")
    if absent := harness.missing("yaml") or harness.missing("pydantic"):
        parser.error(absent.replace("[bench]", "[train]"))
    from seemore_fast.training.config import Config, ConfigError, build
    from seemore_fast.training.distributed import init_distributed
    from seemore_fast.training.trainer import Trainer

    try:
        world = init_distributed(options.device)
    except ConfigError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:

        def trainer(name: str) -> Trainer:
            content = {"out": f"{folder}/{name}", "data": {"train": options.data, "cache": f"{folder}/cache"}}
            overrides = [*SETTING, *(QUICK if options.quick else [])]
            return Trainer(build(Config, content, "this benchmark", overrides), world)

        try:
            loop, bare = trainer("loop"), trainer("bare")
        except ConfigError as error:
            parser.error(str(error))
        batch = tuple(images.to(world.device) for images in bare.batches[0])

        def steps():
            for _ in range(options.steps):
                loss = bare.train_step(*batch)
            return loss.item()

        turns = {BARE: steps, LOOP: lambda: loop.run(loop.step + options.steps)}
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            lines = command.time_in_turns(turns, options.turns, options.steps)
    title = "tiny" if options.quick else "T x2 8x64x64"
    command.print_table(title, lines)
    share = lines[BARE]["ms"] / lines[LOOP]["ms"]
    print(f"\nthe loop has {share:.1%} of the bare step's speed, expected at least {LEAST:.0%}")
    if options.results or (options.steps, options.turns, options.quick) == (STEPS, TURNS, False):
        command.write_tables("loop", options.results, world.device, options.turns, {title: lines})


if __name__ == "__main__":
    main()
