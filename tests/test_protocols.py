"""The examples of docs/protocols.md: each is saved, and run with the command below it.

Those for IRC and XMPP are run on the real servers, in tests/test_real_servers.py.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent
import pytest
from programs import PATH, ROOT, Program, quiet, rows_of, wait_until
from rows import Rows
from servers import Handler, Server, lines

from locustfile import (
    MESSAGE_LIMIT,
    EchoMode,
    Framing,
    MessageTooLong,
    RawFraming,
    TCPChatUser,
    TCPSocketClient,
)

Start = Callable[..., Program]
Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]
Change = tuple[str, str]

DOCUMENT = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"`(\w+\.py)`:\n\n```python\n(.*?)^```\n\n```sh\n(.*?)\n```", re.MULTILINE | re.DOTALL
)
EXAMPLES = {name: (code, command) for name, code, command in EXAMPLE.findall(DOCUMENT)}


def run(
    start: Start, folder: Path, name: str, port: int, users: int = 10, wait: str = "0.1"
) -> Program:
    """Save the example beside a copy of locustfile.py; start its command with these users.

    The test stops it once it has done enough: how much a short run does is a matter of how busy
    the machine is.
    """
    code, command = EXAMPLES[name]
    (folder / name).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "locustfile.py", folder)
    values = {"host": f"127.0.0.1:{port}", "users": users, "spawn-rate": users}
    for option, value in values.items():
        command, found = re.subn(rf"--{option}=\S+", f"--{option}={value}", command)
        assert found == 1
    # The run ends when the test has seen enough of it.
    command = command.replace("--run-time=1m", "--run-time=4m")
    shell = ("bash", "-euo", "pipefail", "-c", f"exec {command}")
    return start(*shell, cwd=folder, PATH=PATH, CHAT_WAIT=wait)


def stop_without_failure(running: Program, *more_rows: str) -> None:
    """Stop the run; fail unless its ten users were connected and echoed, without a failure."""
    assert running.stop() == 0, running.output
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", *more_rows}
    assert rows["connect"] == (10, 0)
    assert rows["echo_response"].requests > 30
    assert all(counts.failures == 0 for counts in rows.values())
    assert quiet(running.output)


def defined(name: str, *changes: Change) -> dict[str, Any]:
    """Return what the code of the example defines, after changes that the document describes.

    Its types are not known here: it is code out of a text.
    """
    code = EXAMPLES[name][0]
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def client_of(
    connect: Connect, port: int, user_class: type[TCPChatUser], timeout: float = 5.0
) -> TCPSocketClient:
    """Return a client with the hooks of a user class, without Locust's engine."""
    user = user_class.__new__(user_class)
    user.client = connect(
        port,
        framing=user_class.framing,
        echo=user_class.echo,
        timeout=timeout,
        compose=user.compose,
        expected=user.expected,
        is_refusal=user.is_refusal,
        on_connect=user.on_connect,
        on_message=user.on_message,
    )
    return user.client


def test_the_document_has_the_examples_that_its_first_table_names() -> None:
    table = DOCUMENT[: DOCUMENT.index("Save an example")]
    named = re.findall(r"\[`(\w+\.py)`\]\(#([\w-]+)\)", table)
    assert {name for name, _ in named} == set(EXAMPLES)
    assert len(EXAMPLES) == DOCUMENT.count("```python") == DOCUMENT.count("```sh") == 7


