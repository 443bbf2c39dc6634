"""The English and the Korean documents say the same, and their links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from programs import ROOT, content_of, section_of

DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(BENCHMARKS.glob("*.md")),
]

BLOCK = re.compile(
    r"^```.*?^```",
    re.MULTILINE | re.DOTALL,
)
CODE = re.compile(r"`([^`]+)`")
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
BAR = re.compile(r"(?<!\\)\|")
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
LEVEL = re.compile(r"^(#+) ", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")
NUMBER = re.compile(r"\d[\d.,]*\d{2}")
PICTURE = re.compile(r"!\[[^\]]+\]\((?:docs/)?(images/[^)]+)\)")

Found = TypeVar("Found")


class Pair(NamedTuple):
    """A document in English, and its translation."""

    english: Path
    korean: Path


GUIDE = Pair(ROOT / "README.md", DOCS / "README.ko.md")
LOOKED_UP = Pair(DOCS / "troubleshooting.md", DOCS / "troubleshooting.ko.md")
each_pair = pytest.mark.parametrize(
    "pair",
    [GUIDE, LOOKED_UP],
    ids=["README", "troubleshooting"],
)

# Of this one, two sections are translated.
RESULTS = Pair(DOCS / "results.md", DOCS / "results.ko.md")
SECTIONS = ("What the last line says", "What the warnings say")


def same_in_both(pair: Pair, look: Callable[[str], Found]) -> Found:
    """Return what a function finds in both texts of a pair; fail where that is not the same."""
    english = look(content_of(pair.english))
    korean = look(content_of(pair.korean))
    assert english == korean
    return english


def without_code(text: str) -> str:
    """Return a text without its blocks of code."""
    return BLOCK.sub("", text)


class Row(NamedTuple):
    """What a row of a table has in every language."""

    bars: int
    code: list[str]


def rows_in(text: str) -> list[Row]:
    """Return the rows of all tables in a text."""
    rows = []
    for line in ROW.findall(without_code(text)):
        bars = BAR.findall(line)
        code = CODE.findall(line)
        rows.append(Row(len(bars), sorted(code)))
    return rows


def levels_in(text: str) -> list[str]:
    """Return the number signs of each heading."""
    return LEVEL.findall(without_code(text))


def names_in(text: str) -> list[set[str]]:
    """Return the code in each section, other than in its tables."""
    prose = ROW.sub("", without_code(text))
    names = []
    for section in HEADING.split(prose):
        in_one_line = " ".join(section.split())
        names.append(set(CODE.findall(in_one_line)))
    return names


def numbers_in(text: str) -> set[str]:
    """Return the numbers of two digits and more.

    What is a word in English (two, half) may be a number in Korean, and is not looked at.
    """
    return set(NUMBER.findall(without_code(text)))


def test_each_translation_has_an_original() -> None:
    there = set(DOCS.glob("*.ko.md"))
    assert there == {
        GUIDE.korean,
        LOOKED_UP.korean,
        RESULTS.korean,
    }


def test_the_tables_of_the_last_line_and_of_the_warnings_are_the_same() -> None:
    english = content_of(RESULTS.english)
    korean = content_of(RESULTS.korean)
    sections = [section_of(english, heading) for heading in SECTIONS]
    original = "\n".join(sections)
    rows = rows_in(original)
    assert rows_in(korean) == rows
    assert len(rows) > 10
    (line,) = re.findall(r"^    .*$", original, re.MULTILINE)
    assert f"\n{line}\n" in korean


@each_pair
def test_the_headings_are_on_the_same_levels(pair: Pair) -> None:
    levels = same_in_both(pair, levels_in)
    assert len(levels) > 10


@each_pair
def test_the_code_blocks_are_the_same(pair: Pair) -> None:
    assert same_in_both(pair, BLOCK.findall)


@each_pair
def test_the_tables_have_the_same_rows_and_the_same_code_in_them(pair: Pair) -> None:
    rows = same_in_both(pair, rows_in)
    assert len(rows) > 50


@each_pair
def test_the_text_of_each_section_names_the_same_code(pair: Pair) -> None:
    names = same_in_both(pair, names_in)
    assert any(names)


@each_pair
def test_the_numbers_are_the_same(pair: Pair) -> None:
    assert same_in_both(pair, numbers_in)


def test_the_pictures_are_the_same() -> None:
    assert same_in_both(GUIDE, PICTURE.findall)


@each_pair
def test_each_links_to_the_other_in_its_first_lines(pair: Pair) -> None:
    assert language_link(pair.english) == pair.korean
    assert language_link(pair.korean) == pair.english


def language_link(path: Path) -> Path:
    """Return where the one link in the third line of a document leads."""
    third = content_of(path).splitlines()[2]
    (target,) = LINK.findall(third)
    return path.parent.joinpath(target).resolve()


@each_pair
def test_a_korean_document_leads_to_korean_ones_where_there_are_any(pair: Pair) -> None:
    folder = pair.korean.parent
    document = content_of(pair.korean)
    _title, _language, text = document.split("\n\n", 2)
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert len(targets) > 3
    for target in targets:
        linked = (folder / target).resolve()
        assert linked != GUIDE.english
        assert linked != LOOKED_UP.english


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    words = heading.strip("# ").lower()
    without_signs = re.sub(r"[^\w\- ]", "", words)
    return without_signs.replace(" ", "-")


@pytest.mark.parametrize(
    "path",
    DOCUMENTS,
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_within_the_project_lead_somewhere(path: Path) -> None:
    text = without_code(content_of(path))
    for target in LINK.findall(text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            headings = HEADING.findall(without_code(content_of(file)))
            assert anchor in map(slug, headings), target
