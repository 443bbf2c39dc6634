"""``plugins/abnormal_clients.py``: that each abuse reaches the server, and what fails a run."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import contextlib
import re
import shlex
import socket
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import abnormal_clients
import gevent
import pytest
from abnormal_clients import HALF, AbnormalClient
from clients import at_once
from gevent.lock import Semaphore
from locust.env import Environment
from locust.event import Events
from programs import (
    QUICK_LOCUST,
    Program,
    Start,
    WebUI,
    bus_options,
    documented_commands,
    last_line,
    wait_until,
)
from rows import Rows
from servers import Serve, echo, free_port, hang_up, lines, silent

import locustfile

User = Callable[..., AbnormalClient]

PLUGIN = ("-f", "plugins/abnormal_clients.py")
NO_TLS = (
    "'tls://localhost:1' is not a valid --host: "
    "use tcp://localhost:1: abnormal clients speak no TLS"
)
KINDS = {
    "invalid UTF-8",
    "empty message",
    "no delimiter in 256 KiB",
    "short of its prefix",
    "huge prefix",
    "half, then silence",
    "half, then reset",
    "connect and leave",
    "half-close",
    "trickle",
}


def documented() -> list[str]:
    """Return the command of the plugin's first lines, with shorter pauses."""
    command, *_ = documented_commands(abnormal_clients.__doc__)
    _, option, files, *options = shlex.split(command)
    assert (option, files) == PLUGIN
    files += ",tests/locustfiles/short_abuses.py"
    return [option, files, *options, "--chat-wait=0.05"]


def end(running: Program) -> int:
    """End the run, and return the exit code."""
    code = running.stop()
    assert "Traceback" not in running.output
    return code


def kinds_in(output: str) -> set[str]:
    """Return the kinds of abuse that have a row."""
    return set(re.findall(r"^ABUSE +(\S.*?\S) {2,}", output, re.MULTILINE))


def failures(output: str, row: str) -> int:
    """Return how many failures the rows that match a pattern have in all tables so far."""
    counts = re.findall(rf"^{row} +\d+ +(\d+)\(", output, re.MULTILINE)
    return sum(map(int, counts))


