"""``docs/results.md`` and ``docs/opentelemetry.md``: what they show is what there is.

Their commands run, their pictures are there, the server of the pictures is ill, and the last line
and the warnings have these words.
"""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clients import Connect
from gevent.pywsgi import WSGIServer
from programs import LOCUST, PATH, ROOT, Program, Start, latest_counts, rows_of, wait_until
from rows import Rows
from servers import Serve, echo, free_port, lines

DOCS = ROOT / "docs"
TEXT = (DOCS / "results.md").read_text(encoding="utf-8")
EXPORT = (DOCS / "opentelemetry.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [block.strip() for block in BLOCKS if "--html" in block]


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
    is_echoed = latest_counts(running, "echo_response").successes > 0
    return is_echoed and latest_counts(running, "connect").requests == 20


@pytest.mark.together
def test_the_commands_of_the_document_run_without_a_failure(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    port = serve(echo).port
    runs = {}
    for number, command in enumerate(COMMANDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = with_twenty_users(command, port)
        arguments = arguments.replace("-f locustfile.py", f"-f {ROOT / 'locustfile.py'}")
        runs[folder] = start(*LOCUST, *arguments.split()[1:], cwd=folder)
    assert len(runs) == 6
    for folder, running in runs.items():
        wait_until(partial(has_twenty_users, running))
        assert not re.search("Traceback|ERROR", running.output)  # gevent may print Ctrl-C as one
        assert running.interrupt() == 0  # after SIGTERM, Locust writes no report
        assert rows_of(running.output)["connect"] == (20, 0)
        assert (folder / "report.html").stat().st_size > 10_000


def block_with(text: str) -> str:
    """Return the one block of commands that contains a text."""
    (block,) = [block for block in BLOCKS if text in block]
    return str(block)


def test_no_block_of_commands_is_without_a_test() -> None:
    assert [*COMMANDS, block_with("plugins/delivery.py").strip()] == [b.strip() for b in BLOCKS]


def form_of(line: str) -> list[str]:
    """Return the parts of a last line, without their figures."""
    return re.sub(r"\d[\d,]*(\.\d+)?", "X", line).split("; ")


def shown_line(word: str) -> str:
    """Return the last line of the core or of a plugin that the document shows."""
    (line,) = re.findall(rf"^    ({word}: .*)$", TEXT, re.MULTILINE)
    return str(line)


@pytest.mark.together
def test_a_room_that_loses_messages_shows_it_by_the_row_and_the_last_line(start: Start) -> None:
    losing = re.search(r"sick_server\.py (room) 1000", TEXT)
    assert losing is not None
    port = sick(start, losing[1], "10")
    command = with_twenty_users(block_with("plugins/delivery.py"), port)
    running = start(*LOCUST, *command.split()[1:], CHAT_WAIT="0.1", CHAT_TIMEOUT="1")
    wait_until(lambda: latest_counts(running, "delivery").failures)
    assert running.stop() == 1
    rows = rows_of(running.output)
    assert rows["echo_response"][1] == 0
    requests, failures = rows["delivery"]
    assert 0 < failures < requests
    chat, delivery = re.findall(r"^(?:chat|delivery): \d.*", running.output, re.MULTILINE)
    assert form_of(delivery) == form_of(shown_line("delivery"))
    # Behind these, it may say that the generator was busy.
    assert form_of(chat)[:4] == form_of(shown_line("chat"))[:4]


def texts_in(*names: str) -> list[str]:
    """Return the texts in files of the project, formatted ones in their pieces."""
    texts: list[str] = []
    for name in names:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_warnings_and_the_parts_of_the_last_line_are_those_of_the_file() -> None:
    texts = texts_in("locustfile.py")
    table = TEXT.partition("| warning |")[2].partition("\n\n")[0]
    warnings = re.findall(r"^\| `([^`]*)`(?! \(Locust\))", table, re.MULTILINE)
    assert len(warnings) == 6
    last_part = form_of(shown_line("chat"))[4].removeprefix("X")
    for shown in [*warnings, last_part]:
        pieces = re.split(r"is_refusal|[\d.]+%?", shown)
        assert all(any(piece in text for text in texts) for piece in pieces)


class Collector:
    """What ``--otel`` exports to. It keeps the latest metrics, which count from the beginning."""

    def __init__(self) -> None:
        self.latest = b""
        self._server = WSGIServer(("127.0.0.1", 0), self._take, log=None)
        self._server.start()
        self.port: int = self._server.server_port

    def _take(self, environ: Mapping[str, Any], respond: Callable[..., object]) -> list[bytes]:
        """Answer a request, by the interface of WSGI."""
        body: bytes = environ["wsgi.input"].read()
        if environ["PATH_INFO"] == "/v1/metrics":
            self.latest = body
        respond("200 OK", [("Content-Type", "application/x-protobuf")])
        return [b""]

    def stop(self) -> None:
        """Listen no more."""
        self._server.stop()

    def rows(self) -> tuple[dict[str, tuple[int, int]], set[str]]:
        """Return requests and failures by name, and the classes of the failures."""
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

        export = metrics_service_pb2.ExportMetricsServiceRequest.FromString(self.latest)
        metrics = export.resource_metrics[0].scope_metrics[0].metrics
        (durations,) = [metric for metric in metrics if metric.name == "locust.client.duration"]
        assert durations.unit == "s"
        rows: dict[str, tuple[int, int]] = {}
        errors: set[str] = set()
        for point in durations.exponential_histogram.data_points:
            attributes = {pair.key: pair.value.string_value for pair in point.attributes}
            requests, failures = rows.get(attributes["name"], (0, 0))
            if "error.type" in attributes:
                errors.add(attributes["error.type"])
                failures += point.count
            rows[attributes["name"]] = (requests + point.count, failures)
        return rows, errors


def cut_lines(connection: socket.socket) -> None:
    """Send the first 40 bytes of every line back."""
    for line in lines(connection):
        connection.sendall(line[:40] + b"\n")


@pytest.mark.together
def test_the_rows_are_exported_to_opentelemetry_as_they_are(start: Start, serve: Serve) -> None:
    pytest.importorskip("opentelemetry.proto", reason="locust[otel] is not installed")
    collector = Collector()
    try:
        server = serve(cut_lines)
        (block,) = re.findall(r"^```sh\n(.*?)^```", EXPORT, re.MULTILINE | re.DOTALL)
        block = with_twenty_users(block, server.port)
        install, *export, command = block.replace("4318", str(collector.port)).splitlines()
        assert install == "pip install 'locust[otel]'"
        shell = ("bash", "-euo", "pipefail", "-c", "\n".join([*export, f"exec {command}"]))
        running = start(*shell, PATH=PATH, CHAT_WAIT="0.1")
        wait_until(lambda: latest_counts(running, "echo_response").failures)
        assert running.stop() == 1  # the code for failed requests; the last export is made by then
    finally:
        collector.stop()
    exported, errors = collector.rows()
    assert exported == rows_of(running.output)
    assert errors == {"EchoTruncated"}


def test_every_picture_is_used_and_every_picture_used_is_there() -> None:
    guide = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"images/([\w-]+\.png)", TEXT + guide))
    assert used == {path.name for path in (DOCS / "images").iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (DOCS / "images").iterdir())


def test_the_options_and_illnesses_of_the_document_exist() -> None:
    from locust.argument_parser import get_parser

    options = set(get_parser(default_config_files=[])._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT + EXPORT)) <= options
    done = subprocess.run(
        [sys.executable, DOCS / "sick_server.py", "--help"], capture_output=True, text=True
    )
    modes = set(re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE))
    assert set(re.findall(r"sick_server\.py (\w+)", TEXT)) <= modes


