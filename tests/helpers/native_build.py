"""The module that writes the build of the native libraries, csrc/build.py."""

import sys

from . import CSRC

sys.path.insert(0, str(CSRC))
import build as native

sys.path.remove(str(CSRC))

__all__ = ["native"]