class WellMade:
    """A line server that echoes, answers an error, or hangs up where it must.

    It keeps what kinds of abuse its connections have been.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, connection: socket.socket) -> None:
        received = b""
        rest = b""
        reads = 0
        ending = "closed"
        try:
            while data := connection.recv(65536):
                received += data
                reads += 1
                *complete, rest = (rest + data).split(b"\n")
                for line in complete:
                    connection.sendall(self._answer(line))
                if len(rest) > 65536:
                    ending = "too long"
                    break
        except ConnectionResetError:
            ending = "reset"
        kind = self._kind(received, reads, ending)
        self.seen.add(kind)

    @staticmethod
    def _answer(line: bytes) -> bytes:
        try:
            line.decode()
        except UnicodeDecodeError:
            return b"error: not UTF-8\n"
        return line + b"\n"

    @staticmethod
    def _kind(data: bytes, reads: int, ending: str) -> str:
        conditions = {
            "invalid UTF-8": data.startswith(b"\xff\xfe\xc3(") and data.endswith(b"\n"),
            "empty message": data == b"\n",
            "no delimiter in 256 KiB": ending == "too long" and set(data) == {ord("x")},
            "short of its prefix": data == struct.pack(">I", 200) + b"x" * 10,
            "huge prefix": data == b"\xff" * 4 + b"x" * 10,
            "half, then silence": data == b"x" * 51 and ending == "closed",
            "half, then reset": data == HALF + b"x" and ending == "reset",
            "connect and leave": data == b"" and ending == "closed",
            "half-close": data == b"Goodbye!\n" and ending == "closed",
            "trickle": data == b"Slowly!\n" and reads > 1,
        }
        for kind, is_met in conditions.items():
            if is_met:
                return kind
        return "a message"


def leaking() -> Callable[[socket.socket], None]:
    """Return a line server that gives the half of a reset connection to the next one."""
    halves: list[bytes] = []

    def serve_one(connection: socket.socket) -> None:
        rest = b"".join(halves)
        halves.clear()
        try:
            while data := connection.recv(65536):
                *complete, rest = (rest + data).split(b"\n")
                for line in complete:
                    connection.sendall(line + b"\n")
        except ConnectionResetError:
            halves.append(rest)

    return serve_one


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.together
def test_a_well_made_server_sees_every_abuse_and_passes(start: Start, serve: Serve) -> None:
    server = WellMade()
    listening = serve(server)
    running = start(*QUICK_LOCUST, *documented(), f"--host={listening.address}")
    running.prints('{"AbnormalClient": 19, "Canary": 1}')
    wait_until(lambda: server.seen >= KINDS)
    wait_until(lambda: kinds_in(running.output) == KINDS)
    assert end(running) == 0
    said = (
        r"abnormal clients: the canary got (\d+) of \1 echoes; the server survived all \d+ abuses.*"
    )
    assert re.fullmatch(said, last_line(running))
    assert failures(running.output, ".*?") == 0
    assert "TCP      echo_response" in running.output
    wait_until(lambda: listening.open == 0)


@pytest.mark.together
def test_a_server_that_crashes_on_invalid_text_fails(start: Start, serve: Serve) -> None:
    crashed: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            try:
                line.decode()
            except UnicodeDecodeError:
                crashed.append(line)
            else:
                connection.sendall(line + b"\n")

    listening = serve(server)
    running = start(*QUICK_LOCUST, *documented(), f"--host={listening.address}")
    wait_until(lambda: crashed)
    listening.stop()
    wait_until(lambda: failures(running.output, "ABUSE +.*?"))
    wait_until(lambda: failures(running.output, "TCP +connect"))
    assert end(running) == 1
    assert "NotAccepted('After the abuse the server accepted no connection.')" in running.output
    assert "ConnectionRefusedError(111, 'Connection refused')" in running.output
    canary = r"the canary got \d+ of \d+ echoes.*, \d+ × connect failed.*"
    abuse = r"the server did not survive: .* \(\d+ ×\)"
    assert re.fullmatch(f"abnormal clients: {canary}; {abuse}", last_line(running))


@pytest.mark.together
def test_abuses_that_found_no_server_are_not_blamed(start: Start) -> None:
    running = start(
        *QUICK_LOCUST,
        *PLUGIN,
        f"--host=127.0.0.1:{free_port()}",
        *("--headless", "--users=3", "--spawn-rate=9", "--run-time=1s"),
        "--chat-wait=0.1",
    )
    assert running.ends() == 1
    said = r"the canary got 0 of 0 echoes.*; \d+ abuses found no server$"
    assert re.search(said, last_line(running))


@pytest.mark.together
def test_in_a_room_whose_members_get_half_a_flood_the_canary_is_not_hit(
    start: Start, serve: Serve
) -> None:
    """A room that takes the end of a connection for that of a message gives it to everybody."""
    members: set[socket.socket] = set()
    lengths: set[int] = set()

    def room(connection: socket.socket) -> None:
        members.add(connection)
        rest = b""
        try:
            while data := connection.recv(65536):
                *complete, rest = (rest + data).split(b"\n")
                for line in complete:
                    tell(line)
            tell(rest)
        finally:
            members.discard(connection)

    def tell(line: bytes) -> None:
        lengths.add(len(line))
        for member in list(members):
            with contextlib.suppress(OSError):
                member.sendall(b"guest: " + line + b"\n")

    host = f"--host={serve(room).address}"
    running = start(*QUICK_LOCUST, *documented(), host)
    wait_until(lambda: max(lengths, default=0) > 200_000)
    wait_until(lambda: "TCP      echo_response" in running.output)
    end(running)  # 1 where a half message came to a member that had just joined: it is told to all
    assert re.match(r"abnormal clients: the canary got (\d+) of \1 echoes; ", last_line(running))


@pytest.mark.together
@pytest.mark.parametrize("is_verdict_last", [True, False])
def test_an_abuse_that_failed_fails_the_run_whatever_limit_holds(
    start: Start, serve: Serve, is_verdict_last: bool
) -> None:
    files = ["plugins/abnormal_clients.py", "plugins/verdict.py"]
    if not is_verdict_last:
        files.reverse()
    running = start(
        *QUICK_LOCUST,
        *("-f", ",".join(files)),
        f"--host={serve(leaking()).address}",
        *("--headless", "--users=9", "--spawn-rate=9"),
        *("--chat-wait=0.05", "--chat-max-fail-ratio=1"),
    )
    wait_until(lambda: failures(running.output, "ABUSE +half, then reset"))
    assert end(running) == 1
    said = "Half a message of a connection that was reset came to a new connection."
    assert f"Leaked('{said}')" in running.output


@pytest.mark.together
def test_where_nobody_is_ever_echoed_no_abuse_is_blamed(start: Start, serve: Serve) -> None:
    running = start(
        *QUICK_LOCUST,
        *documented(),
        f"--host={serve(silent).address}",
        "--chat-timeout=0.3",
    )
    wait_until(lambda: failures(running.output, "ABUSE .*?") > 3)
    assert end(running) == 1
    said = r"abnormal clients: the canary got 0 of [1-9]\d* echoes.*; nothing was tested, as the "
    assert re.match(said + "server echoed nobody", last_line(running))


@pytest.mark.together
def test_a_canary_that_got_no_echo_fails_the_run_and_says_so_once(
    start: Start, serve: Serve
) -> None:
    running = start(
        *QUICK_LOCUST,
        *PLUGIN,
        f"--host={serve(silent).address}",
        *("--headless", "--users=3", "--spawn-rate=9", "--run-time=1s"),
        *("--chat-timeout=60", "--processes=1", *bus_options()),
    )
    assert running.ends() == 1
    (line,) = re.findall("^abnormal clients: .*", running.output, re.MULTILINE)
    assert line.startswith("abnormal clients: the canary got 0 of 0 echoes; ")


@pytest.mark.together
def test_a_run_without_an_abuser_fails_and_says_what_to_write(start: Start, serve: Serve) -> None:
    host = f"--host={serve(echo).address}"
    options = ("--headless", "--users=1", "--run-time=2s")
    running = start(*QUICK_LOCUST, *PLUGIN, host, *options)
    assert running.ends() == 1
    assert "; nobody has abused the server: use --users=2 or more" in last_line(running)


@pytest.mark.together
def test_a_worker_gets_the_plugin_from_its_master(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    bus = bus_options()
    master = start(
        *QUICK_LOCUST,
        *("-f", "locustfile.py,plugins/abnormal_clients.py"),
        *("Canary", "AbnormalClient"),
        f"--host={serve(echo).address}",
        *("--headless", "--users=4", "--spawn-rate=4"),
        *("--master", "--expect-workers=1", *bus),
    )
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus, cwd=tmp_path)
    master.prints('All users spawned: {"AbnormalClient": 3, "Canary": 1')
    wait_until(lambda: kinds_in(master.output))
    wait_until(lambda: "TCP      echo_response" in master.output)
    assert end(master) == 0
    assert worker.ends() == 0


@pytest.mark.together
@pytest.mark.parametrize("processes", [(), ("--processes=2", *bus_options())])
def test_a_server_with_tls_is_refused_at_the_start_in_one_line(
    start: Start, processes: tuple[str, ...]
) -> None:
    options = ("--headless", "--users=2", "--host=tls://localhost:1")
    running = start(*QUICK_LOCUST, *PLUGIN, *options, *processes)
    assert running.ends() == 1
    said = [line for line in running.output.splitlines() if "INFO" not in line]
    assert said == [f"locust: error: {NO_TLS}"]


@pytest.mark.together
def test_a_server_with_tls_typed_into_the_web_ui_is_a_failed_row_that_says_it(
    start: Start,
) -> None:
    web_ui = WebUI()
    running = start(*QUICK_LOCUST, *PLUGIN, *web_ui.options)
    web_ui.swarm(user_count="3", host="tls://localhost:1", chat_wait="0.1")

    def failed() -> set[str]:
        errors = web_ui.statistics()["errors"]
        return {error["method"] for error in errors if NO_TLS in error["error"]}

    wait_until(failed)
    assert failed() == {"ABUSE"}
    assert end(running) == 1


# ------------------------------------------------------------------------------------ single users


@pytest.fixture
def user(rows: Rows) -> Iterator[User]:
    """Return a function that makes an abnormal client of a port, with options."""
    abnormal: list[AbnormalClient] = []

    def make(
        port: int,
        user_class: type[AbnormalClient] = AbnormalClient,
        host: str = "127.0.0.1",
        **options: str,
    ) -> AbnormalClient:
        environment = Environment(
            host=f"{host}:{port}",
            events=Events(),
            parsed_options=Namespace(**options),
        )
        environment.events.request.add_listener(lambda **row: rows.append(row))
        abnormal.append(user_class(environment))
        return abnormal[-1]

    yield make
    for one in abnormal:
        one.client.close()


def test_one_row_for_an_abuse_and_none_for_the_question_after_it(
    user: User, serve: Serve, rows: Rows
) -> None:
    user(serve(echo).port).half_close()
    (row,) = rows
    assert row["request_type"] == "ABUSE"
    assert row["name"] == "half-close"
    assert row["exception"] is None
    assert row["response_time"] > 0


def test_a_server_that_hangs_up_at_once_has_only_failed_to_echo_afterwards(
    user: User, serve: Serve, rows: Rows
) -> None:
    """Hanging up is a right answer to an abuse, but not to what is asked afterwards."""
    server = serve(hang_up)
    user(server.port, chat_echo="none").invalid_utf_8()
    user(server.port).invalid_utf_8()
    assert rows.counts() == {"invalid UTF-8": 1, "invalid UTF-8: NotEchoed": 1}


def test_a_server_that_hangs_on_half_a_message_does_not_echo_afterwards(
    user: User, serve: Serve, rows: Rows
) -> None:
    halves: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            if data.startswith(HALF):
                halves.append(data)
            wait_until(lambda: not halves)
            connection.sendall(data)

    user(serve(server).port, chat_timeout="0.5").half_then_reset()
    assert rows.counts() == {"half, then reset: NotEchoed": 1}
    halves.clear()


def test_a_server_that_serves_nobody_while_one_is_slow_fails(
    user: User, serve: Serve, rows: Rows
) -> None:
    turn = Semaphore()

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            with turn:
                while not data.endswith(b"\n"):
                    more = connection.recv(65536)
                    if not more:
                        return
                    data += more
                connection.sendall(data)

    port = serve(server).port
    slow = gevent.spawn(user(port).half_then_silence)
    wait_until(turn.locked)
    user(port, chat_timeout="0.5").connect_and_leave()
    assert rows.counts() == {"connect and leave: NotEchoed": 1}
    slow.kill()


def test_a_connection_that_the_server_does_not_end_is_a_failure(
    user: User, serve: Serve, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        echo(connection)
        wait_until(lambda: rows)

    user(serve(server).port, chat_timeout="0.5").half_close()
    assert rows.counts() == {"half-close: NotEnded": 1}
    assert rows[0]["response_time"] >= 500


def test_a_server_that_stops_reading_does_not_stop_the_client(
    user: User, serve: Serve, rows: Rows
) -> None:
    server = serve(lambda connection: wait_until(lambda: rows))
    more_than_the_kernel_takes = b"x" * 2**24
    with gevent.Timeout(60):
        abnormal = user(server.port, chat_timeout="0.5")
        abnormal.abuse("more than the kernel takes", more_than_the_kernel_takes)
    assert rows.counts() == {"more than the kernel takes: NotEnded": 1}


def test_nothing_listens(user: User, rows: Rows) -> None:
    user(free_port()).connect_and_leave()
    assert rows.counts() == {"connect and leave: ConnectionRefusedError": 1}


@pytest.mark.parametrize(
    ("framing", "row"),
    [
        ("line", "half, then reset: Leaked"),
        ("crlf", "half, then reset: Leaked"),
        ("raw", "half, then reset"),
    ],
)
def test_half_a_message_before_the_echo_is_a_leak_but_in_raw_it_is_a_message(
    user: User, serve: Serve, rows: Rows, framing: str, row: str
) -> None:
    halves: list[bytes] = []

    def server(connection: socket.socket) -> None:
        connection.sendall(b"".join(halves))
        while data := connection.recv(65536):
            halves[:] = [data + b"\n"]
            connection.sendall(data)

    abnormal = user(serve(server).port, chat_framing=framing, chat_echo="tag")
    abnormal.half_then_reset()
    assert rows.counts() == {row: 1}


def test_no_leak_is_missed_while_many_users_ask_at_a_time(
    user: User, serve: Serve, rows: Rows
) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(HALF + b"\n" + line + b"\n")

    port = serve(server).port
    clients = [user(port) for _ in range(20)]
    at_once(AbnormalClient.connect_and_leave, clients)
    assert rows.counts() == {"connect and leave: Leaked": 20}


def test_half_a_message_within_the_echo_is_a_leak(user: User, serve: Serve, rows: Rows) -> None:
    user(serve(leaking()).port).half_then_reset()
    assert rows.counts() == {"half, then reset: Leaked": 1}


@pytest.mark.parametrize(
    ("framing", "short", "huge"),
    [
        ("<H", b"\xc8\0", b"\xff" * 2),
        (">Q", b"\0\0\0\0\0\0\0\xc8", b"\xff" * 8),
        ("crlf", b"\0\0\0\xc8", b"\xff" * 4),
    ],
)
def test_prefixes_lie_in_the_format_of_the_server_or_else_in_four_bytes(
    user: User, serve: Serve, framing: str, short: bytes, huge: bytes
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            received.append(data)
            connection.sendall(data)

    abnormal = user(serve(server).port, chat_framing=framing)
    abnormal.short_of_its_prefix()
    abnormal.huge_prefix()
    assert received[0] == short + b"x" * 10
    assert huge + b"x" * 10 in received


def test_a_user_with_a_login_logs_in_before_it_asks_and_reports_no_row_of_it(
    user: User, serve: Serve, rows: Rows
) -> None:
    class AbnormalKim(AbnormalClient):
        def on_connect(self) -> None:
            self.client.send_chat("/login Kim", echo="any")

    heard: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            heard.append(line)
            connection.sendall(line + b"\n")

    user(serve(server).port, AbnormalKim).connect_and_leave()
    assert rows.counts() == {"connect and leave": 1}
    login, question = heard
    assert login == b"/login Kim"
    assert question.endswith(b"] Is everything all right?")


@pytest.mark.parametrize("host", ["http://", "tls://localhost"])
def test_a_wrong_host_is_a_failed_row_and_no_connection(user: User, rows: Rows, host: str) -> None:
    user(1, host=host).invalid_utf_8()
    assert rows.counts() == {"invalid UTF-8: SettingError": 1}


def test_nothing_is_judged_where_nothing_was_started(capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment(events=Events())
    environment.create_local_runner()
    abnormal_clients.judge(environment)
    assert environment.process_exit_code is None
    assert capsys.readouterr().err == ""


def test_every_kind_of_error_has_a_text_of_its_own() -> None:
    texts: list[str] = []
    for item in vars(abnormal_clients).values():
        if isinstance(item, type) and issubclass(item, locustfile.ChatError):
            texts.append(str(item()))
    assert len(texts) == len(set(texts)) == 4
