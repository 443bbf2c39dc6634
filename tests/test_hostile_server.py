"""The client against servers that answer in any way at all, over real sockets.

hypothesis writes what the server does: echoes that are cut, swapped, repeated, altered and mixed
with garbage and with others' messages, in pieces of any size, until the connection ends at any
byte. What has to come of it is worked out here once more, from the bytes that the server sent.

``HOSTILE_CASES`` says how many cases are tried in all, then chosen anew in each run::

    HOSTILE_CASES=100000 python -m pytest --timeout 0 tests/test_hostile_server.py

A case takes some 5 ms; as hypothesis keeps what it has tried, these take 400 MB.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gevent
import pytest
from clients import hooks_with
from gevent.event import Event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from locust.event import EventHook
from rows import Rows
from servers import Server, echo, lines, reset

import locustfile
from locustfile import (
    ConnectionClosed,
    Echo,
    EchoAltered,
    EchoMode,
    EchoTruncated,
    TCPSocketClient,
)

CASES = int(os.environ.get("HOSTILE_CASES", "2000"))
MOST = 6  # messages in flight
ATTEMPTS = 1000  # to be echoed after the worst, where the time-out is short

any_case = settings(
    max_examples=max(1, CASES // 2),
    deadline=None,
    database=None,
    derandomize="HOSTILE_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


# ---------------------------------------------------------------------------- what is sent and done


def is_ok(payload: bytes) -> bool:
    """Return whether a line says OK: the function that some messages have as echo."""
    return payload.startswith(b"OK")


class Message(NamedTuple):
    """A message of the client."""

    text: str
    echo: EchoMode | Callable[[bytes], bool]
    wait: bool

    @property
    def is_tagged(self) -> bool:
        return not (callable(self.echo) or self.echo == "any" or self.text.startswith("/"))

    def accepts(self, line: bytes, has_own_tag: bool) -> bool:
        """Return whether a line answers this message, which is untagged."""
        if callable(self.echo):
            return self.echo(line)
        return not has_own_tag


class Deed(NamedTuple):
    """One thing that the server does with a line that it has received."""

    what: str
    line: int
    place: int
    garbage: bytes

    def bytes_of(self, received: list[bytes]) -> bytes:
        """Return what the server sends."""
        line = received[self.line % len(received)]
        place = self.place % (len(line) + 1)
        others_line = re.sub(rb"[0-9a-f]{8}\.", b"00000000.", line)
        sent = {
            "echo": line + b"\n",
            "echo in other text": b"<bob> " + line + b" (now)\r\n",
            "echo without an end": line,
            "cut echo": line[:place] + b"\n",
            "altered echo": line[:place] + self.garbage + line[place + 1 :] + b"\n",
            "another's message": others_line + b"\n",
            "a tag that was never given": re.sub(rb"(\.\d+)\]", rb"\g<1>7]", line) + b"\n",
            "OK": b"OK\n",
            "garbage": self.garbage,
            "garbage line": self.garbage + b"\n",
        }
        return sent[self.what]


DEEDS = [
    "echo",
    "echo in other text",
    "echo without an end",
    "cut echo",
    "altered echo",
    "another's message",
    "a tag that was never given",
    "OK",
    "garbage",
    "garbage line",
]

echoes: st.SearchStrategy[Echo] = st.sampled_from(["full", "full", "tag", "any", "none", is_ok])
messages = st.builds(
    Message, st.sampled_from(["hello", "hello", "안녕하세요", "", "/who"]), echoes, st.booleans()
)
deeds = st.builds(
    Deed, st.sampled_from(DEEDS), st.integers(0, MOST), st.integers(0, 50), st.binary(max_size=8)
)
all_messages = st.lists(messages, min_size=1, max_size=MOST)
all_deeds = st.lists(deeds, max_size=12)
cuts = st.lists(st.integers(1, 400), max_size=8)


class Script(NamedTuple):
    """What the server does on one connection."""

    reads: int  # lines, before it does anything
    deeds: list[Deed]
    cuts: list[int]
    ending: str  # "closes", "resets", "stays": answers all in the end, "forgets": answers no more
    end_at: int  # bytes that it sends before it closes or resets


class ScriptedServer:
    """A server that follows the script on its first connection, and echoes on all others."""

    def __init__(self) -> None:
        self.script: Script | None = None
        self.received: list[bytes] = []
        self.sent = b""
        self.is_done = Event()

    def follow(self, script: Script) -> None:
        """Follow a script on the next connection."""
        self.script = script
        self.received = []
        self.sent = b""
        self.is_done = Event()

    def __call__(self, connection: socket.socket) -> None:
        script = self.script
        self.script = None
        if script is None:
            echo(connection)
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        is_done = self.is_done
        try:
            self._act(script, connection)
        finally:
            is_done.set()
        if script.ending in ("stays", "forgets"):
            echo(connection)

    def _act(self, script: Script, connection: socket.socket) -> None:
        incoming = lines(connection)
        self.received = [next(incoming) for _ in range(script.reads)]
        stream = b"".join(deed.bytes_of(self.received or [b""]) for deed in script.deeds)
        if script.ending == "stays":
            stream += b"\n" + b"".join(line + b"\n" for line in self.received) + b"OK\n" * MOST
        elif script.ending != "forgets":
            stream = stream[: script.end_at]
        self.sent = stream
        for piece in pieces(stream, script.cuts):
            connection.sendall(piece)
            gevent.sleep(0)  # so that the client reads it alone
        if script.ending == "resets":
            reset(connection)


def pieces(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Yield a stream in pieces of these sizes, and the rest of it."""
    for size in sizes:
        yield stream[:size]
        stream = stream[size:]
    yield stream


