r"""Find out what a chat server speaks, and print the command that talks to it.

    python plugins/diagnose.py localhost 12345
    python plugins/diagnose.py tls://chat.example.com:6697

It listens for a greeting; tries TLS where the server hangs up on plain text; and then the framings
``line``, ``crlf``, ``raw``, ``nul``, length prefixes of 2 and 4 bytes in both byte orders, and such
that count themselves; last HTTP. Each try has two connections: one sends at most two short texts
and waits for answers, one listens, as some servers send a message to all but its sender. Each reads
at most 256 KiB. All of them take a minute or two.

Each try prints a line: what came, escaped and cut. The last line is the command to run in the
folder of ``locustfile.py``, or ``no command works: …``, or ``no connection: …``::

    python locustfile.py --chat-framing=crlf --chat-echo=full localhost 12345

By then its client has got the echo of three messages; in mode ``none``, the second connection has
heard each. Where the certificate of a TLS server is not trusted, ``SSL_CERT_FILE=ca.pem`` stands
before the command: write the file of its authority there.

Limits: an answer with words of an error or of a login counts as a refusal (``REFUSAL``), which is
no echo. Another one may be a refusal, too: with ``--chat-echo=any``, see what it says. Where a
server accepts ``\n`` and ``\r\n``, the answer is ``line``. The mode is ``tag`` with ``raw``, as an
echo may come in two reads, and where a server changes characters. Where what it sends is no UTF-8,
a line says so: the server may have another encoding (``--chat-encoding``). An answer that takes
over two seconds is not seen. A server that neither answers nor passes a message on cannot be told
from one that speaks something else.

Exit code: 0 where a command works, 1 where none does, 2 for wrong arguments.
"""

from __future__ import annotations

from locust.event import EventHook  # isort: skip  # first: it replaces blocking calls with gevent's

import argparse
import functools
import io
import os
import random
import re
import shlex
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import gevent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import locustfile

CONNECT_SECONDS = 5.0  # at most, for look-up, TCP and TLS
ANSWER_SECONDS = 2.0  # how long a greeting or an answer is awaited
REST_SECONDS = 0.3  # how long the rest of it is awaited
BYTES_LIMIT = 256 * 1024  # read from one connection
SHOWN = 60  # characters of what came
PREFIXES = (">H", "<H", ">I", "<I")
SELF_COUNTING = "self-counting "
# The order matters: a server that sends back whatever it reads passes for any framing after raw,
# and to a server with >H, a message of >I is an empty one and a whole one.
FRAMINGS = ("line", "crlf", "raw", "nul", *PREFIXES, *(SELF_COUNTING + p for p in PREFIXES))
# The second has what servers lose or escape. No length, prefix included, is that of a line end.
TEXTS = ("Hello, everyone!", "안녕하세요 👋 & < > \" ' \\ %")
OTHER_ENCODING = (
    "the text came back as no UTF-8, as from a server with another encoding: to have more than its "
    "tag looked at, use --chat-echo=full with --chat-encoding=cp949 or what else the server has"
)
HTTP_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
# What stands in an answer that refuses, not in TEXTS. "error": null is none.
REFUSAL = re.compile(
    r"error(?!s?\W*(null|none|false|0)\b)|login|password|unknown|invalid|denied|refused|reject|fail"
    r"|forbidden|unauthori|authenticat|오류|에러|로그인|거부|실패|인증|잘못|알 수 없"
    r"|(?<![a-z])(err|not|bad|must|cannot|can't|nak|nack|log in|sign in)(?![a-z])"
    r"|(^|code|status)\W*[45]\d\d\b",
    re.IGNORECASE,
)
HTTP = "it is an HTTP server; a chat over WebSocket needs a client of its own"
EXAMPLE = "copy examples/game_header.py"
REMEDY = "it wants a login or another protocol: see docs/protocols.md"
NOTHING = (
    "nothing came back. If the server only takes messages, use --chat-echo=none; "
    "if it wants a login first, write on_connect"
)


class NothingWorks(Exception):
    """There is no command to print. The text says why."""


# ----------------------------------------------------------------------------------- a connection


