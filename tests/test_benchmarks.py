"""The benchmarks' commands run and print rows. What they measure is not judged: machines differ."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import LOCUST, PATH, ROOT, Program, program

Start = Callable[..., Program]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the echo server is for Linux")

README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
COMMANDS: list[str] = re.findall(r"^    \.venv/bin/(python benchmarks/run\.py.*?)  ", README, re.M)
NAMES = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)


def command_with(word: str) -> str:
    """Return the one command of the README that has this word in it."""
    (command,) = [command for command in COMMANDS if word in command]
    return command


def run(start: Start, command: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed."""
    program("cc")
    running = start("bash", "-c", command, PATH=PATH)
    return running.ends(), running.output


def figure(text: str, before: str) -> float:
    """Return the number that follows after a text."""
    match = re.search(re.escape(before) + r"([\d.]+)", text)
    assert match is not None, text
    return float(match[1])


def test_each_comparison_of_the_readme_and_no_other_can_be_asked_for(start: Start) -> None:
    code, output = run(start, f"{COMMANDS[0]} --only nothing")
    assert code == 2
    choices = re.search(r"choose from (.*)\)", output)
    assert choices is not None
    assert re.findall(r"\w+", choices[1]) == NAMES


def test_figures_of_a_trial_are_not_written(start: Start) -> None:
    code, output = run(start, f"{command_with('--write')} --quick")
    assert code == 2
    assert "leave out --write" in output


def test_comparisons_print_their_rows(start: Start) -> None:
    code, output = run(start, f"{command_with('--only stall delivery')} --quick")
    assert code == 0, output
    (stall,) = re.findall(r"^\| `stall` .*$", output, re.MULTILINE)
    (delivery,) = re.findall(r"^\| `delivery` .*$", output, re.MULTILINE)
    assert figure(stall, "closed loop ") < 0.5 < figure(stall, "**")  # seconds
    assert figure(delivery, "with it ") > 0


def test_a_comparison_whose_program_is_missing_fails_and_says_what_to_install(
    start: Start, tmp_path: Path
) -> None:
    for name in ("bash", "cc", "as", "ld"):
        (tmp_path / name).symlink_to(program(name))
    path = f"{LOCUST[0].parent}{os.pathsep}{tmp_path}"
    running = start(program("bash"), "-c", f"{COMMANDS[0]} --quick --only peers", PATH=path)
    assert running.ends() == 1
    assert "Tsung is not on this machine: apt install tsung" in running.output
    assert "failed: peers" in running.output


@pytest.mark.parametrize(("kept", "processors"), [(True, "2"), (False, "3")])
def test_older_rows_stay_only_under_the_conditions_they_were_measured_in(
    kept: bool, processors: str, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", folder)
    results = folder / "RESULTS.md"
    results.unlink(missing_ok=True)
    write = "import os, table; os.cpu_count = lambda: {}; table.write({!r}, ['old', 'new'])"
    for count, name in (("2", "old"), (processors, "new")):
        code = write.format(count, {name: [f"| `{name}` | row |"]})
        assert start(sys.executable, "-c", code, PYTHONPATH=str(folder)).ends() == 0
    text = results.read_text(encoding="utf-8")
    assert ("| `old` |" in text) is kept
    assert "| `new` |" in text
