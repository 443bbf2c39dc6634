r"""Find out what a chat server speaks, and print the command that talks to it.

    python plugins/diagnose.py localhost 12345
    python plugins/diagnose.py tls://chat.example.com:6697

It listens for a greeting; tries TLS where the server hangs up on plain text; and then the framings
``line``, ``crlf``, ``raw``, ``nul``, length prefixes of 2 and 4 bytes in both byte orders, and such
that count themselves; last HTTP. The tries follow one another, each on connections of its own: one
sends at most two short texts and waits for answers, a second one listens, as some servers send a
message to all but its sender. Each reads at most 256 KiB. All of them take a minute or two.

Each try prints a line: what came, escaped and cut. The last line is the answer, the command to run
in the folder of ``locustfile.py``::

    python locustfile.py --chat-framing=crlf --chat-echo=full localhost 12345

By then the client of ``locustfile.py`` has sent three messages in this framing and echo mode, and
has got the echo of each; in mode ``none``, the second connection has heard each. Where the
certificate of a TLS server is not trusted, ``SSL_CERT_FILE=ca.pem`` stands before the command:
write the file of its authority there.

Limits: where a server accepts ``\n`` and ``\r\n``, the answer is ``line``. With ``raw`` an echo may
come in two reads, so the mode is ``tag``; it is too where a server changes characters, maybe as it
has another encoding (``--chat-encoding``). An answer that takes over two seconds is not seen.
Whether a server cuts or refuses long messages is seen only by running the command. One that neither
answers nor passes a message on cannot be told from one that speaks something else.

Exit code: 0 where a command works, 1 where none does, 2 for wrong arguments.
"""

from __future__ import annotations

from locust.event import EventHook  # isort: skip  # first: it replaces blocking calls with gevent's

import argparse
import functools
import io
import os
import random
import shlex
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple, NoReturn

import gevent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import locustfile

CONNECT_SECONDS = 5.0  # at most, for look-up, TCP and TLS
ANSWER_SECONDS = 2.0  # how long a greeting or an answer is awaited
REST_SECONDS = 0.3  # how long the rest of it is awaited
BYTES_LIMIT = 256 * 1024  # read from one connection
UNKNOWN_AUTHORITY = "ca.pem"  # what stands in the command, to be replaced
SHOWN = 60  # characters of what came
PREFIXES = (">H", "<H", ">I", "<I")
SELF_COUNTING = "self-counting "
# The order matters: a server that sends back whatever it reads passes for any framing after raw,
# and to a server with >H, a message of >I is an empty one and a whole one.
FRAMINGS = ("line", "crlf", "raw", "nul", *PREFIXES, *(SELF_COUNTING + p for p in PREFIXES))
# The second has what servers lose or escape. No length, prefix included, is that of a line end.
TEXTS = ("Hello, everyone!", "안녕하세요 👋 & < > \" ' \\ %")
HTTP_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
HTTP = "it is an HTTP server; a chat over WebSocket needs a client of its own"
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

    def command(self, framing: str, echo: str) -> str:
        """Return the command that talks to it, quoted for a shell."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        options = f"--chat-framing={shlex.quote(framing)} --chat-echo={echo}"
        if self.tls is None:
            return f"python locustfile.py {options} {shlex.quote(host)} {self.port}"
        address = shlex.quote(f"tls://{host}:{self.port}")
        variable = f"SSL_CERT_FILE={shlex.quote(self.authorities)} " if self.authorities else ""
        return f"{variable}python locustfile.py {options} --host={address}"


def open_socket(server: Server) -> socket.socket:
    """Return a connected socket; raise ``OSError`` where there is no connection."""
    with gevent.Timeout(CONNECT_SECONDS, TimeoutError("no connection within 5 seconds")):
        sock = socket.create_connection((server.host, server.port))
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
    try:
        text: str | bytes = data.decode()
    except UnicodeDecodeError:
        text = data
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
            self.end = self._read(self._socket)
        except OSError as error:
            self.end = reason_of(error)

    def _read(self, sock: socket.socket) -> str:
        """Keep what comes; return why no more is read."""
        while len(self.received) < BYTES_LIMIT:
            data = sock.recv(4096)
            if not data:
                return "the server hung up"
            self.received += data
            try:
                self.messages += self._framing.feed(data)
            except (locustfile.ChatError, ValueError):
                return "its length is impossible in this framing"
        return "more came than is read"

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

    def count_of(self, tag: bytes) -> int:
        """Return how often a tag stands in the messages."""
        return sum(message.count(tag) for message in self.messages)


# ------------------------------------------------------------------------------ TLS, greeting, HTTP


def find_tls(address: locustfile.Address) -> Server | None:
    """Return the server with what TLS needs; None where it does not speak TLS.

    :raises NothingWorks: where it speaks TLS, but no connection can be had
    """
    plain = Server(address.host, address.port)
    try:
        certificate = handshake(plain, context_without_checks())
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
    return plain._replace(tls=trusting_it, authorities=UNKNOWN_AUTHORITY)


def handshake(server: Server, context: ssl.SSLContext) -> bytes:
    """Return the certificate of a TLS server; raise ``OSError`` where the handshake fails."""
    with open_socket(server._replace(tls=lambda: context)) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        return sock.getpeercert(binary_form=True) or b""


def context_without_checks() -> ssl.SSLContext:
    """Return a context that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def context_that_trusts(certificate: bytes) -> ssl.SSLContext:
    """Return a context that trusts one certificate, and still checks its name and its dates."""
    context = ssl.create_default_context(cadata=certificate)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    return context


