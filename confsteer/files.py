"""Writing files so that they are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
