"""Files that came with confsteer; reading no further than is sane; writing whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path


def shipped_profiles() -> dict[str, Path]:
    """Folders of the profiles that came with confsteer, by name."""
    package = Path(__file__).parent
    # In a wheel the folder is inside the package, in a checkout beside it.
    root = next((r for r in (package / "calibrations", package.parent / "calibrations") if r.is_dir()), None)
    return {} if root is None else {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()}


def read_at_most(file: Path, limit: int) -> bytes:
    """The contents of a file from anywhere, of `limit` bytes or fewer.

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
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
