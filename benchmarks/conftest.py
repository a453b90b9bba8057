"""Options of `pytest benchmarks/`."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("seemore-fast")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--bench-quick", action="store_true", help="tiny cases, one round: a smoke test")
    group.addoption("--bench-rounds", type=int, default=20, help="timed calls of each provider (default: 20)")
    group.addoption("--bench-compile", action="store_true", help="time torch.compile, too")
