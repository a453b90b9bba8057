"""Results of benchmarks, an operator to measure, and the processes of a run."""

import contextlib
import json
from pathlib import Path


def scaled_sum(x, gate):
    return 3 * x + gate


def figures(path):
    facts = json.loads(path.read_text())
    assert facts.keys() >= {"device", "date", "commit", "uncommitted", "backend_info", "versions", "runs", "cases"}
    return facts["cases"]


def processes(folder: Path) -> list[str]:
    """Return the command lines of those that run and name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            found.append(path.read_text(errors="replace"))
    return [command for command in found if str(folder) in command]
