"""The examples of docs/protocols.md: each file as it stands there, run with the command below it, on a real server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import PATH, ROOT, Program, Rows, Server, free_port, lines, program, wait_until
from test_command import quiet, rows_of

from locustfile import MESSAGE_LIMIT, Framing, MessageTooLong, TCPSocketClient

Start = Callable[..., Program]
Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]

DOCUMENT = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)^```\n\n```sh\n(.*?)\n```", re.MULTILINE | re.DOTALL)
EXAMPLES = {name: (code, command) for name, code, command in EXAMPLE.findall(DOCUMENT)}
PAYLOADS = [b"\x01kim", b"\x02", b"\x02" + "안녕하세요 👋".encode(), b"\x03" + b"x" * 600, b"\xfflast"]
HEADERS = {"as it stands": [], "four bytes, big-endian": [('"<BH"', '">BI"')]}
HEADERS["a length that counts the header"] = [
    ("len(payload) - 1)", "len(payload) - 1 + HEADER.size)"),
    ("            if not 0", "            length -= HEADER.size\n            if not 0"),
]


def run(start: Start, folder: Path, name: str, port: int, users: int = 10, wait: str = "0.1") -> Program:
    """Save the example beside a copy of locustfile.py; start its command with fewer users on 127.0.0.1. The run is
    stopped once it has done enough: how much a short run does is a matter of how busy the machine is."""
    code, command = EXAMPLES[name]
    (folder / name).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", folder)
    for option, value in {"host": f"127.0.0.1:{port}", "users": users, "spawn-rate": users}.items():
        command, found = re.subn(rf"--{option}=\S+", f"--{option}={value}", command)
        assert found == 1
    return start("bash", "-euo", "pipefail", "-c", f"exec {command}", cwd=folder, PATH=PATH, CHAT_WAIT=wait)


def stopped(running: Program) -> int:
    """Stop the run as Ctrl-C does; return its exit code."""
    running.process.send_signal(signal.SIGINT)
    return running.ends()


def stopped_without_failure(running: Program) -> None:
    """Stop the run, and fail the test unless its ten users were connected and echoed and nothing else happened."""
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response"} and rows["connect"] == (10, 0)
    assert rows["echo_response"][0] > 30 and rows["echo_response"][1] == 0
    assert quiet(running.output)


def defined(name: str, *changes: tuple[str, str]) -> dict[str, Any]:
    """Return what the code of the example defines, after changes that the document describes."""
    code = EXAMPLES[name][0]
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_document_has_the_examples_that_its_first_table_names() -> None:
    named = re.findall(r"^\| .* \| \[`(\w+\.py)`\]\(#(.*)\) \|$", DOCUMENT, re.MULTILINE)
    assert sorted(EXAMPLES) == sorted(name for name, _ in named) and len(EXAMPLES) == 5
    assert DOCUMENT.count("```python") == DOCUMENT.count("```sh") == 5
    headings = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    assert [anchor for _, anchor in named if anchor not in {h.lower().replace(" ", "-") for h in headings}] == []


def receive(connection: socket.socket, size: int) -> bytes:
    """Return exactly so many bytes; raise ``EOFError`` where the connection ends before."""
    data = b""
    while len(data) < size:
        if not (more := connection.recv(size - len(data))):
            raise EOFError
        data += more
    return data


def test_a_server_with_a_binary_header_is_loaded(start: Start, serve: Serve, tmp_path: Path) -> None:
    logins: list[bytes] = []
    texts: list[str] = []

    def server(connection: socket.socket) -> None:
        logged_in = False
        try:
            while True:
                kind, length = struct.unpack("<BH", receive(connection, 3))
                data = receive(connection, length)
                assert (kind == 2) == logged_in
                if kind == 1:
                    logins.append(data)
                    logged_in = True
                    connection.sendall(b"\x01\x07\x00welcome\x03\x00\x00")
                else:
                    texts.append(data.decode())
                    reply = b"\x03\x02\x00hi" + struct.pack("<BH", 2, length) + data
                    connection.sendall(reply[:6])
                    connection.sendall(reply[6:])
        except EOFError:
            pass

    running = run(start, tmp_path, "binary_header.py", serve(server).port)
    wait_until(lambda: len(texts) > 50)
    stopped_without_failure(running)
    assert logins == [b"load"] * 10
    assert all(re.match(r"\[[0-9a-f]{8}\.\d+\] ", text) for text in texts)


def header_framing(changes: str) -> Framing:
    framing: Framing = defined("binary_header.py", *HEADERS[changes])["HeaderFraming"]()
    return framing


def test_the_bytes_of_the_binary_header_are_those_of_the_document() -> None:
    assert header_framing("as it stands").encode(b"\x02hello") == b"\x02\x05\x00hello"
    assert header_framing("four bytes, big-endian").encode(b"\x02hello") == b"\x02\x00\x00\x00\x05hello"
    assert header_framing("a length that counts the header").encode(b"\x02hello") == b"\x02\x08\x00hello"


@pytest.mark.parametrize("changes", HEADERS)
def test_a_binary_stream_whole_byte_by_byte_or_cut_anywhere_gives_all_messages(changes: str) -> None:
    framing = header_framing(changes)
    data = b"".join(framing.encode(payload) for payload in PAYLOADS)
    assert list(framing.feed(data)) == PAYLOADS
    assert [p for i in range(len(data)) for p in framing.feed(data[i : i + 1])] == PAYLOADS
    for cut in range(len(data) + 1):
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == PAYLOADS


def test_a_message_that_the_binary_header_cannot_say_is_refused_before_it_is_sent() -> None:
    framing = header_framing("as it stands")
    assert len(framing.encode(b"\x02" + b"x" * 65535)) == 65538
    for payload in (b"", b"\x02" + b"x" * 65536):
        with pytest.raises(ValueError, match="a length that the header can say"):
            framing.encode(payload)


def test_a_length_over_the_limit_fails_before_its_data_comes() -> None:
    framing = header_framing("four bytes, big-endian")
    assert len(next(iter(framing.feed(framing.encode(b"\x02" + b"x" * MESSAGE_LIMIT))))) == MESSAGE_LIMIT + 1
    with pytest.raises(MessageTooLong):
        list(framing.feed(struct.pack(">BI", 2, MESSAGE_LIMIT + 1)))


def test_a_length_shorter_than_the_header_that_it_counts_fails_and_does_not_loop() -> None:
    with pytest.raises(MessageTooLong):
        list(header_framing("a length that counts the header").feed(b"\x02\x00\x00"))


def test_a_json_server_is_loaded_after_a_login(start: Start, serve: Serve, tmp_path: Path) -> None:
    texts: list[str] = []

    def server(connection: socket.socket) -> None:
        logged_in = False
        for line in lines(connection):
            message = json.loads(line)
            if logged_in:
                assert list(message) == ["type", "id", "text"] and message["type"] == "chat"
                texts.append(message["text"])
                again = {"text": message["text"], "from": "load", "id": message["id"]}
                reply = json.dumps(again, ensure_ascii=False, separators=(",", ":"))
                connection.sendall(b'not JSON\n{"from": "another"}\n' + reply.encode() + b"\n")
            else:
                logged_in = message == {"type": "login", "name": "load", "password": "secret"}
                connection.sendall(b'{"ok":true}\n')

    running = run(start, tmp_path, "json_login.py", serve(server).port)
    wait_until(lambda: len(texts) > 50)
    stopped_without_failure(running)
    assert any("안녕" in text for text in texts)


def test_a_refused_login_is_a_failed_row_and_no_storm_whatever_the_server_answers(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    refusals = [
        b'{"ok": false}',
        b"wrong password",
        b"",
        b"[]",
        b"{}",
        b"5",
        b"[" * 100_000,
        b'{"ok": "true"}',
        b"\xff\xfe",
    ]
    answers = [*refusals, None]
    received: list[bytes] = []
    in_words = 0

    def server(connection: socket.socket) -> None:
        nonlocal in_words
        answer = answers[(server_.opened - 1) % len(answers)]
        for line in lines(connection):
            received.append(line)
            if answer is None:
                return connection.close()
            in_words += 1
            connection.sendall(answer + b"\n")

    server_ = serve(server)
    running = run(start, tmp_path, "json_login.py", server_.port, users=len(answers), wait="0")
    wait_until(lambda: in_words >= len(refusals) and server_.open == 0)
    gevent.sleep(0.5)  # so long without a storm
    assert stopped(running) == 1
    rows = rows_of(running.output)
    assert len(refusals) <= rows["login"][0] == rows["login"][1] <= in_words
    assert rows["echo_response"][1] >= 1  # where the server hung up: one failure, and not two
    assert "TCP login: PermissionError('The server refused the login.')" in running.output
    assert all(b'"login"' in line for line in received)
    assert len(answers) <= server_.opened < 5 * len(answers)
    assert "Traceback" not in running.output and "wrong password" not in running.output


def test_compose_makes_what_is_sent_in_mode_none_only_when_deliveries_are_timed(connect: Connect, serve: Serve) -> None:
    received: list[bytes] = []
    server = serve(lambda connection: received.extend(lines(connection)))
    compose = defined("json_login.py")["JsonChat"].compose
    for delivery in (False, True):
        client = connect(server.port, echo="none", delivery=delivery, compose=lambda *text: compose(None, *text))
        client.send_chat("hello")
        client.close()
    wait_until(lambda: len(received) == 2)
    assert sorted(line == b"hello" for line in received) == [False, True]
    assert sorted(line.startswith(b'{"type": "chat", "id": "') for line in received) == [False, True]


def start_ngircd(start: Start, folder: Path, *settings: str) -> int:
    """Start an IRC server in the foreground, without look-ups and limits; return its port."""
    installed = Path("/usr/sbin/ngircd")  # not on the path of every user
    port = free_port()
    configuration = folder / "ngircd.conf"
    configuration.write_text(
        f"[Global]\nName = irc.test\nListen = 127.0.0.1\nPorts = {port}\nAdminEMail = nobody@localhost\n"
        "[Limits]\nMaxConnectionsIP = 0\nMaxPenaltyTime = 0\n[Options]\nDNS = no\nIdent = no\nPAM = no\n"
        + "".join(f"{setting}\n" for setting in settings)
    )
    command = installed if installed.exists() else program("ngircd")
    start(command, "-n", "-f", configuration).prints("Now listening on")
    return port


@pytest.mark.parametrize("settings", [[], ["RequireAuthPing = yes"]], ids=["plain", "with a PING at the login"])
def test_ngircd_is_loaded(start: Start, tmp_path: Path, settings: list[str]) -> None:
    port = start_ngircd(start, tmp_path, *settings)
    with socket.create_connection(("127.0.0.1", port), timeout=15) as observer:
        observer.sendall(b"NICK observer\nUSER observer 0 * observer\n")
        received = lines(observer)
        while not (line := next(received)).startswith(b":irc.test 366"):  # the end of the answer to JOIN
            if line.startswith(b"PING "):
                observer.sendall(b"PONG" + line[4:] + b"\n")
            if line.startswith(b":irc.test 001"):
                observer.sendall(b"JOIN #load\n")
        running = run(start, tmp_path, "irc.py", port, users=8)
        talk = re.compile(rb":u[0-9a-f]{8}!\S+ PRIVMSG #load :\[[0-9a-f]{8}\.\S+\] .")
        said = [next(line for line in received if b"PRIVMSG" in line) for _ in range(25)]
        assert all(talk.match(line) for line in said)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", "delivery"} and rows["connect"] == (8, 0)
    logins = 16 if settings else 8  # with a PING, its PONG has an answer of its own
    assert rows["echo_response"][0] > logins and rows["delivery"][0] > 50
    assert all(failures == 0 for _, failures in rows.values())
    assert quiet(running.output)


def test_a_login_that_ngircd_refuses_is_a_failed_row(start: Start, tmp_path: Path) -> None:
    port = start_ngircd(start, tmp_path, "[Global]", "Password = secret")
    running = run(start, tmp_path, "irc.py", port, users=3, wait="0")
    running.prints("TCP      login")
    assert stopped(running) == 1
    rows = rows_of(running.output)
    assert rows["login"][0] == rows["login"][1] >= 3
    assert rows["connect"][0] < 30
    assert "delivery" not in rows and "Traceback" not in running.output


def test_after_a_refused_irc_login_nothing_more_is_sent_and_a_server_that_hangs_up_is_no_second_failure(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[bytes] = []
    refused = 0

    def server(connection: socket.socket) -> None:
        nonlocal refused
        hangs_up = server_.opened % 2 == 0
        for line in lines(connection):
            received.append(line)
            if line.startswith(b"USER "):
                if hangs_up:
                    return connection.close()
                refused += 1
                connection.sendall(b":irc.test 433 * you :Nickname already in use\r\n")

    server_ = serve(server)
    running = run(start, tmp_path, "irc.py", server_.port, users=6)
    wait_until(lambda: refused >= 3 and server_.opened > 8 and server_.open == 0)
    assert stopped(running) == 1
    rows = rows_of(running.output)
    assert 3 <= rows["login"][0] == rows["login"][1] <= refused
    assert rows["echo_response"][1] >= 1
    assert {line.split()[0] for line in received} == {b"NICK", b"USER"}
    assert "Traceback" not in running.output


def test_a_line_over_512_bytes_ends_the_connection_to_ngircd(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    names = defined("irc.py")
    port = start_ngircd(start, tmp_path)
    user = names["IrcUser"].__new__(names["IrcUser"])
    user.client = client = connect(
        port, framing=names["IrcFraming"], compose=user.compose, on_connect=lambda: user.on_connect()
    )
    assert "PONG irc.test :[" in (client.send_chat("PING :" + "x" * 400, echo="tag") or "")
    assert client.send_chat("PING :" + "x" * 512, echo="tag") is None
    assert client.send_chat("PING :hello", echo="full") is None
    failed = [type(row["exception"]).__name__ for row in rows.named("echo_response") if row["exception"]]
    assert failed == ["ConnectionClosed", "EchoTruncated"]


def test_the_irc_framing_answers_a_ping_with_the_next_message_and_drops_notices() -> None:
    framing = defined("irc.py")["IrcFraming"]()
    data = b"NOTICE AUTH :wait\r\n:a NOTICE * :x\r\nPING :1\r\nPING :2\r\n:a PRIVMSG #load :NOTICE me\r\n\r\n"
    messages = [b"PING :1", b"PING :2", b":a PRIVMSG #load :NOTICE me", b""]
    assert [p for i in range(len(data)) for p in framing.feed(data[i : i + 1])] == messages
    assert framing.encode(b"hello") == b"PONG :2\nhello\n"
    assert framing.encode(b"hello") == b"hello\n"
    assert defined("irc.py")["IrcFraming"]().pong == b""


def test_a_server_that_answers_without_a_newline_is_loaded(start: Start, serve: Serve, tmp_path: Path) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line)

    running = run(start, tmp_path, "bare_answers.py", serve(server).port)
    wait_until(lambda: len(received) > 50)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (10, 0) and rows["echo_response"][0] > 30 and rows["echo_response"][1] == 0
    assert len(received) >= rows["echo_response"][0]
    assert quiet(running.output)


def test_a_server_without_framing_that_reformats_is_loaded(start: Start, serve: Serve, tmp_path: Path) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(4096):
            received.append(data)
            connection.sendall(b"you said " + data.replace(b"] ", b"]: ", 1))

    running = run(start, tmp_path, "raw_chat.py", serve(server).port)
    wait_until(lambda: len(received) > 50)
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert rows["connect"] == (10, 0) and rows["echo_response"][0] > 30 and rows["echo_response"][1] == 0
    assert b"\n" not in b"".join(received)
    assert quiet(running.output)


@pytest.mark.parametrize(
    ("mode", "cut", "outcome"),
    [("full", 30, "EchoTruncated"), ("tag", 30, ""), ("tag", 5, "EchoTimeout"), ("any", 5, "")],
)
def test_an_echo_in_two_reads_without_framing_is_what_the_table_says(
    serve: Serve, connect: Connect, rows: Rows, mode: Any, cut: int, outcome: str
) -> None:
    reads: list[bytes] = []

    class Noting(Framing):
        def feed(self, data: bytes) -> Iterable[bytes]:
            reads.append(data)
            return super().feed(data)

    def server(connection: socket.socket) -> None:
        data = connection.recv(4096)
        connection.sendall(data[:cut])
        wait_until(lambda: reads)
        connection.sendall(data[cut:])
        connection.recv(4096)

    client = connect(serve(server).port, framing=Noting, echo=mode, timeout=0.3)
    answer = client.send_chat("x" * 100)
    assert [type(row["exception"]).__name__ for row in rows.named("echo_response")] == [outcome or "NoneType"]
    assert len(answer or "") == (0 if outcome else cut)


def test_in_mode_any_a_late_second_piece_is_taken_for_the_next_answer(serve: Serve, connect: Connect) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"first")
        connection.recv(4096)
        connection.sendall(b"rest of the first")

    client = connect(serve(server).port, framing="raw", echo="any")
    assert [client.send_chat("a"), client.send_chat("b")] == ["first", "rest of the first"]
