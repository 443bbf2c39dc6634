"""``examples/``: each is run by its own command against a scripted server of its protocol.

Real servers of these protocols are in ``test_real_servers.py``.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import binary_header
import cp949
import game_header
import gevent
import irc
import json_lines
import no_newline
import plain_room
import prompts
import pytest
import stomp
import xmpp
from clients import Connect
from example_files import (
    LOGIN_ROWS,
    NAMES,
    Change,
    changed,
    client_of,
    command_with,
    copied,
    documented_command,
    run_command,
    source_of,
    trusting_class,
    user_of,
    users_in,
)
from programs import (
    LOCUST,
    Program,
    Start,
    bus_options,
    latest_counts,
    rows_of,
    stopped,
    wait_until,
)
from rows import Rows, RunUsers
from servers import Answers, Handler, Serve, Server, echo, lines, silent

from locustfile import (
    MESSAGE_LIMIT,
    EchoMode,
    Framing,
    FramingError,
    MessageTooLong,
    RawFraming,
    TCPChatUser,
)

NewFraming = Callable[[], Framing]

# -------------------------------------------------------------------------------- scripted servers


def split(connection: socket.socket, delimiter: bytes) -> Iterator[bytes]:
    """Yield what a connection receives up to each delimiter, and without it."""
    rest = b""
    while data := connection.recv(65536):
        *complete, rest = (rest + data).split(delimiter)
        yield from complete


def receive(connection: socket.socket, size: int) -> bytes:
    """Return exactly so many bytes; raise ``ConnectionError`` where the connection ends before."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


class Room:
    """Those who are connected, and what is sent to all of them."""

    def __init__(self) -> None:
        self.members: set[socket.socket] = set()

    def say(self, data: bytes) -> None:
        """Send this to everybody."""
        for member in list(self.members):
            try:
                member.sendall(data)
            except OSError:
                self.members.discard(member)


class PlainRoom(Room):
    """A room with a banner, names, and somebody who talks whenever anybody does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection."""
        connection.sendall(b"Welcome!\n* Choose a name with /nick\n")
        self.members.add(connection)
        name = "?"
        for line in lines(connection):
            self.say(b"* kim is now known as ben\n<ben> hi\n")
            text = line.decode()
            if text.startswith("/nick "):
                name = text.removeprefix("/nick ")
                self.names.append(name)
                connection.sendall(f"* you are now known as {name}\n".encode())
            else:
                self.say(f"<{name}> {text}\n".encode())


def irc_server(connection: socket.socket) -> None:
    """Let everybody in who answers a ``PING``, and answer theirs."""
    for line in lines(connection):
        command, _, rest = line.removesuffix(b"\r").partition(b" ")
        if command == b"USER":
            connection.sendall(b":irc.test NOTICE * :Looking you up\r\nPING :irc.test\r\n")
        elif command == b"PONG":
            connection.sendall(b":irc.test 001 you :Welcome\r\n")
        elif command == b"JOIN":
            connection.sendall(b":you!u@h JOIN :#load\r\n:irc.test 366 you #load :End\r\n")
        elif command == b"PING":
            connection.sendall(b":irc.test PONG irc.test %b\r\n" % rest)


def json_server(connection: socket.socket) -> None:
    """Greet, let everybody in, and send back each text in JSON of its own."""
    connection.sendall(b'{"type":"hello"}\n')
    for message in map(json.loads, lines(connection)):
        if message["type"] == "login":
            assert message == {"type": "login", "name": "load", "password": "secret"}
            connection.sendall(b'not JSON\n[]\n{"type":"welcome"}\n')
            continue
        written = {"from": "load", "text": message["text"], "type": "chat"}
        reply = json.dumps(written, ensure_ascii=False, separators=(",", ":"))
        connection.sendall(b'{"from":"another"}\n' + reply.encode() + b"\n")


def prompting(end_of_prompt: bytes = b"") -> Handler:
    r"""Return a handler that asks for name and password, and waits for ``\r\n``."""

    def handler(connection: socket.socket) -> None:
        connection.sendall(b"This is a test.\r\nlog")
        gevent.sleep(0.01)  # so the prompt comes in two pieces
        connection.sendall(b"in: " + end_of_prompt)
        answers = split(connection, b"\r\n")
        assert next(answers) == b"load"
        connection.sendall(b"password: " + end_of_prompt)
        if next(answers) != b"secret":
            connection.sendall(b"Wrong password.\r\n")
            return
        connection.sendall(b"News: none.\r\nWelcome!\r\n")
        for line in answers:
            connection.sendall(line + b"\n")

    return handler


