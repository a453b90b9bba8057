"""Time the training loop beside its bare step on one batch: the cost of data, logging and checkpoints.

    seemore-fast benchmark loop --data photos         (or: python benchmarks/loop.py ...)

Both are T for scale 2 on 8 patches of 64x64 pixels with Adam and averaged weights, in turns. The loop cuts patches,
shows progress, writes log lines and, at the end of each turn, a checkpoint. A complete run writes loop.json.
"""

import contextlib
import io
import tempfile

from seemore_fast.benchmarks import command, harness

SETTING = ["model.preset=t", "model.scale=2", "data.batch=8", "data.patch=64", "steps=1000000000", "log.every=10",
           "validation.every=1000000000", "checkpoint.every=1000000000"]  # fmt: skip
STEPS, TURNS = 50, 5
QUICK = ["model.num_layers=1", "model.embedding_dim=12", "data.batch=2", "data.patch=16"]
EXPECTED = 0.95  # of the bare step's speed
BARE, LOOP = f"{harness.OURS} bare step", f"{harness.OURS} loop"


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a turn (default: %(default)s)")
    command.add_turn_options(parser, TURNS)
    options = parser.parse_args(arguments)
    command.check_counts(parser, options)
    if absent := harness.missing("yaml") or harness.missing("pydantic"):
        parser.error(absent.replace("[bench]", "[train]"))
    from seemore_fast.errors import ConfigError
    from seemore_fast.training.config import Config
    from seemore_fast.training.distributed import init_distributed
    from seemore_fast.training.loading import build
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
            rows = command.time_in_turns(turns, options.turns, options.steps)
    title = "tiny" if options.quick else "T x2 8x64x64"
    command.print_table(title, rows)
    share = rows[BARE]["ms"] / rows[LOOP]["ms"]
    print(f"\nthe loop reaches {share:.1%} of the bare step's speed, expected at least {EXPECTED:.0%}")
    if options.results or (options.steps, options.turns, options.quick) == (STEPS, TURNS, False):
        command.write_tables("loop", options.results, world.device, options.turns, {title: rows})


if __name__ == "__main__":
    main()
