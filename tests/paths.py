"""Where tests find what is outside their folder, wherever in it they are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
SHARED = ROOT.parent / "shared"
"""Models and texts for development; tests that use them are skipped where the folder is absent."""
