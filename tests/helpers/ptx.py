"""Figures of compiled kernels."""

import re


def widest(instruction: str, ptx: str) -> int:
    """Return how many bytes a thread moves at a time by the widest `instruction` on global memory."""
    found = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max((int(lanes or 1) * int(bits) // 8 for lanes, bits in found), default=0)