def test_every_link_of_the_document_leads_to_a_heading() -> None:
    headings = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\(#([\w-]+)\)", DOCUMENT)) == anchors


# A binary header with a type

FOUR_BYTES: list[Change] = [('"<BH"', '">BI"')]
COUNTED_HEADER: list[Change] = [
    ("HEADER.pack(kind, len(data))", "HEADER.pack(kind, len(data) + HEADER.size)"),
    ("            if not 0", "            length -= HEADER.size\n            if not 0"),
]
PAYLOADS = [
    b"\x01kim",
    b"\x02",
    b"\x02" + "안녕하세요 👋".encode(),
    b"\x03" + b"x" * 600,
    b"\xfflast",
]


def receive(connection: socket.socket, size: int) -> bytes:
    """Return exactly so many bytes; raise ``EOFError`` where the connection ends before."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def receive_binary(connection: socket.socket) -> tuple[int, bytes]:
    """Return type and data of the next message."""
    kind, length = struct.unpack("<BH", receive(connection, 3))
    return kind, receive(connection, length)


def binary_server(received: list[tuple[int, bytes]], echo_type: int = 2) -> Handler:
    """Return a handler that welcomes the first message, and sends back the others in pieces."""

    def handler(connection: socket.socket) -> None:
        try:
            received.append(receive_binary(connection))
            connection.sendall(b"\x01\x07\x00welcome\x03\x00\x00")
            while True:
                kind, data = receive_binary(connection)
                received.append((kind, data))
                echo = struct.pack("<BH", echo_type, len(data)) + data
                reply = b"\x03\x02\x00hi" + echo
                connection.sendall(reply[:6])
                connection.sendall(reply[6:])
        except EOFError:
            pass

    return handler


def test_a_server_with_a_binary_header_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[tuple[int, bytes]] = []
    running = run(start, tmp_path, "binary_header.py", serve(binary_server(received)).port)
    wait_until(lambda: len(received) > 60)
    stop_without_failure(running, "login")
    logins = [data for kind, data in received if kind == 1]
    texts = [data for kind, data in received if kind == 2]
    assert logins == [b"load"] * 10
    assert all(re.match(rb"\[[0-9a-f]{8}\.\d+\] ", text) for text in texts)


def test_binary_echoes_of_another_type_are_found_by_their_tag(
    connect: Connect, serve: Serve
) -> None:
    by_tag = ("    framing = HeaderFraming\n", '    framing = HeaderFraming\n    echo = "tag"\n')
    user_class = defined("binary_header.py", by_tag)["BinaryChat"]
    client = client_of(connect, serve(binary_server([], echo_type=4)).port, user_class)
    assert str(client.send_chat("hello")).startswith("\x04[")


def header_framing(*changes: Change) -> Framing:
    """Return a framing of the example."""
    framing: Framing = defined("binary_header.py", *changes)["HeaderFraming"]()
    return framing


@pytest.mark.parametrize(
    ("changes", "encoded"),
    [
        ([], b"\x02\x05\x00hello"),
        (FOUR_BYTES, b"\x02\x00\x00\x00\x05hello"),
        (COUNTED_HEADER, b"\x02\x08\x00hello"),
    ],
)
def test_the_bytes_of_the_binary_header_are_those_of_the_document(
    changes: list[Change], encoded: bytes
) -> None:
    assert header_framing(*changes).encode(b"\x02hello") == encoded


@pytest.mark.parametrize("changes", [[], FOUR_BYTES, COUNTED_HEADER])
def test_a_binary_stream_whole_byte_by_byte_or_cut_anywhere_gives_all_messages(
    changes: list[Change],
) -> None:
    framing = header_framing(*changes)
    data = b"".join(framing.encode(payload) for payload in PAYLOADS)
    assert list(framing.feed(data)) == PAYLOADS
    assert fed_byte_by_byte(framing, data) == PAYLOADS
    for cut in range(len(data) + 1):
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == PAYLOADS


def fed_byte_by_byte(framing: Framing, data: bytes) -> list[bytes]:
    """Return the messages of a stream that comes in the smallest pieces."""
    messages: list[bytes] = []
    for byte in data:
        messages += framing.feed(bytes([byte]))
    return messages


def test_a_message_that_the_binary_header_cannot_say_is_refused_before_it_is_sent() -> None:
    framing = header_framing()
    assert len(framing.encode(b"\x02" + b"x" * 65535)) == 65538
    with pytest.raises(ValueError, match="longer than its header can say"):
        framing.encode(b"\x02" + b"x" * 65536)


def test_a_length_over_the_limit_fails_before_its_data_comes() -> None:
    framing = header_framing(*FOUR_BYTES)
    longest = b"\x02" + b"x" * MESSAGE_LIMIT
    assert list(framing.feed(framing.encode(longest))) == [longest]
    with pytest.raises(MessageTooLong):
        list(framing.feed(struct.pack(">BI", 2, MESSAGE_LIMIT + 1)))


def test_a_length_shorter_than_the_header_that_it_counts_fails_and_does_not_loop() -> None:
    with pytest.raises(MessageTooLong):
        list(header_framing(*COUNTED_HEADER).feed(b"\x02\x00\x00"))


# JSON lines with a login

WITH_ID = ('"chat", "text"', '"chat", "id": tag, "text"')
ASCII = (", ensure_ascii=False", "")
BY_TAG = (
    "    def expected(self, tag, message):\n"
    '        return json.dumps(f"[{tag}] {message}", ensure_ascii=False)\n',
    '    echo = "tag"\n',
)


def test_a_json_server_that_greets_and_lets_others_talk_is_loaded_after_a_login(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[dict[str, str]] = []

    def server(connection: socket.socket) -> None:
        connection.sendall(b'{"type":"hello"}\n')
        messages = map(json.loads, lines(connection))
        received.append(next(messages))
        connection.sendall(b'not JSON\n{"type":"welcome"}\n')
        for message in messages:
            received.append(message)
            again = {"from": "load", "text": message["text"], "type": "chat"}
            reply = json.dumps(again, ensure_ascii=False, separators=(",", ":"))
            connection.sendall(b'[]\n{"from":"another"}\n' + reply.encode() + b"\n")

    running = run(start, tmp_path, "json_login.py", serve(server).port)
    wait_until(lambda: len(received) > 60)
    stop_without_failure(running, "login")
    logins = [message for message in received if message["type"] == "login"]
    assert logins == [{"type": "login", "name": "load", "password": "secret"}] * 10
    assert any("안녕" in message.get("text", "") for message in received)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [(b'{"type":"error"}\n', "EchoRefused"), (None, "ConnectionClosed"), (b"", "EchoTimeout")],
    ids=["refused", "hung up on", "not answered"],
)
def test_a_json_login_that_fails_is_one_row_and_nothing_more_is_sent(
    connect: Connect, rows: Rows, serve: Serve, answer: bytes | None, failure: str
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        received_lines = lines(connection)
        received.append(next(received_lines))
        if answer is not None:
            connection.sendall(answer)
            received.extend(received_lines)

    serving = serve(server)
    client = client_of(connect, serving.port, defined("json_login.py")["JsonChat"], timeout=1.0)
    assert client.send_chat("hello") is None
    assert client.connected_since is None
    wait_until(lambda: serving.open == 0)
    assert rows.counts() == {"connect": 1, "send_chat": 1, f"login: {failure}": 1}
    assert [json.loads(line)["type"] for line in received] == ["login"]


def json_server(answer: Callable[[dict[str, str]], object]) -> Handler:
    r"""Return a handler that lets everybody in, and writes what it answers in ASCII, ``\u…``."""

    def handler(connection: socket.socket) -> None:
        messages = map(json.loads, lines(connection))
        next(messages)
        connection.sendall(b'{"type":"welcome"}\n')
        for message in messages:
            connection.sendall(json.dumps(answer(message)).encode() + b"\n")

    return handler


def test_a_json_server_that_writes_other_characters_in_ascii_echoes_in_ascii(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    port = serve(json_server(lambda message: {"text": message["text"]})).port
    as_it_stands = client_of(connect, port, defined("json_login.py")["JsonChat"])
    assert as_it_stands.send_chat("안녕") is None
    assert rows.counts()["echo_response: EchoAltered"] == 1
    changed = client_of(connect, port, defined("json_login.py", ASCII)["JsonChat"])
    assert r"\uc548\ub155" in str(changed.send_chat("안녕"))


def test_a_json_server_that_sends_back_the_id_alone_is_found_by_it(
    connect: Connect, serve: Serve
) -> None:
    server = serve(json_server(lambda message: {"id": message["id"]}))
    user_class = defined("json_login.py", WITH_ID, BY_TAG)["JsonChat"]
    assert client_of(connect, server.port, user_class).send_chat("hello")


def test_a_json_error_with_the_id_alone_is_a_refusal(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    server = serve(json_server(lambda message: {"type": "error", "id": message["id"]}))
    client = client_of(connect, server.port, defined("json_login.py", WITH_ID)["JsonChat"])
    assert client.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoRefused"] == 1


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_no_line_of_a_server_makes_the_json_example_fail(line: bytes) -> None:
    assert defined("json_login.py")["kind"](line) is None


# A login dialogue with prompts

LINE_PROMPTS = ("framing = PromptFraming", 'framing = "crlf"')
EMPTY_LINE_FIRST = (
    '        self.client.send_chat("load"',
    '        self.client.send_chat("", echo=lambda line: line == b"login: ")\n'
    '        self.client.send_chat("load"',
)


def prompting_server(received: list[bytes], end_of_prompt: bytes = b"") -> Handler:
    r"""Return a handler that asks for name and password, and waits for ``\r\n``."""

    def handler(connection: socket.socket) -> None:
        connection.sendall(b"This is a test.\r\nlog")
        gevent.sleep(0.01)  # so the prompt comes in two pieces
        connection.sendall(b"in: " + end_of_prompt)
        answers = lines(connection)
        received.append(next(answers))
        connection.sendall(b"password: " + end_of_prompt)
        received.append(next(answers))
        if received[-1] != b"secret\r":
            connection.sendall(b"Wrong password.\r\n")
            return
        connection.sendall(b"News: none.\r\nWelcome!\r\n")
        for line in answers:
            received.append(line)
            connection.sendall(line + b"\n")

    return handler


def test_a_server_that_asks_for_the_login_with_prompts_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[bytes] = []
    running = run(start, tmp_path, "prompts.py", serve(prompting_server(received)).port)
    wait_until(lambda: len(received) > 70)
    stop_without_failure(running, "login", "login_name")
    assert rows_of(running.output)["login"] == (10, 0)
    assert rows_of(running.output)["login_name"] == (10, 0)
    assert all(line.endswith(b"\r") for line in received)


def test_prompts_that_end_with_a_newline_are_lines(connect: Connect, serve: Serve) -> None:
    received: list[bytes] = []
    server = serve(prompting_server(received, end_of_prompt=b"\r\n"))
    client = client_of(connect, server.port, defined("prompts.py", LINE_PROMPTS)["PromptedChat"])
    assert client.send_chat("hello")
    assert received[:2] == [b"load\r", b"secret\r"]


def test_an_empty_line_goes_first_to_a_server_that_drops_what_comes_before_it_asks(
    connect: Connect, serve: Serve
) -> None:
    dropped: list[bytes] = []
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        dropped.append(connection.recv(4096))
        prompting_server(received)(connection)

    user_class = defined("prompts.py", EMPTY_LINE_FIRST)["PromptedChat"]
    client = client_of(connect, serve(server).port, user_class)
    assert client.send_chat("hello")
    assert dropped == [b"\r\n"]
    assert received[:2] == [b"load\r", b"secret\r"]


def test_a_wrong_password_is_a_failed_login(connect: Connect, rows: Rows, serve: Serve) -> None:
    server = serve(prompting_server([]))
    guessing = defined("prompts.py", ('"secret"', '"guess"'))["PromptedChat"]
    assert not client_of(connect, server.port, guessing).connect()
    assert rows.counts()["login: EchoRefused"] == 1
    assert rows.counts()["login"] == 0


def test_prompts_and_lines_are_messages_wherever_the_stream_is_cut() -> None:
    data = b"Hello\r\nlogin: password: Welcome\r\n[1] a password: no\r\n"
    prompted = [b"Hello", b"login: ", b"password: ", b"Welcome", b"[1] a password: no"]
    framing = defined("prompts.py")["PromptFraming"]()
    assert fed_byte_by_byte(framing, data) == prompted
    for cut in range(len(data) + 1):
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == prompted
    with pytest.raises(MessageTooLong):
        list(framing.feed(b"x" * (MESSAGE_LIMIT + 1)))


def test_a_prompt_behind_telnet_options_is_found_once_they_are_removed() -> None:
    options = b"\xff\xfb\x01"
    framing = defined("prompts.py")["PromptFraming"]
    assert list(framing().feed(options + b"login: ")) == []
    assert list(framing().feed(b"login: ")) == [b"login: "]


# IRC and XMPP, where no real server is needed


def test_after_a_refused_irc_login_nothing_more_is_sent(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line.split()[0])
            if line.startswith(b"USER "):
                connection.sendall(b":irc.test 433 * you :Nickname already in use\r\n")

    client = client_of(connect, serve(server).port, defined("irc.py")["IrcUser"])
    assert client.send_chat("hello") is None
    assert received == [b"NICK", b"USER"]
    assert rows.counts()["login: EchoRefused"] == 1


def test_an_xmpp_error_is_a_refusal_with_the_body_and_without() -> None:
    user_class = defined("xmpp.py")["XmppUser"]
    user = user_class.__new__(user_class)
    assert user.is_refusal(b"<message type='error' id='3f9a1c20.1'><error/></message>")
    assert user.is_refusal(b"<message type='error'><body>[3f9a1c20.1] a</body></message>")
    assert not user.is_refusal(b"<message type='groupchat'><body>type='error'</body></message>")


def test_stanzas_are_messages_wherever_the_stream_is_cut() -> None:
    opening = b"<?xml version='1.0'?><stream:stream id='1/2'>"
    stanzas = [opening, b"<a/>", b"<b to='x/y'><c/><d>e</d></b>", b"\n<b>f\n</b>"]
    framing = defined("xmpp.py")["StanzaFraming"]()
    assert fed_byte_by_byte(framing, b"".join(stanzas) + b"</stream:stream>") == stanzas
    with pytest.raises(MessageTooLong):
        list(framing.feed(b"<a>" + b"<a>" * MESSAGE_LIMIT))


# Answers without a newline, and no framing at all


def test_a_server_that_answers_without_a_newline_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line)

    running = run(start, tmp_path, "bare_answers.py", serve(server).port)
    wait_until(lambda: len(received) > 50)
    stop_without_failure(running)


def test_a_server_without_framing_that_reformats_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        while data := connection.recv(4096):
            received.append(data)
            connection.sendall(b"you said " + data.replace(b"] ", b"]: ", 1))

    running = run(start, tmp_path, "raw_chat.py", serve(server).port)
    wait_until(lambda: len(received) > 50)
    stop_without_failure(running)
    assert b"\n" not in b"".join(received)


@pytest.mark.parametrize(
    ("mode", "cut", "outcome"),
    [
        ("full", 30, "echo_response: EchoTruncated"),
        ("tag", 30, "echo_response"),
        ("tag", 5, "echo_response: EchoTimeout"),
        ("any", 5, "echo_response"),
    ],
)
def test_an_echo_in_two_reads_without_framing_is_what_the_table_says(
    serve: Serve, connect: Connect, rows: Rows, mode: EchoMode, cut: int, outcome: str
) -> None:
    reads: list[bytes] = []

    class Noting(RawFraming):
        def feed(self, data: bytes) -> Iterable[bytes]:
            reads.append(data)
            return super().feed(data)

    def server(connection: socket.socket) -> None:
        data = connection.recv(4096)
        connection.sendall(data[:cut])
        wait_until(lambda: reads)
        connection.sendall(data[cut:])
        connection.recv(4096)

    client = connect(serve(server).port, framing=Noting, echo=mode, timeout=1.0)
    answer = client.send_chat("x" * 100)
    assert rows.counts() == {"connect": 1, "send_chat": 1, outcome: 1}
    if outcome == "echo_response":
        assert answer == reads[0].decode()
        assert len(reads[0]) == cut


def test_in_mode_any_a_late_second_piece_is_taken_for_the_next_answer(
    serve: Serve, connect: Connect
) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"first")
        connection.recv(4096)
        connection.sendall(b"rest of the first")

    client = connect(serve(server).port, framing="raw", echo="any")
    assert client.send_chat("a") == "first"
    assert client.send_chat("b") == "rest of the first"