def greeting_of(server: Server) -> bytes:
    """Return what the server says before it has been sent anything."""
    with Probe(server, locustfile.RawFraming()) as probe:
        probe.wait(ANSWER_SECONDS, lambda: probe.received)
        probe.wait(REST_SECONDS)
        print(f"greeting: {escaped(probe.received)}" if probe.received else "greeting: none")
        return probe.received


def hangs_up_on_text(server: Server) -> bool:
    """Return whether plain text ends the connection, as it does where TLS is spoken."""
    with Probe(server, locustfile.RawFraming()) as probe:
        probe.send(b"hello\r\n")
        probe.wait(ANSWER_SECONDS, lambda: probe.received)
        probe.wait(REST_SECONDS)  # a TLS alert comes first
        return bool(probe.end)


def speaks_http(server: Server) -> bool:
    """Return whether a request gets an answer of HTTP."""
    with Probe(server, locustfile.RawFraming()) as probe:
        probe.send(HTTP_REQUEST)
        probe.wait(ANSWER_SECONDS, lambda: len(probe.received) >= len("HTTP/"))
        return probe.received.startswith(b"HTTP/")


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
        while len(self._buffer) >= self._length.size:
            (length,) = self._length.unpack_from(self._buffer)
            if length < self._length.size:
                raise ValueError("the length is less than that of its prefix")
            if len(self._buffer) < length:
                return
            yield self._buffer[self._length.size : length]
            self._buffer = self._buffer[length:]


def new_framing(name: str) -> locustfile.Framing:
    """Return a framing for one connection, by its name in FRAMINGS."""
    if name.startswith(SELF_COUNTING):
        return SelfCountingFraming(name.removeprefix(SELF_COUNTING))
    return locustfile.parse_framing(name)()


class Exchange(NamedTuple):
    """One text that was sent, and what came of it."""

    text: bytes
    tag: bytes
    answers: list[bytes]  # all that came until the next text
    is_broadcast: bool  # the listening connection has got it

    @property
    def mode(self) -> str:
        """The strictest echo mode that accepts what came."""
        for answer in self.answers:
            if self.tag in answer:
                return "full" if self.text in answer else "tag"
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
        if self._is_answered():
            return "any"
        return "none" if all(exchange.is_broadcast for exchange in self.exchanges) else None

    def _is_answered(self) -> bool:
        """Return whether each text was answered, and what came is not the talk of others."""
        answers = [set(exchange.answers) for exchange in self.exchanges]
        if self.unsolicited or self.exchanges[-1].is_broadcast:
            # Others talk, or could: what the listening connection has got, too, is no answer.
            answers = [messages.difference(self.overheard) for messages in answers]
        others_talk = set(self.unsolicited).difference(self.overheard)
        if others_talk:  # only an answer that is always the same can be told from it
            return bool(set.intersection(*answers) - others_talk)
        return all(answers)

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
    with Probe(server, new_framing(framing)) as talker:
        with Probe(server, new_framing(framing)) as listener:
            if has_greeting:
                talker.wait(ANSWER_SECONDS, lambda: talker.received)
            talker.wait(REST_SECONDS)
            start = len(talker.received)
            for number, text in enumerate(TEXTS, 1):
                exchange = say(talker, listener, framing, f"{identity}.{number}", text)
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


