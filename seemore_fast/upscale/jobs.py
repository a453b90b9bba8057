"""Which files to upscale, and into which: seen before anything is done, and listed again when their turn comes."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .images import FORMATS


class JobError(ValueError):
    """Inputs and outputs that do not fit together; nothing was done."""


@dataclass(frozen=True)
class Job:
    """A file to read and the one to write. `is_named`: the user gave the latter's very name."""

    source: Path
    target: Path
    is_named: bool = False


@dataclass
class Jobs:
    """What the arguments of a command ask for. Folders are walked with their subfolders, links to folders are not.

    inputs      files and folders
    output      a file for one file; or a folder, existing or with a slash at its end
    suffix      goes between the name and the ending of files in a folder
    extension   of the files in a folder, ".png"; None: the input's
    """

    inputs: list[Path]
    output: str
    suffix: str = "_x2"
    extension: str | None = None
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    into_folder: bool = field(init=False)

    def __post_init__(self):
        if not self.output:
            raise JobError("OUT is empty: give a file or a folder")
        if self.extension is not None and self.extension.lower() not in FORMATS:
            raise JobError(f"the ending {self.extension!r} is none of {', '.join(FORMATS)}")
        folder, has_slash = Path(self.output), self.output.endswith(("/", os.sep))
        holds_folders = any(map(os.path.isdir, self.inputs))
        self.into_folder = has_slash or os.path.isdir(folder) or holds_folders
        if not self.into_folder:
            if len(self.inputs) > 1:
                raise JobError(
                    f"{self.output} is one file for {len(self.inputs)} inputs: give a folder, existing or ending in a "
                    "slash"
                )
            if folder.suffix.lower() not in FORMATS:
                raise JobError(
                    f"{self.output} ends in {folder.suffix!r}, expected one of {', '.join(FORMATS)}, or a slash to "
                    "make it a folder"
                )
        if not os.path.isdir(folder.parent):
            raise JobError(f"the folder {folder.parent} does not exist: create it, or write elsewhere")
        if holds_folders and os.path.isfile(folder):
            raise JobError(f"{folder} is a file, expected a folder for what the inputs hold")

    def check(self) -> int:
        """Return how many there are. Raises JobError where an output is also another's, or an input."""
        count, taken, sources, folders = 0, set(), set(), {}
        for job in self:
            count += 1
            place = _place(job.target, folders)
            if place in taken:
                other = next(o.source for o in self if _place(o.target, folders) == place)
                raise JobError(f"{job.target}, the output of {job.source}, is also read or written for {other}")
            taken.add(place)
            sources.add(_place(job.source, folders))
        if clash := sources & taken:
            job = next(job for job in self if _place(job.target, folders) in clash)
            raise JobError(f"{job.target}, the output of {job.source}, is also read or written for {job.target}")
        return count

    def __iter__(self) -> Iterator[Job]:
        self.notes, self.failures = [], []
        for given in self.inputs:
            if not os.path.isdir(given):
                yield self._job(given, Path(given.name))
                continue
            found = False
            for source, relative in self._walk(given, Path()):
                found = True
                yield self._job(source, relative)
            if not found:
                self.failures.append(f"{given}: holds no file that ends in {', '.join(FORMATS)}")

    def _job(self, source: Path, relative: Path) -> Job:
        if not self.into_folder:
            return Job(source, Path(self.output), is_named=True)
        name = f"{relative.stem}{self.suffix}{self.extension or relative.suffix}"
        return Job(source, Path(self.output) / relative.with_name(name))

    def _walk(self, folder: Path, relative: Path) -> Iterator[tuple[Path, Path]]:
        """Yield the images of a folder, by name, and then those of its subfolders, with their paths inside."""
        own = os.path.realpath(self.output)
        # Results among the inputs: those of an earlier run are none.
        beside = os.path.realpath(folder) == os.path.realpath(Path(self.output) / relative)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self.failures.append(f"{folder}: cannot be listed: {os.strerror(error.errno)}")
            return
        folders = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in FORMATS and not entry.is_dir():
                if not (beside and self.suffix and os.path.splitext(entry.name)[0].endswith(self.suffix)):
                    yield Path(entry.path), relative / entry.name
            elif entry.is_symlink() and entry.is_dir():
                self.notes.append(f"{entry.path} is a link to a folder, which is not followed")
        for name in folders:
            if os.path.realpath(folder / name) != own:
                yield from self._walk(folder / name, relative / name)


def _place(path: Path, folders: dict[str, str]) -> int:
    """Return a number for a place in the file system: a million of them take a tenth of the memory of their names.

    folders: what each folder really is, looked up once.
    """
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
    return hash(os.path.normcase(real))


def is_share(job: Job, rank: int, world: int) -> bool:
    """Tell whether a job is that of process `rank` of `world`: by its name, whatever the order of listings."""
    return zlib.crc32(os.fsencode(str(job.target))) % world == rank