def binary_server(connection: socket.socket) -> None:
    """Welcome a login, and send back chat with another type, in pieces."""
    while True:
        kind, length = struct.unpack("<BH", receive(connection, 3))
        data = receive(connection, length)
        if kind == 1:
            assert data == b"load"
            connection.sendall(b"\x09\x02\x00hi\x02\x00\x00")
        else:
            assert kind == 4
            reply = b"\x09\x00\x00" + struct.pack("<BH", 5, length) + data
            connection.sendall(reply[:5])
            connection.sendall(reply[5:])


def game_server(connection: socket.socket) -> None:
    """Welcome a login, and send back chat with another id."""
    while True:
        size, number = struct.unpack("<HH", receive(connection, 4))
        data = receive(connection, size - 4)
        if number == 1:
            assert data == b"load"
            connection.sendall(struct.pack("<HHHH", 4, 9, 4, 2))
        else:
            assert number == 4
            connection.sendall(struct.pack("<HH", size, 5) + data)


class StompServer(Room):
    """One topic; it counts heartbeats, and sends some."""

    def __init__(self) -> None:
        super().__init__()
        self.heartbeats = 0

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection."""
        for received in split(connection, b"\0"):
            frame = received.lstrip(b"\n")
            assert frame, "a heartbeat is a newline alone"
            self.heartbeats += len(received) - len(frame)
            head, _, body = frame.partition(b"\n\n")
            command, *headers = head.split(b"\n")
            if command == b"CONNECT":
                assert b"login:guest" in headers
                connection.sendall(b"CONNECTED\nversion:1.2\n\n\0\n")
            elif command == b"SUBSCRIBE":
                self.members.add(connection)
                connection.sendall(b"RECEIPT\nreceipt-id:0\n\n\0\n")
            elif command == b"SEND":
                self.say(b"\nMESSAGE\nsubscription:0\nmessage-id:7\n\n" + body + b"\0\n")


def endless_answers(connection: socket.socket) -> None:
    """Send back each line without its end."""
    for line in lines(connection):
        connection.sendall(line)


def reformatting(connection: socket.socket) -> None:
    """Send back whatever came, as somebody's words."""
    while data := connection.recv(65536):
        assert b"\n" not in data
        connection.sendall(b"you said " + data.replace(b"] ", b"]: ", 1))


def in_korean(encoding: str) -> Handler:
    """Return a handler that understands one encoding, greets by name, and sends lines back."""

    def handler(connection: socket.socket) -> None:
        for line in lines(connection):
            text = line.decode(encoding)  # an error ends the connection
            if text.startswith("/name 손님"):
                text = "환영합니다"
            connection.sendall(text.encode(encoding) + b"\n")

    return handler


