"""``plugins/diagnose.py``: what a server speaks, found out by asking it."""

from __future__ import annotations

import itertools
import re
import shlex
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import diagnose
import gevent
import pytest
from certificates import secure, server_context
from gevent.lock import BoundedSemaphore
from gevent.pywsgi import WSGIServer
from programs import PATH, ROOT, Program, Start
from servers import Handler, Serve, Server, echo, free_port, hang_up, says, silent

import locustfile

Wrap = Callable[[bytes], bytes]

FRAMINGS = ("line", "crlf", "raw", "nul", ">H", "<H", ">I", "<I")
NOT_JSON = b'{"type": "error", "reason": "not JSON"}'
TAG = re.compile(rb"\[?[0-9a-f]{8}\.\d+\]?")


# ------------------------------------------------------------------------------ scripted servers


def delimiter_of(framing: str) -> bytes:
    return {"line": b"\n", "crlf": b"\r\n", "nul": b"\0"}[framing]


def wrapped(framing: str, payload: bytes, extra: int = 0) -> bytes:
    """Return a message as a server with this framing sends it."""
    if framing == "raw":
        return payload
    if framing[0] in "<>":
        return struct.pack(framing, len(payload) + extra) + payload
    return payload + delimiter_of(framing)


def messages(connection: socket.socket, framing: str, extra: int = 0) -> Iterator[bytes]:
    """Yield the messages that a server with this framing reads, which takes nothing else.

    :param extra: what a length counts beside the message
    """
    rest = b""
    while data := connection.recv(65536):
        if framing == "raw":
            yield data.strip()
            continue
        rest += data
        if framing[0] not in "<>":
            *complete, rest = rest.split(delimiter_of(framing))
            yield from complete
            continue
        size = struct.calcsize(framing)
        while len(rest) >= size:
            end = struct.unpack_from(framing, rest)[0] + size - extra
            if end > 5000 or end < size:
                return  # closes on what it does not understand
            if len(rest) < end:
                break
            yield rest[size:end]
            rest = rest[end:]


def shout(message: bytes) -> bytes:
    """Answer with the tag and another text."""
    tag = TAG.search(message)
    return (tag[0] if tag else b"") + b" is what you said"


def confirm(message: bytes) -> bytes:
    """Answer the same to all."""
    return b"OK"


def repeat(message: bytes) -> bytes:
    """Answer with the whole message, and more."""
    return b"you: " + message


def always(answer: bytes) -> Wrap:
    """Return a function that answers anything with the same."""
    return lambda message: answer


def quote(message: bytes) -> bytes:
    """Refuse a message, with the tag, as an IRC server does."""
    tag = TAG.search(message)
    return b":irc 421 * " + (tag[0] if tag else b"") + b" :Unknown command"


def in_json(message: bytes) -> bytes:
    """Answer with the tag, and with no error."""
    tag = TAG.search(message)
    return b'{"error": null, "tag": "%s"}' % (tag[0] if tag else b"")


class Chat:
    """A handler: answers the sender, and tells the others.

    :param answer: what the sender gets; None: nothing
    :param tell: whether the others get the message
    :param greeting: what is said first
    :param pause: seconds before an answer
    :param talk: seconds between two messages of others, who are always talking
    :param hides_talk: from those who have not said anything
    """

    def __init__(
        self,
        framing: str,
        answer: Wrap | None,
        *,
        tell: bool = False,
        greeting: bytes = b"",
        pause: float = 0.0,
        talk: float = 0.0,
        hides_talk: bool = False,
        extra: int = 0,
    ) -> None:
        self.members: list[socket.socket] = []
        self.counts: list[int] = []
        self._speakers: set[socket.socket] = set()
        self._framing = framing
        self._answer = answer
        self._tell = tell
        self._greeting = greeting
        self._pause = pause
        self._talk = talk
        self._hides_talk = hides_talk
        self._extra = extra

    def __call__(self, connection: socket.socket) -> None:
        self.members.append(connection)
        self.counts.append(0)
        number = len(self.counts) - 1
        chatter = gevent.spawn(self._chatter, connection) if self._talk else None
        try:
            connection.sendall(self._greeting)
            for message in messages(connection, self._framing, self._extra):
                self.counts[number] += 1
                self._take(connection, message)
        finally:
            self.members.remove(connection)
            if chatter is not None:
                chatter.kill()

    def _take(self, sender: socket.socket, message: bytes) -> None:
        self._speakers.add(sender)
        gevent.sleep(self._pause)
        if self._answer is not None:
            sender.sendall(wrapped(self._framing, self._answer(message), self._extra))
        for member in [member for member in self.members if member is not sender]:
            if self._tell:
                member.sendall(wrapped(self._framing, message, self._extra))

    def _chatter(self, member: socket.socket) -> None:
        number = 0
        while True:
            gevent.sleep(self._talk)
            number += 1
            if self._hides_talk and member not in self._speakers:
                continue
            try:
                member.sendall(wrapped(self._framing, b"bob: %d" % number, self._extra))
            except OSError:
                return


