"""The page, in one file that needs nothing but the server it is from."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

PATH = "/confsteer/play"
"""Where servers offer it."""


@functools.cache
def page() -> str:
    """Read the page, and have it forbid the browser any script and style but its own, and any request but to its server."""
    html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    for part in ("script", "style"):
        found = re.search(rf"<{part}>(.*?)</{part}>", html, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        html = html.replace(f"'{{{part}}}'", f"'sha256-{digest}'")
    return html
