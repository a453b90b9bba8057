"""Which files to upscale, and into which: seen before anything is done, and listed again when their turn comes."""

import os
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import JobError
from ..io.atomic import TEMPORARY
from ..io.images import FORMATS

OTHER_FORMATS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl")  # images that are not read, but told of


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
        if os.path.basename(self.suffix) != self.suffix or "\0" in self.suffix:
            raise JobError(f"the suffix {self.suffix!r} is no part of a file name")
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
        blind = is_case_blind(Path(self.output))
        for job in self:
            count += 1
            place = _place(job.target, folders, blind)
            if place in taken:
                other = next(o.source for o in self if _place(o.target, folders, blind) == place)
                raise JobError(f"{job.target}, the output of {job.source}, is also read or written for {other}")
            taken.add(place)
            sources.add(_place(job.source, folders, blind))
        if clash := sources & taken:
            job = next(job for job in self if _place(job.target, folders, blind) in clash)
            raise JobError(f"{job.target}, the output of {job.source}, is also read or written for {job.target}")
        return count

    def __iter__(self) -> Iterator[Job]:
        self.notes, self.failures = [], []
        for given in self.inputs:
            if not os.path.isdir(given):
                yield self._job(given, Path(given.name))
                continue
            found = False
            for source, relative in self._walk(given):
                found = True
                yield self._job(source, relative)
            if not found:
                self.failures.append(f"{given}: holds no file that ends in {', '.join(FORMATS)}")

    def _job(self, source: Path, relative: Path) -> Job:
        if not self.into_folder:
            return Job(source, Path(self.output), is_named=True)
        name = f"{relative.stem}{self.suffix}{self.extension or relative.suffix}"
        return Job(source, Path(self.output) / relative.with_name(name))

    def _walk(self, top: Path) -> Iterator[tuple[Path, Path]]:
        """Yield the images of a folder, by name, and then those of its subfolders, with their paths inside.

        Results of an earlier run are no images where they lie beside their sources.
        """
        own, left = os.path.realpath(self.output), [(top, Path())]
        while left:
            folder, relative = left.pop()
            if relative != Path() and os.path.realpath(folder) == own:
                self.notes.append(f"{folder} is the folder of results: what it holds is not read")
                continue
            try:
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self.failures.append(f"{folder}: cannot be listed: {os.strerror(error.errno)}")
                continue
            is_own = os.path.realpath(folder) == os.path.realpath(Path(self.output) / relative)
            folders, others, names = [], Counter(), [os.path.splitext(entry.name) for entry in entries]
            stems = {stem for stem, _ in names} if is_own and self.suffix else ()
            for entry, (stem, ending) in zip(entries, names, strict=True):
                if entry.is_dir(follow_symlinks=False):
                    folders.append((folder / entry.name, relative / entry.name))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    self.notes.append(f"{entry.path} is a link to a folder, which is not followed")
                elif ending.lower() in FORMATS and not entry.name.startswith(TEMPORARY):
                    if not (stems and stem.endswith(self.suffix)):
                        yield Path(entry.path), relative / entry.name
                    elif stem.removesuffix(self.suffix) not in stems:  # else an earlier run's result
                        others[f"end in {self.suffix}, which results do"] += 1
                elif ending.lower() in OTHER_FORMATS:
                    others[f"end in {ending.lower()}, which is not read"] += 1
            self.notes += [f"{folder}: left alone, {count} that {reason}" for reason, count in others.items()]
            left += reversed(folders)


def _place(path: Path, folders: dict[str, str], blind: bool) -> int:
    """Return a number for a place in the file system: a million of them take a tenth of the memory of their names.

    folders: what each folder really is, looked up once. blind: capital letters are as good as small ones.
    """
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    place = os.path.normcase(os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name))
    return hash(unicodedata.normalize("NFC", place).casefold() if blind else place)


def is_case_blind(folder: Path) -> bool:
    """Tell whether A.png and a.png are one file in a folder, or the nearest above it that exists, by a file there."""
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    try:
        with tempfile.NamedTemporaryFile(prefix=f"{TEMPORARY}aA.", dir=there) as file:
            return os.path.exists(os.path.join(there, os.path.basename(file.name).swapcase()))
    except OSError:  # nothing can be written there, as will be said
        return False


def is_share(job: Job, rank: int, world: int) -> bool:
    """Tell whether a job is that of process `rank` of `world`: by its name, whatever the order of listings."""
    return zlib.crc32(os.fsencode(str(job.target))) % world == rank