class XmppServer(Room):
    """A room that wants TLS before anything else."""

    def __init__(self, certificate: ssl.SSLContext, refusal: bytes = b"") -> None:
        super().__init__()
        self.certificate = certificate
        self.refusal = refusal

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection."""
        opening = b"<?xml version='1.0'?><stream:stream id='1' version='1.0'>"
        features = opening + b"<stream:features><a><a/></a></stream:features>"
        receive_until(connection, b"streams'>")
        connection.sendall(features)
        receive_until(connection, b"/>")
        connection.sendall(b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        with self.certificate.wrap_socket(connection, server_side=True) as secure:
            receive_until(secure, b"streams'>")
            secure.sendall(features)
            receive_until(secure, b"/>")
            secure.sendall(self.refusal or b"<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
            receive_until(secure, b"streams'>")
            secure.sendall(features)
            receive_until(secure, b"</iq>")
            secure.sendall(b"<iq type='result' id='bind'><bind/></iq>")
            receive_until(secure, b"</presence>")
            self.members.add(secure)
            secure.sendall(b"<presence><x><status code='110'/></x></presence>")
            for message in split(secure, b"</message>"):
                body = re.search(rb"<body>.*</body>", message)
                assert body is not None
                self.say(b"<message type='groupchat'><x/>" + body[0] + b"</message>")


def receive_until(connection: socket.socket, end: bytes) -> None:
    """Read a stanza: nothing comes after it before it is answered."""
    data = b""
    while not data.endswith(end):
        more = connection.recv(65536)
        if not more:
            raise ConnectionError
        data += more


# ---------------------------------------------------------------------------------------- commands


SERVERS: dict[str, tuple[Handler, set[str]]] = {
    "binary_header": (binary_server, {"login"}),
    "cp949": (in_korean("cp949"), {"login"}),
    "game_header": (game_server, {"login"}),
    "irc": (irc_server, {"login"}),
    "json_lines": (json_server, {"login"}),
    "no_newline": (endless_answers, set()),
    "plain_room": (PlainRoom(), {"login"}),
    "prompts": (prompting(), {"login", "login_name"}),
    "raw": (reformatting, set()),
    "stomp": (StompServer(), {"login"}),
}  # login and xmpp have tests of their own


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Program]]:
    """Return a run of the command of each example, for five users. All run at the same time."""
    servers = []
    running = {}
    for name, (handler, _) in SERVERS.items():
        server = Server(handler)
        servers.append(server)
        command = command_with(name, server.port, users=5)
        running[name] = run_command(Program, command)
    yield running
    for program in running.values():
        program.kill()
    for server in servers:
        server.stop()


@pytest.mark.parametrize("name", SERVERS)
def test_the_command_of_an_example_loads_the_server_that_it_is_for(
    runs: dict[str, Program], name: str
) -> None:
    running = runs[name]
    wait_until(lambda: latest_counts(running, "echo_response").successes > 20)
    rows = stopped(running)
    _, more_rows = SERVERS[name]
    assert set(rows) == {"connect", "send_chat", "echo_response", *more_rows}
    assert rows["connect"].requests == 5
    logins = {"irc": 2, "stomp": 2}.get(name, 1)
    for row in more_rows:
        assert rows[row].requests == 5 * logins


def test_the_command_of_the_xmpp_example_loads_a_room_that_wants_tls(
    start: Start, serve: Serve, certificates: Path, identity: ssl.SSLContext
) -> None:
    server = serve(XmppServer(identity))
    command = command_with("xmpp", server.port, users=4)
    authority = str(certificates / "ca.pem")
    running = run_command(start, command, SSL_CERT_FILE=authority)
    wait_until(lambda: latest_counts(running, "echo_response").successes > 20)
    rows = stopped(running)
    assert set(rows) == {*LOGIN_ROWS, "starttls"}
    assert rows["starttls"].requests == 4
    assert rows["login"].requests == 7 * 4


class Accounts(Answers):
    """A server that greets, knows the passwords of kim and lee, and sends lines back."""

    def __init__(self) -> None:
        super().__init__(self.answer)

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection."""
        connection.sendall(b"Please log in.\n")
        super().__call__(connection)

    def answer(self, line: bytes) -> bytes:
        """Answer a line."""
        if line in (b"/login kim secret", b"/login lee, jr. hush"):
            return b"<ben> hi\nWelcome back.\n"
        if line.startswith(b"/login "):
            return b"Wrong password.\n"
        return line + b"\n"

    def logins(self) -> set[bytes]:
        """Return the accounts that were used."""
        return {line for line in self.received if line.startswith(b"/login")}


