"""The English and the Korean documents say the same, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]


class Pair(NamedTuple):
    """A document in English, and its translation."""

    english: Path
    korean: Path

    def texts(self) -> tuple[str, str]:
        """Return what is in both."""
        return self.english.read_text(encoding="utf-8"), self.korean.read_text(encoding="utf-8")


PAIRS = [
    Pair(ROOT / "README.md", ROOT / "docs" / "README.ko.md"),
    Pair(ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "troubleshooting.ko.md"),
]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.english.name)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def rows_in(text: str) -> list[tuple[int, list[str]]]:
    """Return the number of bars in each row of a table, and the code in it."""
    lines = re.findall(r"^\|.*\|$", without_code(text), re.MULTILINE)
    return [
        (len(re.findall(r"(?<!\\)\|", line)), sorted(re.findall(r"`([^`]+)`", line)))
        for line in lines
    ]


def same(pair: Pair, pattern: str, flags: re.RegexFlag = re.MULTILINE) -> None:
    """Fail unless both have the same matches of a pattern, in order, and at least one."""
    english, korean = (re.findall(pattern, text, flags) for text in pair.texts())
    assert english == korean and english


# Of this one, two sections are translated.
RESULTS = Pair(ROOT / "docs" / "results.md", ROOT / "docs" / "results.ko.md")
SECTIONS = ("What the last line says", "What the warnings say")


def test_each_translation_has_an_original() -> None:
    translations = (ROOT / "docs").glob("*.ko.md")
    assert sorted(pair.korean for pair in [*PAIRS, RESULTS]) == sorted(translations)


def test_the_tables_of_the_last_line_and_of_the_warnings_are_the_same() -> None:
    english, korean = RESULTS.texts()
    sections = [english.partition(f"## {name}\n")[2].partition("\n## ")[0] for name in SECTIONS]
    original = "\n".join(sections)
    assert rows_in(korean) == rows_in(original) and len(rows_in(original)) > 10
    (line,) = re.findall(r"^    .*$", original, re.MULTILINE)
    assert f"\n{line}\n" in korean


@each_pair
def test_the_headings_are_on_the_same_levels(pair: Pair) -> None:
    english, korean = (
        re.findall(r"^(#+) ", without_code(text), re.MULTILINE) for text in pair.texts()
    )
    assert english == korean and len(english) > 10


@each_pair
def test_the_code_blocks_are_the_same(pair: Pair) -> None:
    same(pair, r"^```.*?^```", re.MULTILINE | re.DOTALL)


@each_pair
def test_the_tables_have_the_same_rows_and_the_same_code_in_them(pair: Pair) -> None:
    english, korean = (rows_in(text) for text in pair.texts())
    assert english == korean and len(english) > 50


@each_pair
def test_the_text_of_each_section_names_the_same_code(pair: Pair) -> None:
    def names(text: str) -> list[set[str]]:
        prose = re.sub(r"^\|.*\|$", "", without_code(text), flags=re.MULTILINE)
        sections = re.split(r"^#+ .*$", prose, flags=re.MULTILINE)
        return [set(re.findall(r"`([^`]+)`", " ".join(section.split()))) for section in sections]

    english, korean = (names(text) for text in pair.texts())
    assert english == korean and any(english)


@each_pair
def test_the_numbers_are_the_same(pair: Pair) -> None:
    """What is a word in English (two, half) may be a number in Korean, and is not looked at."""

    def numbers(text: str) -> set[str]:
        return set(re.findall(r"\d[\d.,]*\d{2}", without_code(text)))

    english, korean = (numbers(text) for text in pair.texts())
    assert english == korean and english


def test_the_pictures_are_the_same() -> None:
    same(PAIRS[0], r"!\[[^\]]+\]\((?:docs/)?(images/[^)]+)\)")


@each_pair
def test_each_links_to_the_other_in_its_first_lines(pair: Pair) -> None:
    for path, other in (pair, reversed(pair)):
        (target,) = re.findall(r"\]\((.*)\)", path.read_text(encoding="utf-8").splitlines()[2])
        assert (path.parent / target).resolve() == other


@each_pair
def test_a_korean_document_leads_to_korean_ones_where_there_are_any(pair: Pair) -> None:
    *_, text = pair.korean.read_text(encoding="utf-8").split("\n\n", 2)  # behind the first lines
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert len(targets) > 3
    translated = {each.english for each in PAIRS}
    assert not [name for name in targets if (pair.korean.parent / name).resolve() in translated]


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