class Server(NamedTuple):
    """Where the server is, and how to connect to it."""

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None
    authorities: str = ""  # what the command sets SSL_CERT_FILE to

    def command(self, framing: str, echo: str | None) -> str:
        """Return the command that talks to it, quoted for a shell."""
        host = locustfile.bracketed(self.host)
        options = f"--chat-framing={shlex.quote(framing)} --chat-echo={echo}"
        if self.tls is None:
            return f"python locustfile.py {options} {shlex.quote(host)} {self.port}"
        address = f"tls://{host}:{self.port}"
        command = f"python locustfile.py {options} --host={shlex.quote(address)}"
        if self.authorities:
            return f"SSL_CERT_FILE={shlex.quote(self.authorities)} {command}"
        return command


def open_socket(server: Server) -> socket.socket:
    """Return a connected socket; raise ``OSError`` where there is no connection."""
    with gevent.Timeout(CONNECT_SECONDS, TimeoutError("the time-out of 5 seconds is over")):
        try:
            sock = socket.create_connection((server.host, server.port))
        except UnicodeError:  # longer than a name can be
            raise OSError("the name cannot be looked up") from None
        if server.tls is None:
            return sock
        with sock:  # closed where the handshake fails, else empty by then
            return server.tls().wrap_socket(sock, server_hostname=server.host)


def reason_of(error: OSError) -> str:
    """Return why a connection has ended, without a byte that the server sent."""
    if isinstance(error, (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)):
        return "the server hung up"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS failed: {error.reason}"
    return error.strerror or str(error)


def escaped(data: bytes) -> str:
    """Return bytes of the server as they may be printed: escaped and cut."""
    text = data.decode(errors="backslashreplace")
    return repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")