class TellsTwo(Chat):
    """A handler: tells the others all but the third message of a connection."""

    def _take(self, sender: socket.socket, message: bytes) -> None:
        if b".3] " not in message:
            super()._take(sender, message)


def name_first(connection: socket.socket) -> None:
    """Ask for a name, in two parts, and then echo with it."""
    connection.sendall(b"Welcome!\n")
    gevent.sleep(0.05)
    connection.sendall(b"Your name?\n")
    name = b""
    for message in messages(connection, "line"):
        if name:
            connection.sendall(name + b": " + message + b"\n")
        name = name or message[:3]


def wants_crlf(connection: socket.socket) -> None:
    """Echo what ends in both, and complain of each other read."""
    while data := connection.recv(65536):
        connection.sendall(data if data.endswith(b"\r\n") else b"ERR no CRLF\n")


def wants_nul(connection: socket.socket) -> None:
    """Say OK to what ends in NUL, and complain of each other read."""
    while data := connection.recv(65536):
        connection.sendall(b"OK\0" if data.endswith(b"\0") else b"?")


def answers_twice(connection: socket.socket) -> None:
    """Echo two lines, and no more."""
    arriving = messages(connection, "line")
    for line in itertools.islice(arriving, 2):
        connection.sendall(line + b"\n")
    for _ in arriving:
        pass


def complains_and_closes(connection: socket.socket) -> None:
    """Take >I; answer anything else with an error, and close."""
    while data := connection.recv(65536):
        if data[:2] != b"\0\0":
            connection.sendall(b"ERROR bad frame\n")
            return
        connection.sendall(data)


def unended(connection: socket.socket) -> None:
    """Answer lines without ending the answer."""
    for line in messages(connection, "line"):
        connection.sendall(line)


def floods(connection: socket.socket) -> None:
    """Send without an end."""
    while True:
        connection.sendall(b"x" * 65536)


def http_only(connection: socket.socket) -> None:
    """Speak HTTP without a word to what is none, as some servers do."""
    request = b""
    while b"\r\n\r\n" not in request:
        data = connection.recv(65536)
        if not data:
            return
        request += data
    if request.startswith(b"GET / HTTP/"):
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def capitals(message: bytes) -> bytes:
    """Answer in capitals, the tag too."""
    return message.upper()


def in_korean(message: bytes) -> bytes:
    """Answer with the text, as a server does that knows CP949 alone."""
    return message.decode("cp949", "replace").encode("cp949", "replace")


def command(framing: str, echo: str) -> str:
    """Return the beginning of the command that has to be found."""
    options = f"--chat-framing={shlex.quote(framing)} --chat-echo={echo}"
    return f"python locustfile.py {options} 127.0.0.1 "


class Case(NamedTuple):
    """A server, and the beginning of the answer that is right for it."""

    handler: Handler
    answer: str


