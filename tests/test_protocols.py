"""The examples of docs/protocols.md: each is saved, and run with the command below it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from programs import PATH, ROOT, Program, program, quiet, rows_of, wait_until
from rows import Rows
from servers import Server, free_port, lines

from locustfile import MESSAGE_LIMIT, Framing, MessageTooLong, RawFraming, TCPSocketClient

Start = Callable[..., Program]
Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]

DOCUMENT = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"`(\w+\.py)`:\n\n```python\n(.*?)^```\n\n```sh\n(.*?)\n```", re.MULTILINE | re.DOTALL
)
EXAMPLES = {name: (code, command) for name, code, command in EXAMPLE.findall(DOCUMENT)}
PAYLOADS = [
    b"\x01kim",
    b"\x02",
    b"\x02" + "안녕하세요 👋".encode(),
    b"\x03" + b"x" * 600,
    b"\xfflast",
]
HEADERS = {"as it stands": [], "four bytes, big-endian": [('"<BH"', '">BI"')]}
HEADERS["a length that counts the header"] = [
    ("HEADER.pack(kind, len(data))", "HEADER.pack(kind, len(data) + HEADER.size)"),
    ("            if not 0", "            length -= HEADER.size\n            if not 0"),
]


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


def stopped(running: Program) -> int:
    """Stop the run in good order; return its exit code."""
    running.process.send_signal(signal.SIGTERM)
    return running.ends()


def stopped_without_failure(running: Program, *more_rows: str) -> None:
    """Stop the run; fail unless its ten users were connected and echoed, without a failure."""
    assert stopped(running) == 0, running.output
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "echo_response", *more_rows}
    assert rows["connect"] == (10, 0)
    assert rows["echo_response"][0] > 30
    assert all(failures == 0 for _, failures in rows.values())
    assert quiet(running.output)


def latest_counts(running: Program, name: str) -> tuple[int, int]:
    """Return requests and failures of a row in the last table that a run has printed."""
    found = re.findall(rf"^TCP +{name} +(\d+) +(\d+)\(", running.output, re.MULTILINE)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def successes(running: Program, name: str) -> int:
    """Return how many requests of a row have succeeded so far."""
    requests, failures = latest_counts(running, name)
    return requests - failures


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
    table = DOCUMENT[: DOCUMENT.index("Save an example")]
    named = re.findall(r"\[`(\w+\.py)`\]\(#([\w-]+)\)", table)
    assert {name for name, _ in named} == set(EXAMPLES)
    assert len(EXAMPLES) == DOCUMENT.count("```python") == DOCUMENT.count("```sh") == 7


def test_every_link_of_the_document_leads_to_a_heading() -> None:
    headings = re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\(#([\w-]+)\)", DOCUMENT)) == anchors


def receive(connection: socket.socket, size: int) -> bytes:
    """Return exactly so many bytes; raise ``EOFError`` where the connection ends before."""
    data = b""
    while len(data) < size:
        if not (more := connection.recv(size - len(data))):
            raise EOFError
        data += more
    return data


def test_a_server_with_a_binary_header_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
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
    stopped_without_failure(running, "login")
    assert logins == [b"load"] * 10
    assert all(re.match(r"\[[0-9a-f]{8}\.\d+\] ", text) for text in texts)


def header_framing(changes: str) -> Framing:
    framing: Framing = defined("binary_header.py", *HEADERS[changes])["HeaderFraming"]()
    return framing


def test_the_bytes_of_the_binary_header_are_those_of_the_document() -> None:
    assert header_framing("as it stands").encode(b"\x02hello") == b"\x02\x05\x00hello"
    assert (
        header_framing("four bytes, big-endian").encode(b"\x02hello")
        == b"\x02\x00\x00\x00\x05hello"
    )
    assert (
        header_framing("a length that counts the header").encode(b"\x02hello")
        == b"\x02\x08\x00hello"
    )


@pytest.mark.parametrize("changes", HEADERS)
def test_a_binary_stream_whole_byte_by_byte_or_cut_anywhere_gives_all_messages(
    changes: str,
) -> None:
    framing = header_framing(changes)
    data = b"".join(framing.encode(payload) for payload in PAYLOADS)
    assert list(framing.feed(data)) == PAYLOADS
    assert [p for i in range(len(data)) for p in framing.feed(data[i : i + 1])] == PAYLOADS
    for cut in range(len(data) + 1):
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == PAYLOADS


def test_a_message_that_the_binary_header_cannot_say_is_refused_before_it_is_sent() -> None:
    framing = header_framing("as it stands")
    assert len(framing.encode(b"\x02" + b"x" * 65535)) == 65538
    with pytest.raises(ValueError, match="longer than its header can say"):
        framing.encode(b"\x02" + b"x" * 65536)


def test_a_length_over_the_limit_fails_before_its_data_comes() -> None:
    framing = header_framing("four bytes, big-endian")
    assert (
        len(next(iter(framing.feed(framing.encode(b"\x02" + b"x" * MESSAGE_LIMIT)))))
        == MESSAGE_LIMIT + 1
    )
    with pytest.raises(MessageTooLong):
        list(framing.feed(struct.pack(">BI", 2, MESSAGE_LIMIT + 1)))


def test_a_length_shorter_than_the_header_that_it_counts_fails_and_does_not_loop() -> None:
    with pytest.raises(MessageTooLong):
        list(header_framing("a length that counts the header").feed(b"\x02\x00\x00"))


def json_server(greeting: bytes, answer: bytes | None, received: list[Any]) -> Any:
    """Return a handler that answers the first line, and sends back what comes after it anew.

    Where the answer is ``None`` it hangs up instead.
    """

    def serve_one(connection: socket.socket) -> None:
        connection.sendall(greeting)
        received_lines = lines(connection)
        received.append(json.loads(next(received_lines)))
        if answer is None:
            connection.close()
            return
        connection.sendall(b"not JSON\n" + answer + b"\n")
        for line in received_lines:
            message = json.loads(line)
            received.append(message)
            again = {"from": "load", "text": message["text"], "type": "chat"}
            reply = json.dumps(again, ensure_ascii=False, separators=(",", ":"))
            connection.sendall(b'[]\n{"from":"another"}\n' + reply.encode() + b"\n")

    return serve_one


def test_a_json_server_that_greets_is_loaded_after_a_login(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[Any] = []
    server = serve(json_server(b'{"type":"hello"}\n', b'{"type":"welcome"}', received))
    running = run(start, tmp_path, "json_login.py", server.port)
    wait_until(lambda: len(received) > 60)
    stopped_without_failure(running, "login")
    logins = [message for message in received if message["type"] == "login"]
    assert logins == [{"type": "login", "name": "load", "password": "secret"}] * 10
    assert any("안녕" in message.get("text", "") for message in received)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b'{"type":"error"}', "The server answered with a refusal."),
        (None, "The server closed the connection."),
    ],
    ids=["in words", "hangs up"],
)
def test_a_refused_login_is_one_failed_row_an_attempt_and_nothing_more_is_sent(
    start: Start, serve: Serve, tmp_path: Path, answer: bytes | None, failure: str
) -> None:
    received: list[Any] = []
    server = serve(json_server(b"", answer, received))
    running = run(start, tmp_path, "json_login.py", server.port, users=4, wait="0")
    wait_until(lambda: latest_counts(running, "login")[1] >= 8)
    assert stopped(running) == 1
    rows = rows_of(running.output)
    assert rows["login"][0] == rows["login"][1] <= rows["connect"][0]
    assert "echo_response" not in rows
    assert failure in running.output
    assert {message["type"] for message in received} == {"login"}
    assert "Traceback" not in running.output


def test_a_json_error_with_the_id_alone_is_a_refusal(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    def server(connection: socket.socket) -> None:
        received_lines = lines(connection)
        next(received_lines)
        connection.sendall(b'{"type":"welcome"}\n')
        for line in received_lines:
            error = {"type": "error", "id": json.loads(line)["id"]}
            connection.sendall(json.dumps(error).encode() + b"\n")

    with_id = ('"chat", "text"', '"chat", "id": tag, "text"')
    names = defined("json_login.py", with_id)
    client = client_of(connect, serve(server).port, names["JsonChat"])
    assert client.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoRefused"] == 1


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_no_line_of_a_server_makes_the_json_example_fail(line: bytes) -> None:
    assert defined("json_login.py")["kind"](line) is None


def prompting_server(received: list[bytes]) -> Callable[[socket.socket], None]:
    r"""Return a handler that asks for name and password, and waits for ``\r\n``."""

    def serve_one(connection: socket.socket) -> None:
        connection.sendall(b"This is a test.\r\nlog")
        gevent.sleep(0.01)  # so the prompt comes in two pieces
        connection.sendall(b"in: ")
        answers = lines(connection)
        received.append(next(answers))
        connection.sendall(b"password: ")
        received.append(next(answers))
        if received[-1] != b"secret\r":
            connection.sendall(b"Wrong password.\r\n")
            return
        connection.sendall(b"News: none.\r\nWelcome!\r\n")
        for line in answers:
            received.append(line)
            connection.sendall(line + b"\n")

    return serve_one


def test_a_server_that_asks_for_the_login_with_prompts_is_loaded(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    received: list[bytes] = []
    running = run(start, tmp_path, "prompts.py", serve(prompting_server(received)).port)
    wait_until(lambda: len(received) > 70)
    stopped_without_failure(running, "login", "login_name")
    assert rows_of(running.output)["login"] == (10, 0)
    assert rows_of(running.output)["login_name"] == (10, 0)
    assert all(line.endswith(b"\r") for line in received)


def test_a_wrong_password_is_a_failed_login(connect: Connect, rows: Rows, serve: Serve) -> None:
    names = defined("prompts.py", ('"secret"', '"guess"'))
    port = serve(prompting_server([])).port
    client = client_of(connect, port, names["PromptedChat"])
    assert not client.connect()
    assert rows.counts()["login: EchoRefused"] == 1
    assert rows.counts()["login"] == 0


def test_prompts_and_lines_are_messages_wherever_the_stream_is_cut() -> None:
    data = b"Hello\r\nlogin: password: Welcome\r\n[1] a password: no\r\n"
    prompted = [b"Hello", b"login: ", b"password: ", b"Welcome", b"[1] a password: no"]
    framing = defined("prompts.py")["PromptFraming"]()
    received = [message for byte in data for message in framing.feed(bytes([byte]))]
    assert received == prompted
    for cut in range(len(data) + 1):
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == prompted
    with pytest.raises(MessageTooLong):
        list(framing.feed(b"x" * (MESSAGE_LIMIT + 1)))


def client_of(connect: Connect, port: int, user_class: Any, **settings: Any) -> TCPSocketClient:
    """Return a client with the hooks of a user class, without Locust's engine."""
    user = user_class.__new__(user_class)
    user.client = connect(
        port,
        framing=user_class.framing,
        compose=user.compose,
        expected=user.expected,
        is_refusal=user.is_refusal,
        on_connect=user.on_connect,
        on_message=user.on_message,
        **settings,
    )
    client: TCPSocketClient = user.client
    return client


