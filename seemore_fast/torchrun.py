"""Position of this process among those that torchrun started."""

import os
from typing import NamedTuple


class Position(NamedTuple):
    """Rank among all processes, their number, and rank among those of this machine (None without torchrun)."""

    rank: int
    world: int
    local_rank: int | None


def position() -> Position:
    """Return the position that torchrun's environment variables give."""
    local = os.environ.get("LOCAL_RANK")
    return Position(
        int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), None if local is None else int(local)
    )
