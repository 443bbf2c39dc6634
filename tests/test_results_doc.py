"""``docs/results.md`` and ``docs/opentelemetry.md``: what they show is what there is.

Their commands run, their pictures are there, the server of the pictures is ill, and the last line
and the warnings have these words.
"""

from __future__ import annotations

import ast
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from clients import Connect
from gevent.pywsgi import WSGIServer
from programs import (
    PATH,
    ROOT,
    Counts,
    Program,
    Start,
    code_blocks,
    content_of,
    latest_counts,
    rows_of,
    the_one_with,
    wait_until,
)
from rows import Rows
from servers import Serve, echo, free_port, lines

DOCS = ROOT / "docs"
PICTURES = sorted((DOCS / "images").iterdir())
SICK_SERVER = DOCS / "sick_server.py"
TEXT = content_of("docs/results.md")
EXPORT = content_of("docs/opentelemetry.md")
BLOCKS = code_blocks(TEXT, "sh")
COMMANDS = [block for block in BLOCKS if "--html" in block]


def with_twenty_users(command: str, port: int) -> str:
    """Return the command for the server at port, with 20 users that start at once, and more time.

    The test stops it once it has done enough.
    """
    command = re.sub(r"--spawn-rate=\S+", "--spawn-rate=20", command)
    command = re.sub(r"--users=\d+", "--users=20", command)
    command = re.sub(r"--run-time=\S+", "--run-time=4m", command)
    return command.replace("12345", str(port))


def has_twenty_users(running: Program) -> bool:
    """Return whether all users of a run have connected, and an echo has come."""
    connects = latest_counts(running, "connect")
    echoes = latest_counts(running, "echo_response")
    return connects.requests == 20 and echoes.successes > 0


@pytest.mark.together
def test_the_commands_of_the_document_run_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    core = ROOT / "locustfile.py"
    port = serve(echo).port
    runs = {}
    for number, command in enumerate(COMMANDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = with_twenty_users(command, port)
        command = command.replace("-f locustfile.py", f"-f {core}")
        arguments = command.split()
        runs[folder] = start("env", *arguments, cwd=folder, PATH=PATH)
    assert len(runs) == 6
    for folder, running in runs.items():
        wait_until(partial(has_twenty_users, running))
        assert not re.search("Traceback|ERROR", running.output)  # gevent may print Ctrl-C as one
        assert running.interrupt() == 0  # after SIGTERM, Locust writes no report
        rows = rows_of(running.output)
        assert rows["connect"] == (20, 0)
        report = folder / "report.html"
        assert report.stat().st_size > 10_000


def test_no_block_of_commands_is_without_a_test() -> None:
    room = the_one_with("plugins/delivery.py", BLOCKS)
    assert [*COMMANDS, room] == BLOCKS


def form_of(line: str) -> list[str]:
    """Return the parts of a last line, without their figures."""
    without_figures = re.sub(r"\d[\d,]*(\.\d+)?", "X", line)
    return without_figures.split("; ")


def shown_form(word: str) -> list[str]:
    """Return the form of the last line of the core or of a plugin that the document shows."""
    (line,) = re.findall(rf"^    ({word}: .*)$", TEXT, re.MULTILINE)
    return form_of(line)


@pytest.mark.together
def test_a_room_that_loses_messages_shows_it_by_the_row_and_the_last_line(start: Start) -> None:
    assert "sick_server.py room 1000" in TEXT
    port = sick(start, "room", "10")
    command = the_one_with("plugins/delivery.py", BLOCKS)
    arguments = with_twenty_users(command, port).split()
    quick = {"CHAT_WAIT": "0.1", "CHAT_TIMEOUT": "1"}
    running = start("env", *arguments, PATH=PATH, **quick)
    wait_until(lambda: latest_counts(running, "delivery").failures)
    assert running.stop() == 1
    rows = rows_of(running.output)
    assert rows["echo_response"].failures == 0
    requests, failures = rows["delivery"]
    assert 0 < failures < requests
    last_lines = re.compile(r"^(?:chat|delivery): \d.*", re.MULTILINE)
    chat, delivery = last_lines.findall(running.output)
    assert form_of(delivery) == shown_form("delivery")
    # Behind these, it may say that the generator was busy.
    assert form_of(chat)[:4] == shown_form("chat")[:4]


def texts_in_core() -> list[str]:
    """Return the texts in the file, formatted ones in their pieces."""
    tree = ast.parse(content_of("locustfile.py"))
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_the_warnings_and_the_parts_of_the_last_line_are_those_of_the_file() -> None:
    texts = texts_in_core()
    _, _, rest = TEXT.partition("| warning |")
    table, _, _ = rest.partition("\n\n")
    of_the_core = re.compile(r"^\| `([^`]*)`(?! \((?:Locust|`accounts))", re.MULTILINE)
    warnings = of_the_core.findall(table)
    assert len(warnings) == 8
    last_part = shown_form("chat")[4]
    changing = re.compile(r"is_refusal|Lobby|: |[\d.]+%?|X \w+")  # the last: what is counted
    for shown in [*warnings, last_part]:
        for piece in changing.split(shown):
            assert any(piece.strip() in text for text in texts), piece


DURATIONS = "locust.client.duration"
# By the interface of WSGI.
Environ = Mapping[str, Any]
Respond = Callable[..., object]


class Point(NamedTuple):
    """How many requests of a row have ended in one way."""

    name: str
    error: str
    """The class of the failure; empty for none."""
    requests: int


class Collector:
    """What ``--otel`` exports to. It keeps the latest metrics, which count from the beginning."""

    def __init__(self) -> None:
        self.latest = b""
        listener = ("127.0.0.1", 0)
        self._server = WSGIServer(listener, self._take, log=None)
        self._server.start()
        self.port: int = self._server.server_port

    def _take(self, environ: Environ, respond: Respond) -> list[bytes]:
        """Answer a request."""
        body: bytes = environ["wsgi.input"].read()
        if environ["PATH_INFO"] == "/v1/metrics":
            self.latest = body
        respond("200 OK", [("Content-Type", "application/x-protobuf")])
        return [b""]

    def stop(self) -> None:
        """Listen no more."""
        self._server.stop()

    def points(self) -> Iterator[Point]:
        """Yield what the metric of the requests says."""
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

        export = metrics_service_pb2.ExportMetricsServiceRequest.FromString(self.latest)
        scope = export.resource_metrics[0].scope_metrics[0]
        (durations,) = [each for each in scope.metrics if each.name == DURATIONS]
        assert durations.unit == "s"
        for point in durations.exponential_histogram.data_points:
            attributes = {pair.key: pair.value.string_value for pair in point.attributes}
            yield Point(
                attributes["name"],
                attributes.get("error.type", ""),
                point.count,
            )

    def rows(self) -> dict[str, Counts]:
        """Return requests and failures by name."""
        requests: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        for point in self.points():
            requests[point.name] += point.requests
            if point.error:
                failures[point.name] += point.requests
        rows = {}
        for name, count in requests.items():
            rows[name] = Counts(count, failures[name])
        return rows

    def errors(self) -> set[str]:
        """Return the classes of the failures."""
        return {point.error for point in self.points() if point.error}


def cut_lines(connection: socket.socket) -> None:
    """Send the first 40 bytes of every line back."""
    for line in lines(connection):
        connection.sendall(line[:40] + b"\n")


@pytest.mark.together
def test_the_rows_are_exported_to_opentelemetry_as_they_are(start: Start, serve: Serve) -> None:
    pytest.importorskip("opentelemetry.proto", reason="locust[otel] is not installed")
    collector = Collector()
    try:
        port = serve(cut_lines).port
        shell = ("bash", "-euo", "pipefail", "-c")
        script = export_script(port, collector.port)
        running = start(*shell, script, PATH=PATH, CHAT_WAIT="0.1")
        wait_until(lambda: latest_counts(running, "echo_response").failures)
        assert running.stop() == 1  # the code for failed requests; the last export is made by then
    finally:
        collector.stop()
    assert collector.rows() == rows_of(running.output)
    assert collector.errors() == {"EchoTruncated"}


def export_script(port: int, collector_port: int) -> str:
    """Return the commands of the document for a server and a collector, without the first."""
    (block,) = code_blocks(EXPORT, "sh")
    block = with_twenty_users(block, port)
    block = block.replace("4318", str(collector_port))
    install, *settings, command = block.splitlines()
    assert install == "pip install 'locust[otel]'"
    return "\n".join([*settings, f"exec {command}"])


def test_every_picture_is_used_and_every_picture_used_is_there() -> None:
    text = TEXT + content_of("README.md")
    used = re.findall(r"images/([\w-]+\.png)", text)
    assert set(used) == {path.name for path in PICTURES}
    for path in PICTURES:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_options_of_the_documents_exist() -> None:
    from locust.argument_parser import get_parser

    parser = get_parser(default_config_files=[])
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT + EXPORT)
    assert named
    assert set(named) <= set(parser._option_string_actions)


