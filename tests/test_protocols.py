"""``docs/protocols.md``: what its tables name is there, and its commands run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import (
    PATH,
    ROOT,
    Start,
    content_of,
)

from locustfile import (
    parse_address,
    parse_echo,
    parse_encoding,
    parse_framing,
)

DOCUMENT = content_of("docs/protocols.md")
EXAMPLES = {path.name for path in (ROOT / "examples").glob("*.py")}
ROWS: list[tuple[str, str]] = re.findall(
    r"^\| .* \| \[`(\w+\.py)`\]\(\.\./examples/\1\).* \| (.*) \|$",
    DOCUMENT,
    re.MULTILINE,
)
COMMANDS = re.findall(
    r"^locust .*",
    DOCUMENT,
    re.MULTILINE,
)
PARSERS: dict[str, Callable[[str], object]] = {
    "--chat-framing": parse_framing,
    "--chat-echo": parse_echo,
    "--chat-encoding": parse_encoding,
    "--host": parse_address,
}
OPTIONS = re.findall(
    rf"({'|'.join(PARSERS)})=(\S+?)[`;\s]",
    DOCUMENT,
)


def test_the_table_leads_to_every_example_and_to_no_other() -> None:
    assert {name for name, _ in ROWS} == EXAMPLES


@pytest.mark.parametrize(("name", "changes"), ROWS)
def test_what_is_to_be_changed_in_a_file_stands_in_it(name: str, changes: str) -> None:
    source = content_of(f"examples/{name}")
    named = re.findall(r"`([^`]+)`", changes)
    assert named
    for text in named:
        assert text in source


def test_the_options_of_the_document_have_values_that_are_taken() -> None:
    assert {option for option, _ in OPTIONS} == set(PARSERS)
    for option, value in OPTIONS:
        parse = PARSERS[option]
        parse(value.strip("'"))


def test_the_document_holds_no_code_that_a_file_holds() -> None:
    languages = re.findall(r"^```(\w+)$", DOCUMENT, re.MULTILINE)
    assert set(languages) == {"sh"}


@pytest.mark.together
@pytest.mark.parametrize("command", COMMANDS)
def test_locust_loads_the_files_of_a_command(start: Start, command: str) -> None:
    """The commands of the examples are run wholly, in ``test_examples.py``."""
    running = start("bash", "-c", f"exec {command} --list", PATH=PATH)
    assert running.ends() == 0, running.output
    assert "    IrcUser" in running.output
    assert "--headless" in command


@pytest.mark.together
def test_an_example_elsewhere_finds_the_core_by_the_path_of_python(
    start: Start, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "examples" / "irc.py", tmp_path)
    command = ("env", "locust", "-f", "irc.py", "--list")
    lost = start(*command, cwd=tmp_path, PATH=PATH)
    assert lost.ends() == 1
    found = start(*command, cwd=tmp_path, PATH=PATH, PYTHONPATH=str(ROOT))
    assert found.ends() == 0, found.output
