"""The words of documents, messages and the web UI: the field's usual ones, in American spelling.

Strings of the product count as messages; docstrings too. Names in code do not.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# What not to write, and what to write instead.
BANNED = {
    r"pictures?": "image",
    r"in hand": "in flight",
    r"anew": "again",
    r"told to end": "SIGTERM received",
    r"goes on (with|as)": "override, default, fallback",
    r"asks? again": "retry",
    r"refuses? with": "reject",
    r"without a gap": "zero downtime",
    r"lower precision": "reduced precision",
    r"points lost": "percentage points",
    r"least probability": "confidence threshold",
    r"(behavi|col|fav|neighb)our\w*": "American spelling",
    r"cent(re|red)": "American spelling",
    r"\w+(al|ar|ant|im|ori)i[sz]ation(?<=isation)": "American spelling",
    r"(normal|quant|optim|recogn|serial|initial|summar)is(e|ed|es|ing)": "American spelling",
    r"licence": "American spelling",
    r"gr[e]y": "American spelling",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(f'(?:{each})' for each in BANNED)})\b", re.IGNORECASE)
PRODUCT = ("handler", "client", "scripts", "batch", "deploy")
# Names that exist: the column of the client and of the web UI, a stored field, a list's header.
KEPT = re.compile(r"""^picture$|["`]picture["`]|\bpictures?: """)


def texts() -> Iterator[tuple[str, str]]:
    """Yield where each text stands, and the text."""
    for path in (Path("README.md"), *sorted(Path("docs").rglob("*.md"))):
        in_code = False
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            in_code ^= line.startswith("```")
            if not in_code:
                yield f"{path}:{number}", re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
    for folder in PRODUCT:
        for path in sorted(Path(folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path}:{node.lineno}", node.value
    page = Path("handler/page.html")
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        yield f"{page}:{number}", line


def test_the_words_are_the_usual_ones() -> None:
    found = [
        f"{place}: {match[0]!r} in {text.strip()[:80]!r}"
        for place, text in texts()
        for match in PATTERN.finditer(KEPT.sub("", text))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["a Picture of", "normalised", "quantisation", "the colour"])
def test_banned_words_are_found(text: str) -> None:
    assert PATTERN.search(text)