# --------------------------------------------------------------------------------- what is expected


class Expected(NamedTuple):
    """What has to come of the bytes that a server sent."""

    answers: dict[int, bytes]  # the line that answers a message, by the message's number
    heard: list[bytes]  # the lines that answer none


def expect(
    all_messages: list[Message], received: list[bytes], identity: str, sent: bytes
) -> Expected:
    """Work out which line answers which message, one line after the other."""
    own_tag = re.compile(rb"%s\.\d{1,9}(?!\d)" % identity.encode())
    tagged: dict[bytes, int] = {}
    untagged: list[int] = []
    for number, (message, line) in enumerate(zip(all_messages, received, strict=True)):
        if message.echo == "none":
            continue
        if message.is_tagged:
            tagged[own_tag.findall(line)[0]] = number
        else:
            untagged.append(number)
    expected = Expected({}, [])
    for line in sent.split(b"\n")[:-1]:
        line = line.removesuffix(b"\r")
        tags = own_tag.findall(line)
        takers = [tagged.pop(tag) for tag in tags if tag in tagged]
        if not takers:
            takers = [n for n in untagged if all_messages[n].accepts(line, bool(tags))][:1]
            untagged = [n for n in untagged if n not in takers]
        expected.answers.update(dict.fromkeys(takers, line))
        if not takers:
            expected.heard.append(line)
    return expected


def is_good(message: Message, sent: bytes, line: bytes) -> bool:
    """Return whether the line that answers a message is a good echo of what was sent."""
    return sent in line or not message.is_tagged or message.echo == "tag"


# ----------------------------------------------------------------------------------------- the runs


class Run:
    """A client, all that it reports, and the users that send at the same time."""

    def __init__(self, port: int, timeout: float) -> None:
        self.rows = Rows()
        self.heard: list[bytes] = []
        self._has_news = Event()
        request_event = EventHook()
        request_event.add_listener(self._on_request)
        hooks = hooks_with(on_message=self._on_message)
        self.client = TCPSocketClient(
            "127.0.0.1", port, request_event, timeout=timeout, hooks=hooks
        )

    def _on_request(self, **row: object) -> None:
        self.rows.append(row)
        self._has_news.set()

    def _on_message(self, payload: bytes, arrived: float) -> None:
        self.heard.append(payload)
        self._has_news.set()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a row or a message that makes the condition true.

        A case takes a few milliseconds, and so must not wait for a look at the clock.
        """
        while not condition():
            self._has_news.clear()
            assert self._has_news.wait(60), "the condition has not come true"

    def send(self, all_messages: list[Message]) -> list[str | bytes | None]:
        """Send messages at once, each from a user of its own; return what they get."""
        while not self.client.connect():  # it has a time-out, too
            pass
        users = [
            gevent.spawn(self.client.send_chat, m.text, echo=m.echo, wait=m.wait, name=f"end {n}")
            for n, m in enumerate(all_messages)
        ]
        gevent.joinall(users, timeout=60)
        return [user.get(block=False) for user in users]

    def check_that_each_message_has_one_end(self, all_messages: list[Message]) -> None:
        """Check it, and that the connection, or a new one, is as good as ever."""
        self.wait_until(lambda: self.count_ends() >= len(all_messages))
        assert self.count_ends() == len(all_messages)
        assert any(self.is_tagged_echo_good() for _ in range(ATTEMPTS))
        assert any(self.is_untagged_echo_good() for _ in range(ATTEMPTS))
        for number in range(len(all_messages)):
            assert len(self.rows.named(f"end {number}")) <= 1

    def is_tagged_echo_good(self) -> bool:
        """Return whether a message comes back, maybe behind what the server sent before."""
        return str(self.client.send_chat("and now?")).endswith("and now?")

    def is_untagged_echo_good(self) -> bool:
        """Return whether a message without a tag comes back as the next one."""
        return self.client.send_chat("untagged", echo="any") == "untagged"

    def count_ends(self) -> int:
        """Return how many messages have ended, those included that could not be sent."""
        failed_sends = [row for row in self.rows.named("send_chat") if row["exception"]]
        ends = [row for row in self.rows if str(row["name"]).startswith("end ")]
        return len(ends) + len(failed_sends)


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[ScriptedServer, int]]:
    """Return a scripted server, and its port."""
    handler = ScriptedServer()
    server = Server(handler)
    yield handler, server.port
    server.stop()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts to connect follow each other quickly."""
    monkeypatch.setattr(locustfile, "FIRST_DELAY", 0.0001)
    monkeypatch.setattr(locustfile, "LONGEST_DELAY", 0.001)