def say(talker: Probe, listener: Probe, framing: str, tag: str, text: str) -> Exchange:
    """Send a text, and return it with what came until its tag did, or the time was over."""
    identifier = tag.encode()
    payload = f"[{tag}] {text}".encode()
    count = len(talker.messages)
    talker.send(new_framing(framing).encode(payload))
    talker.wait(ANSWER_SECONDS, lambda: talker.count_of(identifier))
    return Exchange(payload, identifier, talker.messages[count:], listener.count_of(identifier) > 0)


def works(server: Server, framing: str, mode: str) -> bool:
    """Return whether the client of ``locustfile.py`` gets what it awaits for three messages."""
    texts = locustfile.SHORT_TEXTS[:3]
    client = locustfile.TCPSocketClient(
        server.host,
        server.port,
        EventHook(),
        framing=framing,
        echo=locustfile.parse_echo(mode),
        tls=server.tls,
    )
    try:
        if mode != "none":
            return all(client.send_chat(text, wait=True) is not None for text in texts)
        with Probe(server, new_framing(framing)) as listener:
            return all(others_get(client, text, listener) for text in texts)
    finally:
        client.close()


def others_get(client: locustfile.TCPSocketClient, text: str, listener: Probe) -> bool:
    """Send a message; return whether another connection gets it."""
    identity = client.identity.encode()
    count = listener.count_of(identity)
    client.send_chat(text, wait=True)
    listener.wait(ANSWER_SECONDS, lambda: listener.count_of(identity) > count)
    return listener.count_of(identity) > count


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
    if address.tls or (not greeting and hangs_up_on_text(server)):
        tls_server = find_tls(address)
        print(f"TLS: {'no' if tls_server is None else 'yes'}")
        if tls_server is not None:
            server = tls_server
            greeting = greeting_of(server)
        elif address.tls:
            raise NothingWorks("the server does not speak TLS")
    if server.authorities == UNKNOWN_AUTHORITY:
        print("its certificate is not trusted: name the file of its authority in SSL_CERT_FILE")
    return try_framings(server, bool(greeting))


def try_framings(server: Server, has_greeting: bool) -> str:
    """Print what comes in each framing; return the command that works."""
    trials: list[Trial] = []
    for framing in FRAMINGS:
        trial = try_framing(server, framing, has_greeting)
        print(f"{framing}: {trial.describe()}")
        if trial.received.startswith(b"HTTP/"):
            raise NothingWorks(HTTP)
        if trial.mode in ("full", "tag", "none") and is_confirmed(server, trial):
            return server.command(framing, str(trial.mode))
        trials.append(trial)
    if speaks_http(server):
        raise NothingWorks(HTTP)
    # What has no tag may be a complaint about the framing: so it counts only now, raw last.
    for trial in sorted(trials, key=lambda trial: trial.framing == "raw"):
        if trial.mode == "any" and is_confirmed(server, trial):
            print("any answer counts as the echo, a complaint too: see what came")
            return server.command(trial.framing, "any")
    raise NothingWorks(what_came(trials))


def is_confirmed(server: Server, trial: Trial) -> bool:
    """Return whether what was seen in a trial works with the client, and print it."""
    if trial.framing.startswith(SELF_COUNTING):
        raise NothingWorks(
            f"the length prefix ({trial.framing.removeprefix(SELF_COUNTING)}) counts itself: "
            "copy examples/game_header.py"
        )
    is_good = works(server, trial.framing, str(trial.mode))
    result = "all went well" if is_good else "not all went well"
    print(f"{trial.framing} with --chat-echo={trial.mode}: three messages, {result}")
    return is_good


def what_came(trials: list[Trial]) -> str:
    """Return what came instead of answers."""
    for trial in trials:
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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Print what was seen, and last the answer; return the exit code."""
    parser = Parser(description="Find out what a TCP chat server speaks.")
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
    except (NothingWorks, OSError) as error:
        print(f"no command works: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
