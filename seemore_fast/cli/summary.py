"""Summary of an upscaling run, as text or JSON."""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..backends import backend_for_device
from .exits import DONE, FAILED, INTERRUPTED


@dataclass
class Summary:
    """Outcomes of one process, or of all of torchrun's.

    files       outcomes worth reporting; `counts` has all, by done, skipped and failed
    failures    of inputs that are no image files, and of the comparison page
    """

    scale: int
    output: str
    seconds: float
    device: str
    stopped: bool
    files: list[dict]
    failures: list[str]
    notes: list[str]
    counts: Counter
    page: str | None = None

    @staticmethod
    def merged(summaries: list["Summary"]) -> "Summary":
        """Return the summary of all processes."""
        return replace(
            summaries[0],
            seconds=max(one.seconds for one in summaries),
            device=", ".join(one.device for one in summaries),
            stopped=any(one.stopped for one in summaries),
            files=[file for one in summaries for file in one.files],
            failures=_union(one.failures for one in summaries),
            notes=_union(one.notes for one in summaries),
            counts=sum((one.counts for one in summaries), Counter()),
        )

    @property
    def exit_status(self) -> int:
        """The command's exit status."""
        if self.stopped:
            return INTERRUPTED
        return FAILED if self.failures or self.counts["failed"] else DONE

    def print_json(self):
        """Print the summary for scripts."""
        fields = dict(vars(self))
        counts, page = fields.pop("counts"), fields.pop("page")
        fields |= {"page": page} if page else {}
        fields |= {"done": counts["done"], "skipped": counts["skipped"], "failed": len(self._all_failures())}
        print(json.dumps(fields, indent=2))

    def print_text(self, dtype: str):
        """Print the summary, with warnings and failures on standard error."""
        done, skipped, total = self.counts["done"], self.counts["skipped"], self.counts.total()
        backend = backend_for_device(self.device.split(", ")[0])
        print(
            f"{done} of {total} image{'s' * (total != 1)} upscaled {self.scale}x in {self.seconds:.1f} s "
            f"({self.device}, {dtype}, backend {backend}): {self.output}"
        )
        if self.page:
            print(f"comparison page: {self.page}")
        if skipped:
            print(f"{skipped} already exist{'s' * (skipped == 1)} (use --overwrite to redo)")
        if self.stopped:
            print("stopped: run the same command again for the rest")
        notes = [f"{file['source']}: {note}" for file in self.files for note in file["notes"]]
        for note in self.notes + notes:
            print(f"warning: {note}", file=sys.stderr)
        for failure in self._all_failures():
            print(f"failed: {failure}", file=sys.stderr)

    def _all_failures(self) -> list[str]:
        return self.failures + [file["error"] for file in self.files if file["error"]]


def _union(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(line for lines in lists for line in lines))