def start_ngircd(start: Start, folder: Path, *settings: str, port: int = 0) -> tuple[Program, int]:
    """Start an IRC server in the foreground, without look-ups and limits."""
    installed = Path("/usr/sbin/ngircd")  # not on the path of every user
    port = port or free_port()
    configuration = folder / "ngircd.conf"
    configuration.write_text(
        f"[Global]\nName = irc.test\nListen = 127.0.0.1\nPorts = {port}\n"
        "AdminEMail = nobody@localhost\n[Options]\nDNS = no\nIdent = no\nPAM = no\n"
        "[Limits]\nMaxConnectionsIP = 0\nMaxPenaltyTime = 0\n"
        + "".join(f"{setting}\n" for setting in settings)
    )
    command = installed if installed.exists() else program("ngircd")
    server = start(command, "-n", "-f", configuration)
    server.prints("Now listening on")
    return server, port


def listen_in_channel(observer: socket.socket) -> Iterator[bytes]:
    """Log in, join the channel, and yield what is said there."""
    observer.sendall(b"NICK observer\nUSER observer 0 * observer\n")
    for line in lines(observer):
        if line.startswith(b"PING "):
            observer.sendall(b"PONG" + line[4:] + b"\n")
        if line.startswith(b":irc.test 001"):
            observer.sendall(b"JOIN #load\n")
        if b" 366 " in line or b"PRIVMSG" in line:
            yield line


