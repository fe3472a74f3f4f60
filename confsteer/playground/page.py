"""The page, in one file that needs only the server it came from."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

PATH = "/confsteer/play"
"""Path of the page on a server."""


@functools.cache
def page() -> str:
    """Read the page. It forbids the browser any script and style but its own, and any request but to its server."""
    html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    for part in ("script", "style"):
        found = re.search(rf"<{part}>(.*?)</{part}>", html, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        html = html.replace(f"'{{{part}}}'", f"'sha256-{digest}'")
    return html