@contextmanager
def running(port: int, timeout: float = 60.0) -> Iterator[Run]:
    """Yield a run; close its client at the end."""
    run = Run(port, timeout)
    try:
        yield run
    finally:
        run.client.close()


def check_answered(
    message: Message, sent: bytes, line: bytes, row: dict[str, Any], result: str | bytes | None
) -> None:
    """Check what is reported, and returned to the user, of a message that this line answers."""
    if not is_good(message, sent, line):
        assert isinstance(row["exception"], (EchoTruncated, EchoAltered))
        assert result is None
        return
    assert row["exception"] is None
    assert row["response_length"] == len(line)
    assert result == (line.decode("utf-8", "replace") if message.wait else None)


@any_case
@given(
    all_messages=all_messages,
    all_deeds=all_deeds,
    cuts=cuts,
    ending=st.sampled_from(["stays", "closes"]),
    end_at=st.integers(0, 500),
)
def test_each_message_gets_the_answer_that_the_bytes_say_and_on_message_all_others(
    scripted: tuple[ScriptedServer, int],
    all_messages: list[Message],
    all_deeds: list[Deed],
    cuts: list[int],
    ending: str,
    end_at: int,
) -> None:
    server, port = scripted
    server.follow(Script(len(all_messages), all_deeds, cuts, ending, end_at))
    with running(port) as run:
        results = run.send(all_messages)
        server.is_done.wait(60)
        received = server.received
        expected = expect(all_messages, received, run.client.identity, server.sent)
        run.wait_until(lambda: run.count_ends() >= len(all_messages))
        for number, message in enumerate(all_messages):
            (row,) = run.rows.named(f"end {number}")
            line = expected.answers.get(number)
            if message.echo != "none" and line is not None:
                check_answered(message, received[number], line, row, results[number])
                continue
            assert results[number] is None
            if message.echo == "none":
                assert row["exception"] is None
            else:
                assert isinstance(row["exception"], ConnectionClosed)
        run.wait_until(lambda: len(run.heard) >= len(expected.heard))
        assert run.heard == expected.heard
        run.check_that_each_message_has_one_end(all_messages)


@any_case
@given(
    all_messages=all_messages,
    all_deeds=all_deeds,
    cuts=cuts,
    reads=st.integers(0, MOST),
    ending=st.sampled_from(["closes", "resets"]),
    end_at=st.integers(0, 500),
)
def test_each_message_has_one_end_however_early_the_connection_ends(
    scripted: tuple[ScriptedServer, int],
    all_messages: list[Message],
    all_deeds: list[Deed],
    cuts: list[int],
    reads: int,
    ending: str,
    end_at: int,
) -> None:
    server, port = scripted
    script = Script(min(reads, len(all_messages)), all_deeds, cuts, ending, end_at)
    server.follow(script)
    with running(port) as run:
        results = run.send(all_messages)
        for result, message in zip(results, all_messages, strict=True):
            assert result is None or message.wait
        run.check_that_each_message_has_one_end(all_messages)


@settings(any_case, max_examples=max(1, CASES // 40))
@given(all_messages=all_messages, all_deeds=all_deeds, cuts=cuts)
def test_each_message_has_one_end_where_answers_do_not_come_in_time(
    scripted: tuple[ScriptedServer, int],
    all_messages: list[Message],
    all_deeds: list[Deed],
    cuts: list[int],
) -> None:
    server, port = scripted
    server.follow(Script(len(all_messages), all_deeds, cuts, "forgets", 0))
    with running(port, timeout=0.02) as run:
        run.send(all_messages)
        run.check_that_each_message_has_one_end(all_messages)