@pytest.mark.parametrize(
    "settings", [[], ["[Options]", "RequireAuthPing = yes"]], ids=["plain", "PING at the login"]
)
def test_ngircd_is_loaded(start: Start, tmp_path: Path, settings: list[str]) -> None:
    _, port = start_ngircd(start, tmp_path, *settings)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as observer:
        heard = listen_in_channel(observer)
        assert b" 366 " in next(heard)
        running = run(start, tmp_path, "irc.py", port, users=8)
        talk = re.compile(rb":u[0-9a-f]{8}!\S+ PRIVMSG #load :.")
        assert all(talk.match(next(heard)) for _ in range(25))
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert set(rows) == {"connect", "send_chat", "login", "echo_response"}
    assert rows["connect"] == (8, 0) and rows["login"] == (16, 0)
    assert rows["echo_response"][0] > 8
    assert all(failures == 0 for _, failures in rows.values())
    assert quiet(running.output)


def test_idle_irc_users_answer_the_ping_of_ngircd(start: Start, tmp_path: Path) -> None:
    limits = ("[Limits]", "PingTimeout = 5", "PongTimeout = 5")
    server, port = start_ngircd(start, tmp_path, *limits)
    running = run(start, tmp_path, "irc.py", port, users=3, wait="600")
    wait_until(lambda: latest_counts(running, "login")[0] == 6)
    sent = latest_counts(running, "send_chat")[0]
    # Each PONG is a ``send_chat``: two from each user, who would be gone after the first missed.
    wait_until(lambda: latest_counts(running, "send_chat")[0] >= sent + 3 * 2)
    assert stopped(running) == 0
    assert rows_of(running.output)["connect"] == (3, 0)
    assert server.process.poll() is None