CASES = {
    # Each framing in each mode. In raw, the mode is tag, as an echo may come in two reads.
    **{
        f"{framing} {mode}": Case(
            Chat(framing, answer, tell=mode == "none"),
            command(framing, "tag" if (framing, mode) == ("raw", "full") else mode),
        )
        for framing in FRAMINGS
        for mode, answer in (
            ("full", repeat),
            ("tag", shout),
            ("any", confirm),
            ("none", None),
        )
    },
    # A prefix that counts itself.
    **{
        f"{framing} counts itself": Case(
            Chat(framing, repeat, extra=struct.calcsize(framing)),
            f"the length prefix ({framing}) counts itself: copy examples/game_header.py",
        )
        for framing in FRAMINGS[4:]
    },
    "sends back what it reads": Case(echo, command("line", "full")),
    "greets": Case(Chat("line", repeat, greeting=b"Welcome!\n"), command("line", "full")),
    "greets without a line end": Case(
        Chat("crlf", shout, greeting=b"\xff\xfd\x01> "), command("crlf", "tag")
    ),
    "greets, then says OK": Case(
        Chat("crlf", confirm, greeting=b"Welcome!\r\n"), command("crlf", "any")
    ),
    "greets in frames": Case(
        Chat("<I", repeat, greeting=wrapped("<I", b"Welcome!")), command("<I", "full")
    ),
    "is slow": Case(Chat("nul", repeat, pause=0.3), command("nul", "full")),
    "is slow to say OK": Case(Chat("line", confirm, pause=0.3), command("line", "any")),
    "is slow to tell others": Case(Chat(">I", None, tell=True, pause=0.3), command(">I", "none")),
    "others talk": Case(Chat("crlf", repeat, talk=0.05), command("crlf", "full")),
    "others talk, tag": Case(Chat(">H", shout, talk=0.3), command(">H", "tag")),
    "others talk, OK": Case(Chat("line", confirm, talk=0.2), command("line", "any")),
    "others talk, none": Case(Chat("line", None, tell=True, talk=0.2), command("line", "none")),
    "others talk, silent": Case(Chat("line", None, talk=0.2), "line: "),
    "others talk to speakers, silent": Case(
        Chat("line", None, talk=0.2, hides_talk=True), "line: "
    ),
    "others talk to speakers, OK": Case(
        Chat("line", confirm, talk=0.2, hides_talk=True), command("line", "any")
    ),
    "capitals for all": Case(Chat("line", capitals), command("line", "any")),
    "another encoding": Case(Chat("line", in_korean), command("line", "tag")),
    "complains of line": Case(wants_crlf, command("crlf", "full")),
    "complains of raw": Case(wants_nul, command("nul", "any")),
    "answers only twice": Case(answers_twice, "line with --chat-echo=full works for some messages"),
    "tells others only twice": Case(
        TellsTwo("line", None, tell=True), "line with --chat-echo=none works for some messages"
    ),
    "complains and closes": Case(complains_and_closes, command(">I", "full")),
    "refuses in JSON": Case(
        Chat("line", always(NOT_JSON)), """the server answers '{"type": "error", "reason": "not"""
    ),
    "wants a login": Case(
        Chat("crlf", always(b"Login first")), "the server answers 'Login first', which looks like"
    ),
    "refuses with the tag": Case(Chat("line", quote), "the server answers ':irc 421 * [d"),
    "says that there is no error": Case(Chat("line", in_json), command("line", "tag")),
    "wants a name": Case(name_first, "line answers from the second text on"),
    "does not end its answers": Case(unended, "line: came '["),
    "silent": Case(silent, "nothing came back"),
    "hangs up": Case(hang_up, "nothing came back: the server hung up"),
    "says full and hangs up": Case(says(b"full\n"), "nothing came back: the server hung up"),
    "floods": Case(floods, "nothing came back: more came than is read"),
    "HTTP without a complaint": Case(http_only, "it is an HTTP server"),
}


COMMANDS_TO_RUN = {
    *(f"{framing} full" for framing in FRAMINGS),
    *(f"line {mode}" for mode in ("tag", "any", "none")),
    *(f"TLS {what}" for what in ("full", "any", "none", "not trusted")),
}


def context_that_asks(certificate: Path, client_authority: Path) -> ssl.SSLContext:
    """Return the context of a server that wants a certificate of its client."""
    context = server_context(certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # later, it is refused after the handshake
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client_authority)
    return context


def tls_cases(folder: Path) -> dict[str, Case]:
    """Return servers with TLS."""
    good = server_context(folder / "good.pem")
    unknown = server_context(folder / "unknown.pem")
    other = server_context(folder / "other.pem")
    expired = server_context(folder / "unknown-expired.pem")
    asking = context_that_asks(folder / "good.pem", folder / "ca.pem")
    return {
        **{
            f"TLS {framing}": Case(
                secure(Chat(framing, shout), good), tls_command(framing, "tag", folder / "ca.pem")
            )
            for framing in FRAMINGS
        },
        "TLS full": Case(
            secure(Chat("crlf", repeat, greeting=b"Welcome!\r\n"), good),
            tls_command("crlf", "full", folder / "ca.pem"),
        ),
        "TLS any": Case(
            secure(Chat("line", confirm), good), tls_command("line", "any", folder / "ca.pem")
        ),
        "TLS none": Case(
            secure(Chat("<H", None, tell=True), good), tls_command("<H", "none", folder / "ca.pem")
        ),
        "TLS not trusted": Case(
            secure(Chat(">I", repeat), unknown), tls_command(">I", "full", Path("ca.pem"))
        ),
        "TLS of another name": Case(
            secure(echo, other), "the TLS certificate is not valid: IP address mis"
        ),
        "TLS not trusted and expired": Case(
            secure(echo, expired),
            "the TLS certificate is not valid: certificate has expired",
        ),
        "TLS for certain clients": Case(
            secure(echo, asking),
            "the server speaks TLS, but TLS failed: ",
        ),
    }