def test_the_illnesses_of_the_document_exist(start: Start) -> None:
    running = start(sys.executable, SICK_SERVER, "--help")
    assert running.ends() == 0
    modes = re.findall(r"^  (\w+) ", running.output, re.MULTILINE)
    named = re.findall(r"sick_server\.py (\w+)", TEXT)
    assert named
    assert set(named) <= set(modes)


def test_the_script_of_the_pictures_makes_all_of_them(start: Start) -> None:
    script = DOCS / "take_pictures.py"
    running = start(sys.executable, script, "nothing")
    assert running.ends() == 2
    _, _, names = running.output.rpartition("write some of ")
    runs = re.findall(r"\w+", names)
    made = {*runs, "web-ui", "report", "form"}
    assert made == {path.stem for path in PICTURES}


def sick(start: Start, *arguments: str) -> int:
    """Start the sick server; return its port."""
    port = free_port()
    server = start(sys.executable, SICK_SERVER, *arguments, f"--port={port}")
    server.prints("Ctrl-C ends it")
    return port


@pytest.mark.parametrize(
    ("illness", "first", "last"),
    [
        ("healthy", 20, 20),
        ("step 0", 220, 220),
        ("leak 50000", 70, 270),
        ("queue 50", 50, 50),
        ("pieces", 0, 0),
    ],
)
def test_the_sick_server_has_its_illness(
    start: Start,
    connect: Connect,
    rows: Rows,
    illness: str,
    first: float,
    last: float,
) -> None:
    client = connect(sick(start, *illness.split()))
    for _ in range(5):
        assert client.send_chat("hello")
    echoes = rows.named("echo_response")
    assert echoes[0]["response_time"] >= first
    assert echoes[-1]["response_time"] >= last


@pytest.mark.parametrize("illness", ["limit 0", "stall 20000"])
def test_the_sick_server_does_not_answer(start: Start, connect: Connect, illness: str) -> None:
    port = sick(start, *illness.split())
    client = connect(port, timeout=0.5)
    assert client.send_chat("hello") is None
