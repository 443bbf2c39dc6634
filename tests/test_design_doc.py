"""The commands of docs/design.md, each run as it stands there, but shorter."""

from __future__ import annotations

import ast
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import LOCUST, PATH, ROOT, Start, latest_counts, program, rows_of, wait_until
from servers import Serve, lines

SOURCE = (ROOT / "locustfile.py").read_text(encoding="utf-8")
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


def names_in_source() -> Iterator[str]:
    """Yield what the file defines, and the words in its ``__slots__``."""
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def section(heading: str) -> str:
    """Return the text below a heading of the document."""
    return DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_what_the_life_of_a_message_names_is_in_the_file() -> None:
    _, picture, text = section("The life of a message").split("```")
    named = set(re.findall(r"\b\w*_\w+|\b[A-Z]+[a-z]\w+|(?<=\.)[a-z]\w+", picture))
    named |= set(re.findall(r"`(?:\w+\.)?(\w+)", text))
    assert {"send_chat", "flush", "_deliver", "MessageQueue", "_on_deadline"} <= named
    assert named - {"wait"} <= set(names_in_source())  # ``wait=False``, a parameter


def test_the_parts_of_the_first_table_are_classes_of_the_file() -> None:
    classes = re.findall(r"^\| `([A-Z]\w+)` \|", section("The life of a message"), re.MULTILINE)
    assert len(classes) == 9
    assert all(re.search(rf"^class {name}\b", SOURCE, re.MULTILINE) for name in classes)


def test_the_suite_is_run_by_the_same_command_as_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command_with("python3 -m venv") in readme.replace(".venv/bin/", "")


@pytest.mark.together
def test_more_cases_of_a_hostile_server_can_be_asked_for(start: Start) -> None:
    command = shortened(command_with("HOSTILE_CASES"), "100000", "5")
    assert re.search(r"\d+ passed", run(start, command))


@pytest.mark.together
def test_what_the_tests_do_not_reach_can_be_listed(start: Start, tmp_path: object) -> None:
    command = shortened(
        command_with("coverage run"), "-m pytest", "-m pytest tests/test_framing.py -k prefix"
    )
    output = run(start, f"export COVERAGE_FILE={tmp_path}/coverage; {command}")
    assert re.search(r"^locustfile\.py +\d+", output, re.MULTILINE)


@pytest.mark.together
def test_the_two_ways_to_find_a_tag_can_be_timed(start: Start) -> None:
    output = run(start, command_with("timeit").replace("-m timeit", "-m timeit -n 1 -r 1"))
    assert output.count("sec per loop") == 2


@pytest.mark.together
def test_the_plugin_of_the_document_works(start: Start, serve: Serve, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "questions.py").write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    everybody: set[socket.socket] = set()

    def room(connection: socket.socket) -> None:
        everybody.add(connection)
        for line in lines(connection):
            for member in everybody:
                member.sendall(line + b"\n")

    (command,) = re.findall(r"^ +locust (.*)", code, re.MULTILINE)
    port = str(serve(room).port)
    arguments = shortened(shortened(command, "12345", port), "--users=20", "--users=3")
    running = start(*LOCUST, *arguments.split(), cwd=tmp_path, CHAT_WAIT="0.1")
    wait_until(lambda: latest_counts(running, "heard").requests > 10)
    assert running.stop() == 0
    assert set(rows_of(running.output)) == {"connect", "send_chat", "echo_response", "heard"}


@pytest.mark.together
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the project's git history")
def test_two_versions_are_compared_in_one_process(start: Start, tmp_path: object) -> None:
    program("git")
    command = command_with("benchmarks/pairs.py").replace("/tmp", str(tmp_path))
    output = run(start, shortened(command, "--users 100", "--users 5 --slices 2"))
    assert "processor time a message: " in output
    assert "failed requests: 0, 0" in output