class Probe:
    """A connection whose bytes and messages are kept until it ends or too much has come."""

    def __init__(self, server: Server, framing: locustfile.Framing) -> None:
        self.received = b""
        self.messages: list[bytes] = []
        self.end = ""  # why it has ended; empty while it has not
        self._server = server
        self._framing = framing
        self._socket: socket.socket | None = None
        self._reader = gevent.spawn(self._run)

    def __enter__(self) -> Probe:
        self.wait(CONNECT_SECONDS, lambda: self._socket is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.kill()
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        try:
            self._socket = open_socket(self._server)
            while not self.end:
                self.end = self._take(self._socket.recv(4096))
        except OSError as error:
            self.end = reason_of(error)

    def _take(self, data: bytes) -> str:
        """Keep what came; return why no more is read, if so."""
        if not data:
            return "the server hung up"
        self.received += data
        try:
            self.messages += self._framing.feed(data)
        except (locustfile.ChatError, ValueError):
            return "its length is impossible in this framing"
        return "more came than is read" if len(self.received) >= BYTES_LIMIT else ""

    def send(self, data: bytes) -> None:
        """Send bytes, unless the connection has ended."""
        try:
            if self._socket is not None and not self.end:
                self._socket.sendall(data)
        except OSError as error:
            self.end = self.end or reason_of(error)

    def wait(self, seconds: float, condition: Callable[[], object] = lambda: False) -> None:
        """Wait until a condition is true or the connection has ended, at most so many seconds."""
        limit = monotonic() + seconds
        while not self.end and not condition() and monotonic() < limit:
            gevent.sleep(0.01)

    def has(self, tag: bytes) -> bool:
        """Return whether a tag stands in a message."""
        return any(tag in message for message in self.messages)


def ask(server: Server, data: bytes = b"") -> Probe:
    """Return a connection that has ended, with what came after it was opened and sent data."""
    with Probe(server, locustfile.RawFraming()) as probe:
        probe.send(data)
        probe.wait(ANSWER_SECONDS, lambda: probe.received)
        probe.wait(REST_SECONDS)
        return probe


# -------------------------------------------------------------------------------------------- TLS


def find_tls(plain: Server) -> Server | None:
    """Return the server with what TLS needs; None where it does not speak TLS.

    :raises NothingWorks: where it speaks TLS, but no connection can be had
    """
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    try:
        certificate = handshake(plain, unchecked)
    except OSError as error:
        reason = str(getattr(error, "reason", ""))
        if "ALERT" in reason or "UNSUPPORTED_PROTOCOL" in reason:
            raise NothingWorks(f"the server speaks TLS, but {reason_of(error)}") from None
        return None
    try:
        handshake(plain, ssl.create_default_context())
        authorities = os.environ.get("SSL_CERT_FILE", "")
        return plain._replace(tls=ssl.create_default_context, authorities=authorities)
    except ssl.SSLCertVerificationError:
        trusting_it = functools.partial(context_that_trusts, certificate)
    try:
        handshake(plain, trusting_it())
    except ssl.SSLCertVerificationError as error:
        raise NothingWorks(f"the TLS certificate is not valid: {error.verify_message}") from None
    print("its certificate is not trusted: name the file of its authority in SSL_CERT_FILE")
    return plain._replace(tls=trusting_it, authorities="ca.pem")


def handshake(server: Server, context: ssl.SSLContext) -> bytes:
    """Return the certificate of a TLS server; raise ``OSError`` where the handshake fails."""
    with open_socket(server._replace(tls=lambda: context)) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        return sock.getpeercert(binary_form=True) or b""


def context_that_trusts(certificate: bytes) -> ssl.SSLContext:
    """Return a context that trusts one certificate, and still checks its name and its dates."""
    context = ssl.create_default_context(cadata=certificate)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    return context


# ----------------------------------------------------------------------------------- one framing


class SelfCountingFraming:
    """A length prefix that counts itself: ``examples/game_header.py`` has it, no option does."""

    def __init__(self, length_format: str) -> None:
        self._length = struct.Struct(length_format)
        self._buffer = b""

    def encode(self, payload: bytes) -> bytes:
        """Return prefix and payload."""
        return self._length.pack(self._length.size + len(payload)) + payload

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the payloads that data completes; raise ``ValueError`` for an impossible length."""
        self._buffer += data
        start = self._length.size
        while len(self._buffer) >= start:
            (end,) = self._length.unpack_from(self._buffer)
            if end < start:
                raise ValueError("the length is less than that of its prefix")
            if len(self._buffer) < end:
                return
            yield self._buffer[start:end]
            self._buffer = self._buffer[end:]


def new_framing(name: str) -> locustfile.Framing:
    """Return a framing for one connection, by its name in FRAMINGS."""
    if name.startswith(SELF_COUNTING):
        return SelfCountingFraming(name.removeprefix(SELF_COUNTING))
    return locustfile.parse_framing(name)()


class Exchange(NamedTuple):
    """One text that was sent, and what came of it."""

    payload: bytes
    tag: bytes
    answers: list[bytes]  # all that came until the next text
    is_broadcast: bool  # the listening connection has got it

    @property
    def mode(self) -> str:
        """The strictest echo mode that accepts what came."""
        for answer in self.answers:
            if self.tag in answer:
                return "full" if self.payload in answer else "tag"
        return "any" if self.answers else "none"


class Trial(NamedTuple):
    """What came in one framing."""

    framing: str
    exchanges: list[Exchange]
    unsolicited: list[bytes]  # what came while nothing was said
    overheard: list[bytes]  # what the listening connection has got
    received: bytes
    end: str  # why the connection has ended; empty where it has not

    @property
    def mode(self) -> str | None:
        """The echo mode that accepts what came; None where none does."""
        modes = {exchange.mode for exchange in self.exchanges}
        if len(self.exchanges) < len(TEXTS):
            return None
        if modes <= {"full", "tag"}:
            return "full" if modes == {"full"} and self.framing != "raw" else "tag"
        if all(self.answers()):
            return "any"
        return "none" if all(exchange.is_broadcast for exchange in self.exchanges) else None

    def answers(self) -> list[list[bytes]]:
        """Return what each text was answered with, without the talk of others."""
        answers = [exchange.answers for exchange in self.exchanges]
        if self.unsolicited or self.exchanges[-1].is_broadcast:
            # Others talk, or could: what the listening connection has got, too, is no answer.
            answers = [[m for m in messages if m not in self.overheard] for messages in answers]
        others_talk = set(self.unsolicited).difference(self.overheard)
        if others_talk:  # only an answer that is always the same can be told from it
            same = set.intersection(*map(set, answers)) - others_talk
            return [list(same) for _ in answers]
        return answers

    def refusal(self) -> bytes | None:
        """Return an answer that the mode takes for an echo, but that looks like a refusal."""
        if self.mode is None:
            return None
        for exchange, answers in zip(self.exchanges, self.answers(), strict=True):
            for answer in answers:
                is_echo = self.mode == "any" or exchange.tag in answer
                text = answer.decode(errors="replace")
                if is_echo and REFUSAL.search(text):
                    return answer
        return None

    def has_other_encoding(self) -> bool:
        """Return whether a text came back with its tag, and as no UTF-8."""
        for exchange in self.exchanges:
            for answer in exchange.answers:
                if exchange.tag in answer and not locustfile.is_valid(answer, "utf-8"):
                    return True
        return False

    def describe(self) -> str:
        """Say what came."""
        parts = [f"came {escaped(self.received)}" if self.received else "nothing came"]
        if self.received and not any(exchange.answers for exchange in self.exchanges):
            parts.append("no whole message")
        if any(exchange.is_broadcast for exchange in self.exchanges):
            parts.append("others got what was sent")
        if self.end:
            parts.append(self.end)
        return ", ".join(parts)


def try_framing(server: Server, framing: str, has_greeting: bool) -> Trial:
    """Send one or two texts in a framing, and return what came."""
    identity = f"d{random.getrandbits(28):07x}"  # a letter in it shows who changes its case
    exchanges: list[Exchange] = []
    unsolicited: list[bytes] = []
    talker = Probe(server, new_framing(framing))
    listener = Probe(server, new_framing(framing))
    with talker, listener:
        if has_greeting:
            talker.wait(ANSWER_SECONDS, lambda: talker.received)
        talker.wait(REST_SECONDS)
        start = len(talker.received)
        for number, text in enumerate(TEXTS, 1):
            tag = f"{identity}.{number}".encode()
            payload = b"[%s] %s" % (tag, text.encode())
            exchange = say(talker, listener, framing, tag, payload)
            exchanges.append(exchange)
            if not exchange.answers and not exchange.is_broadcast and not has_greeting:
                break  # a server that greets may have taken the first text as a name
        received = talker.received[start:]
        if any(exchange.mode == "any" for exchange in exchanges):
            count = len(talker.messages)
            talker.wait(ANSWER_SECONDS)
            unsolicited = talker.messages[count:]
            gevent.sleep(REST_SECONDS)  # the listener may get it a little later
    return Trial(framing, exchanges, unsolicited, listener.messages, received, talker.end)


def say(talker: Probe, listener: Probe, framing: str, tag: bytes, payload: bytes) -> Exchange:
    """Send a text, and return it with what came until its tag did, or the time was over."""
    count = len(talker.messages)
    talker.send(new_framing(framing).encode(payload))
    talker.wait(ANSWER_SECONDS, lambda: talker.has(tag))
    return Exchange(payload, tag, talker.messages[count:], listener.has(tag))


def works(server: Server, trial: Trial) -> bool:
    """Return whether the client gets what a trial has seen, for three messages; print it."""
    if trial.mode is None or trial.refusal() is not None:
        return False
    client = locustfile.TCPSocketClient(
        server.host,
        server.port,
        EventHook(),
        framing=trial.framing,
        echo=locustfile.parse_echo(trial.mode),
        tls=server.tls,
    )
    good = 0
    with Probe(server, new_framing(trial.framing)) as listener:
        for number, text in enumerate(locustfile.SHORT_TEXTS[:3], 1):
            echo = client.send_chat(text, wait=True)
            if trial.mode == "none":
                tag = f"{client.identity}.{number}".encode()
                listener.wait(ANSWER_SECONDS, functools.partial(listener.has, tag))
                good += listener.has(tag)
            else:
                good += echo is not None
    client.close()
    print(f"{trial.framing} with --chat-echo={trial.mode}: {good} of 3 messages went well")
    return good == 3


# ------------------------------------------------------------------------------------- the answer


def diagnose(address: locustfile.Address) -> str:
    """Print what the server does; return the command that works.

    :raises NothingWorks: where none does
    :raises OSError: where there is no connection
    """
    server = Server(address.host, address.port)
    open_socket(server).close()
    greeting = b"" if address.tls else greeting_of(server)
    # A server with TLS does not speak first. One without gets no handshake, which it could take for
    # many messages.
    if address.tls or (not greeting and ask(server, b"hello\r\n").end):
        tls_server = find_tls(server)
        print(f"TLS: {'no' if tls_server is None else 'yes'}")
        if tls_server is not None:
            server = tls_server
            greeting = greeting_of(server)
        elif address.tls:
            raise NothingWorks("the server does not speak TLS")
    return try_framings(server, bool(greeting))


def greeting_of(server: Server) -> bytes:
    """Return what the server says before it has been sent anything, and print it."""
    greeting = ask(server).received
    print(f"greeting: {escaped(greeting) if greeting else 'none'}")
    return greeting


def try_framings(server: Server, has_greeting: bool) -> str:
    """Print what comes in each framing; return the command that works."""
    trials: list[Trial] = []
    for framing in FRAMINGS:
        trial = try_framing(server, framing, has_greeting)
        print(f"{framing}: {trial.describe()}")
        if trial.received.startswith(b"HTTP/"):
            raise NothingWorks(HTTP)
        if trial.mode is not None and framing.startswith(SELF_COUNTING):
            prefix = framing.removeprefix(SELF_COUNTING)
            raise NothingWorks(f"the length prefix ({prefix}) counts itself: {EXAMPLE}")
        if trial.mode != "any" and works(server, trial):
            if trial.mode == "tag" and trial.has_other_encoding():
                print(OTHER_ENCODING)
            return server.command(trial.framing, trial.mode)
        trials.append(trial)
    if ask(server, HTTP_REQUEST).received.startswith(b"HTTP/"):
        raise NothingWorks(HTTP)
    # What has no tag may be a complaint about the framing: so it counts only now, raw last.
    trials.sort(key=lambda trial: trial.framing == "raw")
    for trial in trials:
        if trial.mode == "any" and works(server, trial):
            print(warning_of(trial))
            return server.command(trial.framing, trial.mode)
    raise NothingWorks(what_came(server, trials))


def warning_of(trial: Trial) -> str:
    """Return what to know before any answer counts as the echo."""
    shown = dict.fromkeys(escaped(answers[0]) for answers in trial.answers())
    return (
        f"the server answers {' and '.join(shown)} to two different texts. "
        "With --chat-echo=any every answer counts as the echo, an error message too: "
        f"if that is a refusal, {REMEDY}"
    )


def what_came(server: Server, trials: list[Trial]) -> str:
    """Return what came instead of answers."""
    for trial in trials:
        refusal = trial.refusal()
        if refusal is not None:
            return (
                f"the server answers {escaped(refusal)}, which looks like a refusal: {REMEDY}. "
                f"This takes refusals for echoes: {server.command(trial.framing, trial.mode)}"
            )
        if trial.mode is not None:
            return f"{trial.framing} with --chat-echo={trial.mode} works for some messages only"
        if trial.exchanges[0].mode == "none" and trial.exchanges[-1].mode != "none":
            return f"{trial.framing} answers from the second text on: for a login, write on_connect"
    for trial in trials:
        if trial.received:
            return f"{trial.framing}: {trial.describe()}"
    if trials[0].end:
        return f"nothing came back: {trials[0].end}"
    return NOTHING


# ------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    """Print what was seen, and last the answer; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Find out what a TCP chat server speaks: diagnose.py host port",
        usage=argparse.SUPPRESS,  # so that an error is one line
    )
    parser.add_argument("host", help="host, host:port or tls://host:port")
    parser.add_argument("port", nargs="?")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know Korean
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        address = locustfile.parse_address(options.host, options.port)
    except locustfile.SettingError as error:
        parser.error(str(error))
    try:
        print(diagnose(address))
    except NothingWorks as error:
        print(f"no command works: {error}")
        return 1
    except OSError as error:
        print(f"no connection: {reason_of(error)}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