def tls_command(framing: str, echo: str, authority: Path) -> str:
    """Return the beginning of the command that has to be found."""
    options = f"--chat-framing={shlex.quote(framing)} --chat-echo={echo}"
    return f"SSL_CERT_FILE={authority} python locustfile.py {options} --host=tls://127.0.0.1:"


class Result(NamedTuple):
    """What was found out about a server."""

    answer: str
    code: int | None  # of the command, where the answer is one


@pytest.fixture(scope="module")
def cases(certificates: Path) -> dict[str, Case]:
    """Return all servers."""
    return CASES | tls_cases(certificates)


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], certificates: Path) -> Iterator[dict[str, Result]]:
    """Ask all servers at once, as that is mostly waiting, and run some of the commands."""
    servers = {name: Server(case.handler) for name, case in cases.items()}
    running_commands = BoundedSemaphore(2)

    def ask(name: str, address: str) -> Result:
        answer = answer_of(address)
        if name not in COMMANDS_TO_RUN:
            return Result(answer, None)
        with running_commands:
            return Result(answer, code_of(answer, certificates))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        patch.setattr(diagnose, "ANSWER_SECONDS", 0.6)
        locustfile.shared_tls_context.cache_clear()  # it may be there, with other authorities
        asking = {name: gevent.spawn(ask, name, server.address) for name, server in servers.items()}
        yield {name: greenlet.get() for name, greenlet in asking.items()}
    locustfile.shared_tls_context.cache_clear()
    for server in servers.values():
        server.stop()


def answer_of(address: str) -> str:
    """Return the command that is found, or why none is."""
    try:
        return diagnose.diagnose(locustfile.parse_address(address))
    except diagnose.NothingWorks as error:
        return str(error)


def code_of(line: str, certificates: Path) -> int:
    """Run a command as a shell does, with the file that it asks for; return its exit code."""
    line = line.replace("SSL_CERT_FILE=ca.pem", f"SSL_CERT_FILE={certificates / 'unknown-ca.pem'}")
    running = Program("sh", "-c", line, PATH=PATH)
    try:
        return running.ends()
    finally:
        running.kill()


def test_the_answer_is_right_for_each_server(
    cases: dict[str, Case], results: dict[str, Result]
) -> None:
    answers = {name: result.answer for name, result in results.items()}
    wrong = {n: answer for n, answer in answers.items() if not answer.startswith(cases[n].answer)}
    assert not wrong
    assert len(answers) > 60


def test_a_command_of_each_framing_each_mode_and_with_tls_works(results: dict[str, Result]) -> None:
    assert {name: results[name] for name in COMMANDS_TO_RUN if results[name].code != 0} == {}


def test_a_connection_sends_few_messages(results: dict[str, Result]) -> None:
    """The commands send five."""
    chats = [case.handler for case in CASES.values() if isinstance(case.handler, Chat)]
    assert max(max(chat.counts) for chat in chats) == 5


# ------------------------------------------------------------------------------------ the command


def diagnosis(start: Start, *arguments: str, **variables: str) -> Program:
    """Start the command."""
    return start(sys.executable, ROOT / "plugins" / "diagnose.py", *arguments, **variables)


@pytest.mark.together
def test_the_last_line_is_the_command_where_answers_take_a_second(
    start: Start, serve: Serve
) -> None:
    server = serve(Chat("line", repeat, greeting=b"Welcome!\n", pause=1.0))
    asking = diagnosis(start, "127.0.0.1", str(server.port))
    assert asking.ends() == 0
    greeting, seen, confirmed, last = asking.output.splitlines()
    assert greeting == r"greeting: 'Welcome!\n'"
    assert seen.startswith("line: came 'you: [")
    assert confirmed == "line with --chat-echo=full: 3 of 3 messages went well"
    assert last == command("line", "full") + str(server.port)


@pytest.mark.together
def test_a_refused_connection_is_one_line_and_code_1(start: Start) -> None:
    asking = diagnosis(start, "127.0.0.1", str(free_port()))
    assert asking.ends() == 1
    assert asking.output == "no connection: Connection refused\n"