def test_the_script_of_the_pictures_makes_all_of_them() -> None:
    script = DOCS / "take_pictures.py"
    done = subprocess.run(
        [sys.executable, script, "nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    runs = set(re.findall(r"\w+", done.stderr.rpartition("write some of ")[2]))
    assert {path.stem for path in (DOCS / "images").iterdir()} == runs | {
        "web-ui",
        "report",
        "form",
    }


def sick(start: Start, *arguments: str) -> int:
    """Start the sick server; return its port."""
    port = free_port()
    start(sys.executable, DOCS / "sick_server.py", *arguments, f"--port={port}").prints(
        "Ctrl-C ends it"
    )
    return port


@pytest.mark.parametrize(
    ("illness", "first", "last"),
    [
        (["healthy"], 20, 20),
        (["step", "0"], 220, 220),
        (["leak", "50000"], 70, 270),
        (["queue", "50"], 50, 50),
        (["pieces"], 0, 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_sick_server_has_its_illness(
    start: Start, connect: Connect, rows: Rows, illness: list[str], first: float, last: float
) -> None:
    client = connect(sick(start, *illness))
    assert all(client.send_chat("hello") for _ in range(5))
    times = [row["response_time"] for row in rows.named("echo_response")]
    assert times[0] >= first
    assert times[-1] >= last


@pytest.mark.parametrize(
    "illness", [["limit", "0"], ["stall", "20000"]], ids=lambda value: str(value[0])
)
def test_the_sick_server_does_not_answer(
    start: Start, connect: Connect, illness: list[str]
) -> None:
    assert connect(sick(start, *illness), timeout=0.5).send_chat("hello") is None
