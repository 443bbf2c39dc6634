"""The messages of ``ChatClient``, for the generators that are compared with it.

They are read out of the source of ``locustfile.py``, as importing it would add its options and its
response-time buckets to a script that is meant to have neither. Each text gets a prefix as long as
the tag that locustfile.py adds, so that all generators send the same bytes in the same mix: 5
short, 2 long, 1 very long."""

from __future__ import annotations

import ast
from pathlib import Path

PREFIX = "[00000000.00] "
WEIGHTS = {"SHORT_TEXTS": 5, "LONG_TEXTS": 2, "VERY_LONG_TEXTS": 1}


def read_texts() -> dict[str, list[str]]:
    """Return the texts of each kind, by the name that they have in locustfile.py."""
    tree = ast.parse((Path(__file__).parent.parent / "locustfile.py").read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(
            ("TEXTS", "SENTENCES")
        ):
            exec(compile(ast.Module([node], []), "locustfile.py", "exec"), found)
    return {name: [PREFIX + text for text in found[name]] for name in WEIGHTS}


def mixed_lines() -> list[bytes]:
    """Return lines as they go over the wire, such that a random one is of each kind as often as
    with the tasks."""
    texts = read_texts()
    lines = []
    for name, weight in WEIGHTS.items():
        for number in range(weight * 6):
            lines.append(texts[name][number % len(texts[name])].encode() + b"\n")
    return lines