def test_a_name_that_cannot_be_looked_up_is_one_line_and_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert diagnose.main([63 * "가", "12345"]) == 1
    assert capsys.readouterr().out == "no connection: the name cannot be looked up\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one framing be tried, and shorten the waits."""
    monkeypatch.setattr(diagnose, "FRAMINGS", ("line",))
    monkeypatch.setattr(diagnose, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(diagnose, "REST_SECONDS", 0.1)


@pytest.mark.usefixtures("quick")
def test_a_warning_stands_before_a_command_that_takes_any_answer(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(Chat("line", confirm))
    assert diagnose.main(["127.0.0.1", str(server.port)]) == 0
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert warning == (
        "the server answers 'OK' to two different texts. With --chat-echo=any every answer counts "
        "as the echo, an error message too: if that is a refusal, it wants a login or another "
        "protocol: see docs/protocols.md"
    )
    assert last == command("line", "any") + str(server.port)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "is_warned_of"),
    [(in_korean, True), (lambda message: message.replace(b"!", b"?"), False)],
    ids=["another encoding", "other text"],
)
def test_a_server_that_may_have_another_encoding_is_told_before_the_command(
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
    answer: Callable[[bytes], bytes],
    is_warned_of: bool,
) -> None:
    server = serve(Chat("line", answer))
    assert diagnose.main(["127.0.0.1", str(server.port)]) == 0
    *_, warning, last = capsys.readouterr().out.splitlines()
    assert (
        warning.endswith(
            "use --chat-echo=full with --chat-encoding=cp949 or what else the server has"
        )
        == is_warned_of
    )
    assert last == command("line", "tag") + str(server.port)


@pytest.mark.usefixtures("quick")
def test_an_answer_that_looks_like_a_refusal_is_no_command_and_code_1(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(Chat("line", always("먼저 로그인하세요".encode())))
    assert diagnose.main(["127.0.0.1", str(server.port)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no command works: the server answers '먼저 로그인하세요', which looks like a refusal: it "
        "wants a login or another protocol: see docs/protocols.md. This takes refusals for echoes: "
        f"{command('line', 'any')}{server.port}"
    )


@pytest.mark.parametrize(
    "answer",
    ["-ERR", "ERR_NOT_JOINED", "401", '{"code": 500}', "NAK", "Bad request", '{"error": "name"}'],
)
def test_it_looks_like_a_refusal(answer: str) -> None:
    assert diagnose.REFUSAL.search(answer)


@pytest.mark.parametrize(
    "answer",
    ["+OK", "200", "ACK 412", "Noted", '{"error": null}', "250 queued as 550", *diagnose.TEXTS],
)
def test_it_does_not_look_like_a_refusal(answer: str) -> None:
    assert not diagnose.REFUSAL.search(answer)


@pytest.mark.together
def test_an_http_server_is_named_and_code_1(start: Start) -> None:
    server = WSGIServer(("127.0.0.1", 0), lambda _environ, _respond: [], log=None, error_log=None)
    server.start()
    try:
        asking = diagnosis(start, f"127.0.0.1:{server.server_port}")
        assert asking.ends() == 1
    finally:
        server.stop()
    assert asking.output.splitlines()[-1].startswith("no command works: it is an HTTP server")


@pytest.mark.together
def test_what_came_is_escaped_and_cut(start: Start, serve: Serve) -> None:
    def hostile(connection: socket.socket) -> None:
        connection.sendall(b"\x1b[31mred\x07\x00\xe2\x80\xae" + b"x" * 5000)

    asking = diagnosis(start, serve(hostile).address, PYTHONIOENCODING="ascii")
    assert asking.ends() == 1
    assert "\\x1b[31mred\\x07\\x00\\u202exxx" in asking.output
    assert not set(asking.output) & set("\x1b\x07\x00\u202e")
    assert max(map(len, asking.output.splitlines())) < 200


@pytest.mark.parametrize(
    "arguments", [(), ("localhost",), ("localhost", "0"), ("::1", "1"), ("a", "1", "2"), ("--x",)]
)
def test_wrong_arguments_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ending:
        diagnose.main(list(arguments))
    assert ending.value.code == 2
    assert re.fullmatch(r".+: error: .+\n", capsys.readouterr().err)


@pytest.mark.together
def test_tls_that_is_asked_for_and_not_spoken_is_code_1(start: Start, serve: Serve) -> None:
    asking = diagnosis(start, f"tls://{serve(echo).address}")
    assert asking.ends() == 1
    assert asking.output.splitlines()[-1] == "no command works: the server does not speak TLS"


@pytest.mark.together
def test_an_interrupt_ends_it_quietly(start: Start, serve: Serve) -> None:
    asking = diagnosis(start, serve(Chat("line", None, greeting=b"Welcome!\n")).address)
    asking.prints("greeting: ")
    assert asking.interrupt() == 130
    assert "Traceback" not in asking.output


def test_an_ipv6_address_stands_in_brackets() -> None:
    server = diagnose.Server("::1", 12345)
    assert server.command(">I", "tag") == (
        "python locustfile.py --chat-framing='>I' --chat-echo=tag '[::1]' 12345"
    )
