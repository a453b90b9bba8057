"""The demonstration: ``python -m seemore_fast.demo``. The photo, chelsea.png, is CC0 by Stéfan van der Walt."""

from pathlib import Path

PHOTO = Path(__file__).with_name("chelsea.png")
