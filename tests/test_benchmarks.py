"""The benchmarks' commands run and print rows. What they measure is not judged: machines differ."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from programs import LOCUST, PATH, ROOT, Start, program, the_one_with

pytestmark = pytest.mark.skipif(
    sys.platform != "linux",
    reason="the echo server is for Linux",
)

FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS: list[str] = re.findall(
    r"^    \.venv/bin/(python benchmarks/run\.py.*?)  ",
    README,
    re.MULTILINE,
)
NAMES = re.findall(
    r"^\| `(\w+)` \|",
    README,
    re.MULTILINE,
)


def run(start: Start, command: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed."""
    program("cc")
    running = start("bash", "-c", command, PATH=PATH)
    return running.ends(), running.output


def rows_of(name: str, output: str) -> list[str]:
    """Return the rows of a comparison in what was printed."""
    head = f"| `{name}` |"
    lines = output.splitlines()
    return [line for line in lines if line.startswith(head)]


def figure(text: str, before: str) -> float:
    """Return the number that follows after a text."""
    match = re.search(re.escape(before) + r"([\d.]+)", text)
    assert match is not None, text
    return float(match[1])


@pytest.mark.together
def test_each_comparison_of_the_readme_and_no_other_can_be_asked_for(start: Start) -> None:
    code, output = run(start, f"{COMMANDS[0]} --only nothing")
    assert code == 2
    choices = re.search(r"choose from (.*)\)", output)
    assert choices is not None
    assert re.findall(r"\w+", choices[1]) == NAMES


@pytest.mark.together
def test_figures_of_a_trial_are_not_written(start: Start) -> None:
    command = the_one_with("--write", COMMANDS)
    code, output = run(start, f"{command} --quick")
    assert code == 2
    assert "leave out --write" in output


@pytest.mark.together
def test_comparisons_print_their_rows(start: Start) -> None:
    command = the_one_with("--only paused delivery", COMMANDS)
    code, output = run(start, f"{command} look_up --quick")
    assert code == 0, output
    failed, longest = rows_of("paused", output)
    assert figure(failed, "**") == 0
    assert figure(longest, "**") > 5  # ms, which the server takes
    (delivery,) = rows_of("delivery", output)
    assert figure(delivery, "with it over without ") > 0
    look_up = rows_of("look_up", output)
    if not look_up:
        assert "look_up skipped: a network of its own" in output


@pytest.mark.together
def test_what_a_missing_program_stands_in_the_way_of_says_what_to_install(
    start: Start, tmp_path: Path
) -> None:
    for name in ("bash", "cc", "as", "ld"):
        (tmp_path / name).symlink_to(program(name))
    path = f"{LOCUST[0].parent}{os.pathsep}{tmp_path}"
    command = f"{COMMANDS[0]} --quick --only peers look_up"
    running = start(program("bash"), "-c", command, PATH=path)
    assert running.ends() == 1
    assert "Tsung is not on this machine: apt install tsung" in running.output
    assert "look_up skipped: a network of its own takes unshare" in running.output
    assert "failed: peers\n" in running.output


@pytest.mark.together
@pytest.mark.parametrize("way", ["--tls", "--rate=20"])
def test_two_versions_are_compared_over_tls_and_in_open_loop(way: str, start: Start) -> None:
    """As they stand, in ``test_design_doc.py``."""
    program("openssl")
    files = "locustfile.py locustfile.py"
    command = f"python benchmarks/pairs.py {files} --users=5 --slices=2 {way}"
    code, output = run(start, command)
    assert code == 0, output
    assert figure(output, "processor time a message: ") > 0
    assert "failed requests: 0, 0" in output


WRITE = """
import os
import table
os.cpu_count = lambda: {}
table.write({{{!r}: ["| `{}` | row |"]}}, ["old", "new"])
"""


def write_row(start: Start, folder: Path, processors: int, name: str) -> None:
    """Write a row of that name, as if this machine had so many processors."""
    code = WRITE.format(processors, name, name)
    running = start(sys.executable, "-c", code, PYTHONPATH=str(folder))
    assert running.ends() == 0, running.output


@pytest.mark.together
@pytest.mark.parametrize(
    ("processors", "kept"),
    [(2, True), (3, False)],
)
def test_older_rows_stay_only_under_the_conditions_they_were_measured_in(
    processors: int, kept: bool, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "benchmarks"
    shutil.copytree(FOLDER, folder)
    results = folder / "RESULTS.md"
    results.unlink(missing_ok=True)
    write_row(start, folder, 2, "old")
    write_row(start, folder, processors, "new")
    text = results.read_text(encoding="utf-8")
    assert ("| `old` |" in text) is kept
    assert "| `new` |" in text
