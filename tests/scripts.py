"""The scripts of ``eval/``, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.paths import ROOT


def load_script(name: str) -> ModuleType:
    """Import ``eval/NAME.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Named tuples look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