def test_a_login_that_ngircd_refuses_is_a_failed_row(start: Start, tmp_path: Path) -> None:
    _, port = start_ngircd(start, tmp_path, "[Global]", "Password = secret")
    running = run(start, tmp_path, "irc.py", port, users=3, wait="0")
    wait_until(lambda: latest_counts(running, "login")[1] >= 3)
    assert stopped(running) == 1
    rows = rows_of(running.output)
    assert rows["login"][0] == rows["login"][1] >= 3
    assert "echo_response" not in rows
    assert "Traceback" not in running.output


def test_ngircd_that_is_killed_and_started_again_is_loaded_again(
    start: Start, tmp_path: Path
) -> None:
    server, port = start_ngircd(start, tmp_path)
    running = run(start, tmp_path, "irc.py", port, users=3)
    wait_until(lambda: latest_counts(running, "echo_response")[0] > 3)
    server.kill()
    wait_until(lambda: latest_counts(running, "connect")[1] > 0)
    start_ngircd(start, tmp_path, port=port)
    wait_until(lambda: successes(running, "login") >= 12)  # each user once more
    echoes = successes(running, "echo_response")
    wait_until(lambda: successes(running, "echo_response") > echoes)
    assert stopped(running) == 1
    assert "Traceback" not in running.output


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


