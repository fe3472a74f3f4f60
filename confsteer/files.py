"""Files that came with confsteer, and writing others so that they are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def shipped_profiles() -> dict[str, Path]:
    """Folders of the profiles that came with confsteer, by name."""
    package = Path(__file__).parent
    # In a wheel the folder is inside the package, in a checkout beside it.
    root = next((r for r in (package / "calibrations", package.parent / "calibrations") if r.is_dir()), None)
    return {} if root is None else {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()}


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
