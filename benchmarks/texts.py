"""The messages of ``ChatClient``, for the generators that are compared with it.

They are read out of the source of ``locustfile.py``, as importing it would add its options to a
script that is meant to have none.
"""

from __future__ import annotations

import ast
from pathlib import Path

PREFIX = "[00000000.00] "  # as long as a tag
WEIGHTS = {"SHORT_TEXTS": 5, "LONG_TEXTS": 2, "VERY_LONG_TEXTS": 1}


def read_texts() -> dict[str, list[str]]:
    """Return the texts of each kind, by the name that they have in locustfile.py."""
    source = Path(__file__).parent.parent / "locustfile.py"
    tree = ast.parse(source.read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        if name.endswith(("TEXTS", "SENTENCES")):
            code = compile(ast.Module([node], []), "locustfile.py", "exec")
            exec(code, found)
    texts = {}
    for name in WEIGHTS:
        texts[name] = [PREFIX + text for text in found[name]]
    return texts


def mixed_lines() -> list[bytes]:
    """Return lines of which a random one is of each kind as often as in ``ChatClient``."""
    texts_of = read_texts()
    lines = []
    for name, weight in WEIGHTS.items():
        texts = texts_of[name]
        for number in range(weight * 6):
            text = texts[number % len(texts)]
            lines.append(text.encode() + b"\n")
    return lines
