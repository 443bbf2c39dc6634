"""The English and the Korean guide say the same, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import ROOT

GUIDES = {"English": ROOT / "README.md", "한국어": ROOT / "docs" / "README.ko.md"}
TEXTS = {language: path.read_text(encoding="utf-8") for language, path in GUIDES.items()}
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def same(pattern: str, flags: re.RegexFlag = re.MULTILINE) -> None:
    """Fail unless both guides have the same matches of a pattern, in order, and at least one."""
    english, korean = (re.findall(pattern, text, flags) for text in TEXTS.values())
    assert english == korean and english


def test_the_headings_are_on_the_same_levels() -> None:
    english, korean = (
        re.findall(r"^(#+) ", without_code(text), re.MULTILINE) for text in TEXTS.values()
    )
    assert english == korean and len(english) > 10


def test_the_code_blocks_are_the_same() -> None:
    same(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_the_tables_have_the_same_rows_and_the_same_code_in_them() -> None:
    def rows(text: str) -> list[tuple[int, list[str]]]:
        lines = re.findall(r"^\|.*\|$", without_code(text), re.MULTILINE)
        return [
            (len(re.findall(r"(?<!\\)\|", line)), sorted(re.findall(r"`([^`]+)`", line)))
            for line in lines
        ]

    english, korean = (rows(text) for text in TEXTS.values())
    assert english == korean and len(english) > 50


def test_the_pictures_are_the_same() -> None:
    same(r"!\[[^\]]+\]\((?:docs/)?(images/[^)]+)\)")


def test_each_links_to_the_other_in_its_first_lines() -> None:
    assert "](docs/README.ko.md)" in "".join(TEXTS["English"].splitlines()[:3])
    assert "](../README.md)" in "".join(TEXTS["한국어"].splitlines()[:3])


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", without_code(file.read_text(encoding="utf-8")), re.MULTILINE
            )
            assert anchor in map(slug, headings), target
