"""The module that writes the build of the native libraries, csrc/native_build.py."""

import sys

from . import CSRC

sys.path.insert(0, str(CSRC))
import native_build as native

sys.path.remove(str(CSRC))

__all__ = ["native"]
