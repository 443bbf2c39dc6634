"""The commands of docs/design.md, each run as it stands there, but shorter."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from programs import PATH, ROOT, Program, program

Start = Callable[..., Program]

DOCUMENT = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
COMMANDS: list[str] = re.findall(r"^```sh\n(.*?)\n```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def command_with(word: str) -> str:
    """Return the one command of the document that has this word in it."""
    (command,) = [command for command in COMMANDS if word in command]
    return command.replace(".venv/bin/", "")


def shortened(command: str, old: str, new: str) -> str:
    """Return the command with one part replaced."""
    assert command.count(old) == 1
    return command.replace(old, new)


def run(start: Start, command: str) -> str:
    """Run a command to its end; return what it printed."""
    running = start("bash", "-euo", "pipefail", "-c", command, PATH=PATH)
    assert running.ends(280) == 0, running.output
    return running.output


def test_the_suite_is_run_by_the_same_command_as_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command_with("python3 -m venv") in readme.replace(".venv/bin/", "")


def test_more_cases_of_a_hostile_server_can_be_asked_for(start: Start) -> None:
    command = shortened(command_with("HOSTILE_CASES"), "100000", "5")
    assert re.search(r"\d+ passed", run(start, command))


def test_what_the_tests_do_not_reach_can_be_listed(start: Start, tmp_path: object) -> None:
    command = shortened(
        command_with("coverage run"), "-m pytest", "-m pytest tests/test_on_message.py"
    )
    output = run(start, f"export COVERAGE_FILE={tmp_path}/coverage; {command}")
    assert re.search(r"^locustfile\.py +\d+", output, re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the project's git history")
def test_two_versions_are_compared_in_one_process(start: Start, tmp_path: object) -> None:
    program("git")
    command = command_with("benchmarks/pairs.py").replace("/tmp", str(tmp_path))
    output = run(start, shortened(command, "--users 100", "--users 5 --slices 2"))
    assert "processor time a message: " in output
    assert "failed requests: 0, 0" in output
