"""One self-contained page: style, script and data are in it; it asks no network for anything.

Answers are texts that a model wrote, and may be markup. They enter as JSON in which no `<` is left (so that nothing can end
the script element), and the page's script puts them into the document as text, never as HTML. The page's own policy
(Content-Security-Policy) allows no request, and no script but this one, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
<body>
<main id="page"><noscript>This page draws its curves and tables with a script; allow scripts to see them.</noscript></main>
<script type="application/json" id="content">{content}</script>
<script>{script}</script>
</body>
</html>
"""


def page(content: Mapping[str, Any], title: str) -> str:
    """The page as text."""
    here = files("mikv.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = json.dumps(content, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _TEMPLATE.format(policy=policy, title=escape(title), style=style, script=script, content=data)
