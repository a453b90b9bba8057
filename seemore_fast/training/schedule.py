"""Learning rate as a function of the step alone, so that a resumed run needs no state of it."""

import bisect
import math

from .config import Schedule


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor of the learning rate in `step` (from 0) of `steps`."""
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if schedule.name == "multistep":
        return schedule.gamma ** bisect.bisect_right(schedule.milestones, step)
    if schedule.name == "cosine" and step >= schedule.begin:
        done = (step - schedule.begin) / max(1, steps - schedule.begin)
        return schedule.lowest + (1 - schedule.lowest) * (1 + math.cos(math.pi * min(1, done))) / 2
    return 1.0
