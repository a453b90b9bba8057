"""`seemore-fast train` for torchrun: ``torchrun --nproc_per_node=N -m seemore_fast.training CONFIG key=value ...``."""

import sys

from ..cli import main

sys.exit(main(["train", *sys.argv[1:]]))