def test_a_line_over_512_bytes_ends_the_connection_to_ngircd(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    _, port = start_ngircd(start, tmp_path)
    client = client_of(connect, port, defined("irc.py")["IrcUser"])
    assert "PONG irc.test :[" in str(client.send_chat("x" * 400))
    assert client.send_chat("x" * 512) is None
    assert rows.counts()["echo_response: ConnectionClosed"] == 1


def start_prosody(
    start: Start, folder: Path, authentication: str = "anonymous", port: int = 0
) -> tuple[Program, int]:
    """Start an XMPP server in the foreground, with a component for rooms."""
    command = program("prosody")
    port = port or free_port()
    data = folder / "data"
    data.mkdir(exist_ok=True)
    configuration = folder / "prosody.cfg.lua"
    configuration.write_text(
        f'run_as_root = true\ndata_path = "{data}"\npidfile = "{folder}/prosody.pid"\n'
        f"c2s_ports = {{ {port} }}\nc2s_interfaces = {{ '127.0.0.1' }}\n"
        "c2s_require_encryption = false\nallow_unencrypted_plain_auth = true\n"
        'modules_enabled = { "saslauth" }\nmodules_disabled = { "s2s", "tls" }\n'
        f'storage = "memory"\nlog = {{ info = "*console" }}\nauthentication = "{authentication}"\n'
        'VirtualHost "localhost"\nComponent "rooms.localhost" "muc"\n'
        "muc_room_locking = false\n"
    )
    server = start(command, "--config", configuration, "-F")
    server.prints("Activated service 'c2s'")
    return server, port


def test_a_room_of_prosody_is_loaded_also_after_it_was_killed_and_started_again(
    start: Start, tmp_path: Path
) -> None:
    server, port = start_prosody(start, tmp_path)
    running = run(start, tmp_path, "xmpp.py", port, users=4)
    wait_until(lambda: successes(running, "echo_response") > 20)
    assert latest_counts(running, "connect") == (4, 0)
    assert latest_counts(running, "login") == (20, 0)
    assert latest_counts(running, "echo_response")[1] == 0
    server.kill()
    wait_until(lambda: latest_counts(running, "connect")[1] > 0)
    start_prosody(start, tmp_path, port=port)
    wait_until(lambda: successes(running, "login") >= 40)  # each user once more
    echoes = successes(running, "echo_response")
    wait_until(lambda: successes(running, "echo_response") > echoes)
    assert stopped(running) == 1
    assert "Traceback" not in running.output


def test_a_login_that_prosody_refuses_is_a_failed_row(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    _, port = start_prosody(start, tmp_path, "internal_hashed")
    client = client_of(connect, port, defined("xmpp.py")["XmppUser"])
    assert client.send_chat("hello") is None
    assert rows.counts()["login: EchoRefused"] == 1
    assert rows.counts()["send_chat"] == 2  # the stream and the login


def test_an_xmpp_error_is_a_refusal_with_the_body_and_without() -> None:
    user_class = defined("xmpp.py")["XmppUser"]
    user = user_class.__new__(user_class)
    assert user.is_refusal(b"<message type='error' id='3f9a1c20.1'><error/></message>")
    assert user.is_refusal(b"<message type='error'><body>[3f9a1c20.1] a</body></message>")
    assert not user.is_refusal(b"<message type='groupchat'><body>type='error'</body></message>")


def test_a_text_with_every_special_character_comes_back_from_prosody_whole(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    _, port = start_prosody(start, tmp_path)
    client = client_of(connect, port, defined("xmpp.py")["XmppUser"])
    assert "안녕 &lt;b&gt; &amp; &apos;&quot; 👋</body>" in str(
        client.send_chat("안녕 <b> & '\" 👋")
    )


def test_stanzas_are_messages_wherever_the_stream_is_cut() -> None:
    opening = b"<?xml version='1.0'?><stream:stream id='1/2'>"
    stanzas = [opening, b"<a/>", b"<b to='x/y'><c/><d>e</d></b>", b"\n<b>f\n</b>"]
    framing = defined("xmpp.py")["StanzaFraming"]()
    data = b"".join(stanzas) + b"</stream:stream>"
    received = [stanza for byte in data for stanza in framing.feed(bytes([byte]))]
    assert received == stanzas
    with pytest.raises(MessageTooLong):
        list(framing.feed(b"<a>" + b"<a>" * MESSAGE_LIMIT))


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
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert (
        rows["connect"] == (10, 0)
        and rows["echo_response"][0] > 30
        and rows["echo_response"][1] == 0
    )
    assert len(received) >= rows["echo_response"][0]
    assert quiet(running.output)


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
    assert stopped(running) == 0
    rows = rows_of(running.output)
    assert (
        rows["connect"] == (10, 0)
        and rows["echo_response"][0] > 30
        and rows["echo_response"][1] == 0
    )
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

    client = connect(serve(server).port, framing=Noting, echo=mode, timeout=0.3)
    answer = client.send_chat("x" * 100)
    assert [type(row["exception"]).__name__ for row in rows.named("echo_response")] == [
        outcome or "NoneType"
    ]
    assert len(answer or "") == (0 if outcome else cut)


def test_in_mode_any_a_late_second_piece_is_taken_for_the_next_answer(
    serve: Serve, connect: Connect
) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"first")
        connection.recv(4096)
        connection.sendall(b"rest of the first")

    client = connect(serve(server).port, framing="raw", echo="any")
    assert [client.send_chat("a"), client.send_chat("b")] == ["first", "rest of the first"]
