"""Files that came with confsteer, reads with a limit, and writes that are whole or do not happen.

Who is trusted with what:

- **Profiles** and **steering requests** come from anyone: a hub, a client of a server. They are JSON and rows of numbers.
  Their size is bounded and every field is checked. Nothing in them is executed or unpickled. Their strings are escaped before
  they reach a terminal, a picture or a page.
- **Results**, **run files**, **texts** with their images, **questions** and **counts** come from the user or from somebody they
  know. The size of each is bounded by what is held in memory at once. A wrong one is refused with a sentence.
- **Models** and **tokenizers** are trusted as transformers trusts them. A scan reads only safetensors from a checkpoint. Code
  that comes with a model runs only with ``trust_remote_code``.
- **The server's operator** sets profile and default. A client can only choose a steering, and a wrong one is answered with
  400.

The limits in bytes of all files that are read whole are below. Those of a request are in `confsteer.steering`.
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
"""``profile.json``: twice what 64 neurons (calibration reports no more) and dozens of presets that set each of them need."""
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
"""Suffix of unfinished files and folders. They are hidden, and stand beside what they become."""


def shipped_profiles() -> dict[str, Path]:
    """Folders of the profiles that came with confsteer, by name."""
    package = Path(__file__).parent
    # In a wheel the folder is inside the package, in a checkout beside it.
    root = next((r for r in (package / "calibrations", package.parent / "calibrations") if r.is_dir()), None)
    return {} if root is None else {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()}


def read_at_most(file: str | os.PathLike[str], limit: int) -> bytes:
    """Read the contents of a file from anywhere, of `limit` bytes or fewer.

    Raises:
        OSError: it cannot be read, is longer, or is no regular file. A pipe may never answer, and a device may never end.
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
    """Replace a file by `payload` in one step. Whenever the process dies, the file is the old one or the new one.

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
    """Make a new file (or folder) beside `target`. It is removed at the end of the context unless it was renamed by then.

    It is locked while the process lives. The next draft in the same place removes those that killed processes left.

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
        # Without locks, nobody can tell which files were abandoned: remove none.
        with contextlib.suppress(OSError):
            _lock(stack.enter_context(_opened(path)))
        yield path


@contextlib.contextmanager
def folder_for_writing(folder: Path) -> Iterator[None]:
    """Make a folder to write to, if there is none. Remove it again if it is new and writing fails."""
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
    """Wait until the renames in a folder are on the disk, so that later renames cannot get there first."""
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
    """Lock an open file; raises OSError if another process has locked it, or there are no locks."""
    if sys.platform == "win32":
        raise BlockingIOError
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