@pytest.mark.together
def test_each_user_of_the_login_example_has_an_account_and_a_refused_one_is_a_failed_row(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    """On a worker that has no file of its own, too."""
    members = tmp_path / "members.csv"
    members.write_text('name,password\nkim,secret\n"lee, jr.",hush\nben,guess\n')
    server = Accounts()
    bus = " ".join(bus_options())
    command = command_with("login", serve(server).port, users=3)
    command = command.replace("=members.csv", f"={members}")
    master = run_command(start, f"{command} --master --expect-workers=1 {bus}")
    start(*LOCUST, "-f", "-", "--worker", *bus.split(), cwd=tmp_path)
    wait_until(lambda: latest_counts(master, "login").failures > 1)
    wait_until(lambda: latest_counts(master, "echo_response").successes > 20)
    assert master.stop() == 1
    assert server.logins() == {
        b"/login kim secret",
        b"/login lee, jr. hush",
        b"/login ben guess",
    }
    rows = rows_of(master.output)
    assert set(rows) == LOGIN_ROWS
    assert rows["login"].successes == 2
    assert rows["echo_response"].failures == 0
    assert "EchoRefused" in master.output
    assert "Traceback" not in master.output


@pytest.mark.together
@pytest.mark.parametrize("name", NAMES)
def test_an_example_copied_beside_the_core_is_loaded_from_there(
    start: Start, tmp_path: Path, name: str
) -> None:
    """With what its command lists before it, too: the plugin of ``login.py``."""
    command = copied(documented_command(name), tmp_path)
    listing = run_command(start, f"{command} --list", tmp_path)
    assert listing.ends() == 0, listing.output
    assert f"    {user_of(name).__name__}\n" in listing.output


@pytest.mark.together
def test_an_example_is_copied_beside_the_core_and_run_from_there(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    port = serve(echo).port
    command = copied(command_with("raw", port, users=2), tmp_path)
    running = run_command(start, command, tmp_path)
    wait_until(lambda: latest_counts(running, "echo_response").successes > 2)
    stopped(running)


@pytest.mark.together
def test_all_examples_can_be_listed_behind_the_core(start: Start) -> None:
    examples = [f"examples/{name}.py" for name in NAMES]
    files = ",".join(["locustfile.py", "plugins/accounts.py", *examples])
    listing = start(*LOCUST, "-f", files, "--list")
    assert listing.ends() == 0
    users = re.findall(r"^    (\w+)", listing.output, re.MULTILINE)
    defined = {user_of(name).__name__ for name in NAMES}
    assert set(users) == {"ChatClient", *defined}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_lines_of_an_example_say_the_server_the_command_and_what_to_change(
    name: str,
) -> None:
    documentation = changed(name).__doc__ or ""
    assert documentation.startswith(("Load ", "Log in "))
    assert f"examples/{name}.py" in documented_command(name)
    assert "To change: " in documentation


@pytest.mark.parametrize("name", NAMES)
def test_an_example_defines_one_user_and_imports_the_core_as_a_module(name: str) -> None:
    assert len(users_in(changed(name))) == 1
    assert "\nimport locustfile\n" in source_of(name)


# ---------------------------------------------------------------------------------- login failures


def refusing(question: bytes, refusal: bytes) -> Handler:
    """Return a handler that refuses a client once it has sent something."""

    def handler(connection: socket.socket) -> None:
        data = b""
        while question not in data:
            more = connection.recv(65536)
            if not more:
                return
            data += more
        connection.sendall(refusal)
        silent(connection)

    return handler


LOGINS: dict[str, tuple[type[TCPChatUser], bytes, bytes]] = {
    "plain_room": (plain_room.RoomUser, b"/nick ", b""),
    "cp949": (cp949.Cp949User, b"/name ", "오류: 이름\n".encode("cp949")),
    "irc": (irc.IrcUser, b"USER ", b":irc.test 433 * you :Nickname already in use\r\n"),
    "json_lines": (json_lines.JsonUser, b"login", b'{"type": "error", "why": "no"}\n'),
    "prompts": (prompts.PromptUser, b"load", b"Wrong name.\r\n"),
    "binary_header": (binary_header.BinaryUser, b"load", b"\x03\x02\x00no"),
    "game_header": (game_header.GameUser, b"load", b"\x06\x00\x03\x00no"),
    "stomp": (stomp.StompUser, b"\0", b"ERROR\nmessage:Bad CONNECT\n\n\0"),
}


def refusing_nick(connection: socket.socket) -> None:
    """Greet, tell of others, and refuse every name."""
    connection.sendall(b"* Choose a name\n")
    for line in lines(connection):
        name = line.removeprefix(b"/nick ")
        connection.sendall(b"* kim is now known as ben\n* " + name + b" is in use\n")


@pytest.mark.parametrize("name", LOGINS)
def test_a_refused_login_is_one_failed_row_and_nothing_more_is_sent(
    connect: Connect, rows: Rows, serve: Serve, name: str
) -> None:
    user_class, question, refusal = LOGINS[name]
    serving = serve(refusing(question, refusal) if refusal else refusing_nick)
    client = client_of(connect, serving.port, user_class)
    assert client.send_chat("hello") is None
    assert client.connected_since is None
    counts = rows.counts()
    sent = counts.pop("send_chat")
    login_row = "login_name" if name == "prompts" else "login"
    assert counts == {"connect": 1, f"{login_row}: EchoRefused": 1}
    assert sent == (2 if name == "irc" else 1)


@pytest.mark.parametrize("name", LOGINS)
@pytest.mark.parametrize("failure", ["ConnectionClosed", "EchoTimeout"])
def test_a_login_that_the_server_hangs_up_on_or_does_not_answer_is_one_failed_row(
    connect: Connect, rows: Rows, serve: Serve, name: str, failure: str
) -> None:
    user_class, question, _ = LOGINS[name]
    serving = serve(hanging_up(question) if failure == "ConnectionClosed" else silent)
    client = client_of(connect, serving.port, user_class, timeout=0.3)
    assert client.send_chat("hello") is None
    assert client.connected_since is None
    counts = rows.counts()
    del counts["send_chat"], counts["connect"]
    ((row, count),) = counts.items()
    assert row in (f"login: {failure}", f"login_name: {failure}")
    assert count == 1
    wait_until(lambda: serving.open == 0)


def hanging_up(question: bytes) -> Handler:
    """Return a handler that hangs up once it has been asked something."""

    def handler(connection: socket.socket) -> None:
        data = b""
        while question not in data and (more := connection.recv(65536)):
            data += more

    return handler


@pytest.mark.parametrize(
    "refusal",
    [
        b"<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><not-authorized/></failure>",
        b"<stream:error><host-unknown/></stream:error></stream:stream>",
    ],
)
def test_a_refused_xmpp_login_is_one_failed_row(
    connect: Connect,
    rows: Rows,
    serve: Serve,
    certificates: Path,
    identity: ssl.SSLContext,
    refusal: bytes,
) -> None:
    port = serve(XmppServer(identity, refusal)).port
    user_class = trusting_class(xmpp.XmppUser, certificates / "ca.pem")
    client = client_of(connect, port, user_class)
    assert client.send_chat("hello") is None
    counts = rows.counts()
    assert counts["login: EchoRefused"] == counts["starttls"] == 1
    assert set(counts) == {"connect", "send_chat", "login", "starttls", "login: EchoRefused"}


def test_a_certificate_that_is_not_trusted_is_a_failed_starttls_and_nothing_more_is_sent(
    connect: Connect, rows: Rows, serve: Serve, identity: ssl.SSLContext
) -> None:
    port = serve(XmppServer(identity)).port
    assert client_of(connect, port, xmpp.XmppUser).send_chat("hello") is None
    assert rows.counts() == {
        "connect": 1,
        "send_chat": 2,
        "login": 2,
        "starttls: SSLCertVerificationError": 1,
    }


# ------------------------------------------------------------------------------------- plain rooms


def test_neither_the_banner_nor_what_others_say_is_the_answer_to_a_login(
    connect: Connect, serve: Serve
) -> None:
    room = PlainRoom()
    port = serve(room).port
    clients = [client_of(connect, port, plain_room.RoomUser) for _ in range(3)]
    names = [f"u{client.identity}" for client in clients]
    for client, name in zip(clients, names, strict=True):
        echoed = client.send_chat("hello")
        assert str(echoed).startswith(f"<{name}> [")
    assert room.names == names


def test_a_room_that_does_not_answer_nick_and_sends_to_the_others_only(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    changes = (
        (
            'if self.client.send_chat(f"/nick {name}", echo=is_answer) is None:\n'
            '            raise PermissionError("no name")',
            'self.client.send_chat(f"/nick {name}", echo="none")',
        ),
        ('    """Takes a name', '    echo = "none"\n    """Takes a name'),
    )
    user_class = user_of("plain_room", *changes)
    client = client_of(connect, serve(silent).port, user_class)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 2}


# ---------------------------------------------------------------------------------------- IRC, XMPP


def test_an_xmpp_error_is_a_refusal_with_the_body_and_without() -> None:
    user = xmpp.XmppUser.__new__(xmpp.XmppUser)
    assert user.is_refusal(b"<message type='error' id='3f9a1c20.1'><error/></message>")
    assert user.is_refusal(b'<message type="error"><body>[3f9a1c20.1] a</body></message>')
    assert not user.is_refusal(b"<message type='groupchat'><body>type='error'</body></message>")


def fed_byte_by_byte(framing: Framing, data: bytes) -> list[bytes]:
    """Return the messages of a stream that comes in the smallest pieces."""
    messages: list[bytes] = []
    for byte in data:
        messages += framing.feed(bytes([byte]))
    return messages


def assert_cut_anywhere_gives(new: NewFraming, data: bytes, all_: list[bytes]) -> None:
    """Fail unless a stream gives these messages whole, byte by byte, and cut in two anywhere."""
    assert fed_byte_by_byte(new(), data) == all_
    for cut in range(len(data) + 1):
        framing = new()
        before = list(framing.feed(data[:cut]))
        behind = list(framing.feed(data[cut:]))
        assert before + behind == all_


def test_stanzas_are_messages_wherever_the_stream_is_cut() -> None:
    opening = b"<?xml version='1.0'?><stream:stream id='1/2'>"
    stanzas = [b"<a/>", b"<b to='x/y'><c/><b><d>e</d></b></b>", b"<b>f\n</b>", b"</stream:stream>"]
    parts = [b"<?xml version='1.0'?>", b"<stream:stream id='1/2'>", *stanzas]
    data = opening + b"\n".join(stanzas)
    assert_cut_anywhere_gives(xmpp.StanzaFraming, data, parts)


@pytest.mark.parametrize("flood", [b"<a>", b"<", b"a", b"<a "])
def test_a_stanza_without_an_end_is_too_long_and_found_so_at_once(flood: bytes) -> None:
    framing = xmpp.StanzaFraming()
    read = flood * (8192 // len(flood) + 1)

    def feed() -> None:
        for _ in range(129):
            list(framing.feed(read))

    with pytest.raises(MessageTooLong):
        feed()


# --------------------------------------------------------------------------------------------- JSON

TEXT = '{"type": "chat", "text": f"[{tag}] {message}"}'
WITH_ID = (TEXT, '{"type": "chat", "id": tag, "text": f"[{tag}] {message}"}')
BY_TAG = (
    "    def expected(self, tag: str, message: str) -> str:\n"
    '        """Return what comes back unchanged: the text, as the server writes it."""\n'
    '        return json.dumps(f"[{tag}] {message}", ensure_ascii=False)\n',
    '    echo = "tag"\n',
)


def json_answering(answer: Callable[[dict[str, str]], object]) -> Handler:
    r"""Return a handler that lets everybody in, and writes what it answers in ASCII, ``\u…``."""

    def handler(connection: socket.socket) -> None:
        messages = map(json.loads, lines(connection))
        next(messages)
        connection.sendall(b'{"type":"welcome"}\n')
        for message in messages:
            written = json.dumps(answer(message))
            connection.sendall(written.encode() + b"\n")

    return handler


def test_a_json_server_that_writes_other_characters_in_ascii_echoes_in_ascii(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    port = serve(json_answering(lambda message: {"text": message["text"]})).port
    client = client_of(connect, port, json_lines.JsonUser)
    assert client.send_chat("안녕") is None
    assert rows.counts()["echo_response: EchoAltered"] == 1
    ascii_user = user_of("json_lines", (", ensure_ascii=False", ""))
    ascii_client = client_of(connect, port, ascii_user)
    assert r"\uc548\ub155" in str(ascii_client.send_chat("안녕"))


def test_a_json_server_that_sends_back_the_id_alone_is_found_by_it(
    connect: Connect, serve: Serve
) -> None:
    port = serve(json_answering(lambda message: {"id": message["id"]})).port
    user_class = user_of("json_lines", WITH_ID, BY_TAG)
    assert client_of(connect, port, user_class).send_chat("hello")


@pytest.mark.parametrize(
    "changes",
    [(), (WITH_ID,)],
    ids=["as it stands", "with an id"],
)
def test_a_json_error_with_the_id_or_without_is_a_refusal(
    connect: Connect, rows: Rows, serve: Serve, changes: tuple[Change, ...]
) -> None:
    def refuse(message: dict[str, str]) -> object:
        return {"type": "error", "id": message.get("id")}

    server = serve(json_answering(refuse))
    user_class = user_of("json_lines", *changes)
    client = client_of(connect, server.port, user_class)
    assert client.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoRefused"] == 1


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_no_line_of_a_server_makes_the_json_example_fail(line: bytes) -> None:
    assert json_lines.type_of(line) is None


# ------------------------------------------------------------------------------------------ prompts


def test_prompts_that_end_with_a_newline_are_lines(connect: Connect, serve: Serve) -> None:
    user_class = user_of("prompts", ("framing = PromptFraming", 'framing = "crlf"'))
    server = serve(prompting(end_of_prompt=b"\r\n"))
    client = client_of(connect, server.port, user_class)
    assert client.send_chat("hello")


def test_an_empty_line_goes_first_to_a_server_that_drops_what_comes_before_it_asks(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    dropped: list[bytes] = []

    def server(connection: socket.socket) -> None:
        dropped.append(connection.recv(4096))
        prompting()(connection)

    first = 'self.answer("", lambda line: line == b"login: ", "login_name")'
    assert first in (prompts.__doc__ or "")
    login = '        self.answer("load"'
    user_class = user_of("prompts", (login, f"        {first}\n{login}"))
    client = client_of(connect, serve(server).port, user_class)
    assert client.send_chat("hello")
    assert dropped == [b"\r\n"]
    assert rows.counts()["login_name"] == 2


def test_a_wrong_password_is_a_failed_login(connect: Connect, rows: Rows, serve: Serve) -> None:
    user_class = user_of("prompts", ('"secret"', '"guess"'))
    client = client_of(connect, serve(prompting()).port, user_class)
    assert not client.connect()
    assert rows.counts()["login: EchoRefused"] == 1
    assert rows.counts()["login"] == 0


def test_prompts_and_lines_are_messages_wherever_the_stream_is_cut() -> None:
    data = b"Hello\r\nlogin: password: Welcome\r\n[1] a password: no\r\n"
    prompted = [b"Hello", b"login: ", b"password: ", b"Welcome", b"[1] a password: no"]
    assert_cut_anywhere_gives(prompts.PromptFraming, data, prompted)
    with pytest.raises(MessageTooLong):
        list(prompts.PromptFraming().feed(b"x" * (MESSAGE_LIMIT + 1)))


def test_a_prompt_behind_telnet_options_is_found_once_they_are_removed() -> None:
    options = b"\xff\xfb\x01"
    assert list(prompts.PromptFraming().feed(options + b"login: ")) == []
    assert list(prompts.PromptFraming().feed(b"login: ")) == [b"login: "]


# ---------------------------------------------------------------------------------- binary headers

BIG_HEADER = ('HEADER = struct.Struct("<BH")', 'HEADER = struct.Struct(">BI")')
BIG_SIZE = ('SIZE = struct.Struct("<H")', 'SIZE = struct.Struct(">I")')
PAYLOADS = [
    b"\x01\x00kim",
    b"\x02\x00",
    b"\x02\x00" + "안녕하세요 👋".encode(),
    b"\x03\x00" + b"x" * 600,
    b"\xff\xfflast",
]
HEADERS: list[tuple[str, str, tuple[Change, ...], bytes]] = [
    ("binary_header", "HeaderFraming", (), b"\x02\x06\x00\x00hello"),
    ("binary_header", "HeaderFraming", (BIG_HEADER,), b"\x02\x00\x00\x00\x06\x00hello"),
    ("game_header", "PacketFraming", (), b"\x09\x00\x02\x00hello"),
    ("game_header", "PacketFraming", (BIG_SIZE,), b"\x00\x00\x00\x0b\x02\x00hello"),
]


@pytest.mark.parametrize(("name", "framing", "changes", "encoded"), HEADERS)
def test_a_header_is_what_it_is_said_to_be_and_its_stream_may_be_cut_anywhere(
    name: str, framing: str, changes: tuple[Change, ...], encoded: bytes
) -> None:
    new: NewFraming = getattr(changed(name, *changes), framing)
    assert new().encode(b"\x02\x00hello") == encoded
    data = b"".join(new().encode(payload) for payload in PAYLOADS)
    assert_cut_anywhere_gives(new, data, PAYLOADS)


@pytest.mark.parametrize(
    ("framing", "most"),
    [
        (binary_header.HeaderFraming, 65536),
        (game_header.PacketFraming, 65533),
    ],
)
def test_a_message_that_the_header_cannot_say_is_refused_before_it_is_sent(
    framing: NewFraming, most: int
) -> None:
    framing().encode(b"x" * most)
    with pytest.raises(ValueError, match="longer than its"):
        framing().encode(b"x" * (most + 1))


@pytest.mark.parametrize(
    ("name", "framing", "change", "data"),
    [
        ("binary_header", "HeaderFraming", BIG_HEADER, struct.pack(">BI", 2, MESSAGE_LIMIT + 1)),
        ("game_header", "PacketFraming", BIG_SIZE, struct.pack(">I", MESSAGE_LIMIT + 1)),
    ],
)
def test_a_length_over_the_limit_fails_before_its_data_comes(
    name: str, framing: str, change: Change, data: bytes
) -> None:
    new: NewFraming = getattr(changed(name, change), framing)
    with pytest.raises(MessageTooLong):
        list(new().feed(data))


@pytest.mark.parametrize("size", [0, 1])
def test_a_size_shorter_than_itself_fails_and_does_not_loop(size: int) -> None:
    with pytest.raises(FramingError):
        list(game_header.PacketFraming().feed(struct.pack("<HH", size, 5)))


def test_a_game_server_without_ids_is_loaded(connect: Connect, serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        while True:
            (size,) = struct.unpack("<H", receive(connection, 2))
            data = receive(connection, size - 2)
            connection.sendall(struct.pack("<H", size) + data)

    changes = (
        ("CHAT + self.expected(tag, message)", "self.expected(tag, message)"),
        ('LOGIN + b"load", echo=is_answer', 'b"load"'),
    )
    user_class = user_of("game_header", *changes)
    client = client_of(connect, serve(server).port, user_class)
    assert client.send_chat("hello")


# -------------------------------------------------------------------------------------------- STOMP


def test_a_stomp_user_sends_its_heartbeat_and_understands_that_of_the_server(
    serve: Serve, run_users: RunUsers
) -> None:
    server = StompServer()
    quick = type("QuickUser", (stomp.StompUser,), {"heartbeat": 0.02})
    run = run_users(quick, serve(server).address, users=2, chat_wait="0.1")
    wait_until(lambda: server.heartbeats > 5 and run.count("echo_response") > 5)
    assert not run.errors
    assert set(run.rows.counts()) == LOGIN_ROWS


def test_the_heartbeat_of_the_stomp_example_is_more_frequent_than_it_tells_the_server() -> None:
    told = re.search(r"heart-beat:(\d+),", stomp.CONNECT)
    assert told is not None
    heartbeat = stomp.StompUser.heartbeat
    assert heartbeat is not None
    assert heartbeat * 1000 * 2 == int(told[1])


def test_frames_are_messages_wherever_the_stream_is_cut() -> None:
    data = b"\nCONNECTED\n\n\0\n\nMESSAGE\n\na\nb\n\0\r\nRECEIPT\n\n\0\n"
    frames = [b"CONNECTED\n\n", b"MESSAGE\n\na\nb\n", b"RECEIPT\n\n"]
    assert_cut_anywhere_gives(stomp.FrameFraming, data, frames)


def test_the_frame_of_a_stomp_error_is_a_refusal_of_what_is_in_flight(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    def server(connection: socket.socket) -> None:
        frames = split(connection, b"\0")
        for answer in (b"CONNECTED\n\n\0", b"RECEIPT\n\n\0", b"ERROR\nmessage:too long\n\n\0"):
            next(frames)
            connection.sendall(answer)
        silent(connection)

    client = client_of(connect, serve(server).port, stomp.StompUser)
    assert client.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoRefused"] == 1


# ------------------------------------------- no newline, no framing, another encoding


def test_long_answers_without_an_end_that_come_in_two_reads_are_found_by_their_tag(
    connect: Connect, rows: Rows, serve: Serve
) -> None:
    reads: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(line[:40])
            wait_until(lambda: reads)
            connection.sendall(line[40:])

    class Noting(no_newline.NoNewlineFraming):
        def feed(self, data: bytes) -> Iterable[bytes]:
            reads.append(data)
            return super().feed(data)

    port = serve(server).port
    user_class = type("NotingUser", (no_newline.NoNewlineUser,), {"framing": Noting})
    assert client_of(connect, port, user_class).send_chat("x" * 100) is None
    assert rows.counts()["echo_response: EchoTruncated"] == 1
    reads.clear()
    by_tag = type("ByTagUser", (user_class,), {"echo": "tag"})
    assert client_of(connect, port, by_tag).send_chat("x" * 100)


@pytest.mark.parametrize(
    ("mode", "cut", "outcome"),
    [
        ("full", 30, "echo_response: EchoTruncated"),
        ("tag", 30, "echo_response"),
        ("tag", 5, "echo_response: EchoTimeout"),
        ("any", 5, "echo_response"),
    ],
)
def test_a_raw_echo_in_two_reads_is_what_the_example_says(
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


def test_what_cp949_lacks_is_sent_and_expected_as_a_question_mark(
    connect: Connect, serve: Serve
) -> None:
    client = client_of(connect, serve(in_korean("cp949")).port, cp949.Cp949User)
    assert str(client.send_chat("안녕 👋")).endswith("] 안녕 ?")


@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
def test_the_encoding_is_changed_to_another_that_keeps_ascii(
    connect: Connect, serve: Serve, encoding: str
) -> None:
    nameless = {"encoding": encoding, "on_connect": TCPChatUser.on_connect}
    user_class = type("OtherUser", (cp949.Cp949User,), nameless)
    client = client_of(connect, serve(echo).port, user_class)
    assert str(client.send_chat("你好")).endswith("] 你好")
