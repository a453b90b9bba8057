"""Jobs of a batch: the files to read and to write, checked before any work is done."""

import os
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import JobError, os_reason
from ..io.atomic import TEMPORARY
from ..io.images import FORMATS

OTHER_FORMATS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl")  # images that are not read, but reported


class Job(NamedTuple):
    """A file to read and the file to write, which the user may have named; strings, because there may be a million."""

    source: str
    target: str
    is_named: bool = False


class Jobs(list):
    """The jobs of a command. Folders are searched with their subfolders, but not through links to folders.

    inputs      files and folders
    output      a file, for a single input file; or a folder, existing or with a slash at its end
    suffix      inserted between name and extension of files in a folder
    extension   of files in a folder, such as ".png"; None: the input's

    Raises JobError if they do not fit together, or if an output is also another output or an input.
    """

    def __init__(self, inputs: list[Path], output: str, suffix: str = "_x2", extension: str | None = None):
        super().__init__()
        self.inputs, self.output, self.suffix, self.extension = inputs, output, suffix, extension
        self.notes, self.failures = [], []
        self.into_folder = self._check_arguments()
        for given in inputs:
            self._add(given)
        self._check_clashes()

    def _check_arguments(self) -> bool:
        """Return whether the output is a folder."""
        if not self.output:
            raise JobError("OUT is empty: give a file or a folder")
        if os.path.basename(self.suffix) != self.suffix or "\0" in self.suffix:
            raise JobError(f"the suffix {self.suffix!r} cannot be part of a file name")
        if self.extension is not None and self.extension.lower() not in FORMATS:
            raise JobError(f"the extension is {self.extension!r}, expected one of {', '.join(FORMATS)}")
        folder, has_slash = Path(self.output), self.output.endswith(("/", os.sep))
        holds_folders = any(map(os.path.isdir, self.inputs))
        into_folder = has_slash or os.path.isdir(folder) or holds_folders
        if not into_folder:
            if len(self.inputs) > 1:
                raise JobError(
                    f"{self.output} is one file for {len(self.inputs)} inputs: give a folder, existing or ending in a "
                    "slash"
                )
            if folder.suffix.lower() not in FORMATS:
                raise JobError(
                    f"{self.output} ends in {folder.suffix!r}, expected one of {', '.join(FORMATS)}, or a slash for a "
                    "folder"
                )
        if not os.path.isdir(folder.parent):
            raise JobError(f"the folder {folder.parent} does not exist: create it, or choose another")
        if holds_folders and os.path.isfile(folder):
            raise JobError(f"{folder} is a file, expected a folder for the contents of the input folders")
        return into_folder

    def _check_clashes(self):
        folders, is_caseless = {}, is_case_insensitive(Path(self.output))
        sources = {}  # of the jobs, by their target's place
        for job in self:
            place = _place(job.target, folders, is_caseless)
            if place in sources:
                raise JobError(_clash(job, sources[place]))
            sources[place] = job.source
        inputs = {_place(job.source, folders, is_caseless) for job in self}
        for job, place in zip(self, sources, strict=True):
            if place in inputs:
                raise JobError(_clash(job, job.target))

    def _add(self, given: Path):
        if not os.path.isdir(given):
            self.append(self._job(given, Path(given.name)))
            return
        before = len(self)
        self.extend(self._job(source, relative) for source, relative in self._walk(given))
        if len(self) == before:
            self.failures.append(f"{given}: contains no file that ends in {', '.join(FORMATS)}")

    def _job(self, source: Path, relative: Path) -> Job:
        if not self.into_folder:
            return Job(str(source), str(Path(self.output)), is_named=True)
        name = f"{relative.stem}{self.suffix}{self.extension or relative.suffix}"
        return Job(str(source), str(Path(self.output) / relative.with_name(name)))

    def _walk(self, top: Path) -> Iterator[tuple[Path, Path]]:
        """Yield the images of a folder, by name, then those of its subfolders, each with its path inside `top`.

        Results of an earlier run beside their sources are left out.
        """
        own, left = os.path.realpath(self.output), [(top, Path())]
        while left:
            folder, relative = left.pop()
            if relative != Path() and os.path.realpath(folder) == own:
                self.notes.append(f"{folder} is the output folder: its contents are not read")
                continue
            try:
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self.failures.append(f"{folder}: cannot be listed: {os_reason(error)}")
                continue
            is_own = os.path.realpath(folder) == os.path.realpath(Path(self.output) / relative)
            folders, skipped, names = [], Counter(), [os.path.splitext(entry.name) for entry in entries]
            stems = {stem for stem, _ in names} if is_own and self.suffix else ()
            for entry, (stem, extension) in zip(entries, names, strict=True):
                if entry.is_dir(follow_symlinks=False):
                    folders.append((folder / entry.name, relative / entry.name))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    self.notes.append(f"{entry.path} is a link to a folder, which is not followed")
                elif extension.lower() in FORMATS and not entry.name.startswith(TEMPORARY):
                    if not (stems and stem.endswith(self.suffix)):
                        yield Path(entry.path), relative / entry.name
                    elif stem.removesuffix(self.suffix) not in stems:  # otherwise an earlier run's result
                        skipped[f"end in {self.suffix}, as results do"] += 1
                elif extension.lower() in OTHER_FORMATS:
                    skipped[f"end in {extension.lower()}, which is not supported"] += 1
            self.notes += [f"{folder}: skipped {count} files that {reason}" for reason, count in skipped.items()]
            left += reversed(folders)


def _clash(job: Job, other: str) -> str:
    return f"{job.target}, the output of {job.source}, is also read or written for {other}"


def _place(path: str, folders: dict[str, str], is_caseless: bool) -> int:
    """Return a hash of the location of a path, which takes less memory than the path.

    folders: cache of the folders' real paths.
    """
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    place = os.path.normcase(os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name))
    return hash(unicodedata.normalize("NFC", place).casefold() if is_caseless else place)


def is_case_insensitive(folder: Path) -> bool:
    """Return whether A.png and a.png are one file in a folder or its nearest existing parent; creates a file there."""
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    try:
        with tempfile.NamedTemporaryFile(prefix=f"{TEMPORARY}aA.", dir=existing) as file:
            return os.path.exists(os.path.join(existing, os.path.basename(file.name).swapcase()))
    except OSError:  # the folder is not writable, which is reported later
        return False


def is_share(job: Job, rank: int, world: int) -> bool:
    """Return whether process `rank` of `world` does a job: by its name, whatever the order of listings."""
    return zlib.crc32(os.fsencode(job.target)) % world == rank
