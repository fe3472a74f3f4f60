"""Where tests find what is outside their folder, wherever in it they are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
SHARED = ROOT.parent / "shared"
"""Models and texts for development; tests that use them are skipped where the folder is absent."""
STORIES = SHARED / "models" / "stories260K" / "hf"
"""A small model of real training, without entropy neurons."""
STORIES_TEXT = SHARED / "corpora" / "tinystories" / "tinystories_1000.json"
"""A thousand stories of its kind, a JSON list."""
