"""Files that came with confsteer; reading no further than is sane; writing whole or not at all.

Who is trusted with what:

- **Profiles** and **steering requests** come from anyone: a hub, a client of a server. They are JSON and rows of numbers
  with a bounded size, checked field by field. Nothing in them is executed or unpickled, and none of their strings reaches a
  terminal, a picture or a page unescaped.
- **Results**, **run files**, **texts** and their images, **questions** and **counts** come from the user or from somebody
  they know. Each is bounded by what is held in memory at once, and is wrong with a sentence.
- **Models** and **tokenizers** come from whom the user trusts as transformers does. Only safetensors are read from a
  checkpoint that is scanned; code that comes with a model runs only with ``trust_remote_code``.
- **The server's operator** sets profile and default. A client can do no more than choose a steering, and a wrong one is a 400.

The limits in bytes of all files that are read whole are below; those of a request are in `confsteer.steering`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from confsteer.errors import ResultError

if sys.platform != "win32":
    import fcntl

MAX_PROFILE_BYTES = 500_000
"""``profile.json``: 64 neurons, the most that calibration reports, and dozens of presets that set each of them fit twice."""
MAX_COLUMNS_BYTES = 100_000_000
"""A profile's columns: those of a layer of 300,000 neurons fit."""
MAX_COUNTS_BYTES = 100_000_000
"""Token counts: those of twelve million tokens fit."""
MAX_DOCUMENT_BYTES = 100_000_000
"""A document, or a list of documents in one JSON file."""
MAX_IMAGE_BYTES = 100_000_000
"""An image in a conversation; Pillow bounds its pixels."""
MAX_RESULT_BYTES = 100_000_000
"""An evaluation or a tuning: those of a hundred texts with a hundred steerings each fit."""
MAX_RUN_FILE_BYTES = 1_000_000
"""A run file, in YAML."""

TEMPORARY_SUFFIX = ".confsteer-draft"
"""Suffix of what is being written: hidden files and folders beside what they become."""


def shipped_profiles() -> dict[str, Path]:
    """Folders of the profiles that came with confsteer, by name."""
    package = Path(__file__).parent
    # In a wheel the folder is inside the package, in a checkout beside it.
    root = next((r for r in (package / "calibrations", package.parent / "calibrations") if r.is_dir()), None)
    return {} if root is None else {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()}


def read_at_most(file: str | os.PathLike[str], limit: int) -> bytes:
    """Read the contents of a file from anywhere, of `limit` bytes or fewer.

    Raises:
        OSError: it cannot be read, is longer, or is no regular file: a pipe may never answer, a device never end.
    """
    # A pipe is opened only when someone writes to it, unless asked not to wait.
    with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        payload = stream.read(limit + 1)
    if len(payload) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return payload


def write_atomically(file: Path, payload: bytes) -> None:
    """Put `payload` in place of a file in one step: whenever the process dies, the file is the old one or the new one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with temporary_sibling(file) as temporary:
        with open(temporary, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    sync_folder(file.parent)


def write_result(file: Path, payload: bytes) -> None:
    """`write_atomically` for a file that the user asked for.

    Raises:
        ResultError: it cannot be written; nothing is left behind.
    """
    try:
        write_atomically(file, payload)
    except OSError as error:
        raise ResultError(f"cannot write {file}: {error.strerror}") from error


@contextlib.contextmanager
def temporary_sibling(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file (or folder) beside `target`, removed when the context is left unless it was renamed by then.

    It is locked while the process lives: the next draft in the same place removes those that killed processes left.

    Raises:
        OSError: it cannot be made.
    """
    for old in target.parent.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError), _opened(old) as descriptor:
            _lock(descriptor)
            _remove(old)
    with contextlib.ExitStack() as stack:
        path = _new(target, folder)
        stack.callback(_remove, path)
        # Where there are no locks nothing is taken for abandoned either.
        with contextlib.suppress(OSError):
            _lock(stack.enter_context(_opened(path)))
        yield path


@contextlib.contextmanager
def folder_for_writing(folder: Path) -> Iterator[None]:
    """Have a folder to write to; if that fails and it is new, it is gone again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def sync_folder(folder: Path) -> None:
    """Wait until what was renamed in a folder is on the disk, so that later renames cannot get there first."""
    # Not every system lets folders be opened, or synced.
    with contextlib.suppress(OSError), _opened(folder) as descriptor:
        os.fsync(descriptor)


def _new(target: Path, folder: bool) -> Path:
    if folder:
        return Path(tempfile.mkdtemp(TEMPORARY_SUFFIX, f".{target.name}.", target.parent))
    descriptor, path = tempfile.mkstemp(TEMPORARY_SUFFIX, f".{target.name}.", target.parent)
    os.close(descriptor)
    return Path(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Raises OSError if another has locked it, or there are no locks."""
    if sys.platform == "win32":
        raise BlockingIOError
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
