"""``python locustfile.py`` where no echo comes: what came instead, and a hint that works."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gevent
import pytest
from certificates import secure, server_context
from programs import STANDALONE, Program
from servers import Answers, Handler, Server, after, echo, greets, says, silent

TIMEOUT = "--chat-timeout=3"


class Case(NamedTuple):
    """A server, what of it is shown, and what the hint says."""

    server: Handler
    shown: str
    hint: str
    """A part of it: where options stand in it, all of them."""


HANDSHAKE, ALERT = b"\x16", b"\x15\x03\x01\x00\x02\x02\x46"
HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
LOOK = "python plugins/diagnose.py 127.0.0.1 "
HOSTILE = b"\x1b[31mred \xe2\x80\xae \xff" + b"x" * 5000


def ask_for_login(connection: socket.socket) -> None:
    """Greet without the end of a line, and say nothing more."""
    connection.sendall(b"login: ")
    silent(connection)


def echo_stripped(connection: socket.socket) -> None:
    """Answer each read with what it returned, less the end of the line."""
    while data := connection.recv(65536):
        connection.sendall(b"you said " + data.strip())


def in_korean(line: bytes) -> bytes:
    """Answer with the text, as a server does that knows CP949 alone."""
    return line.decode("cp949", "replace").encode("cp949", "replace") + b"\n"


CASES = {
    "lines without the tag": Case(
        Answers(lambda line: b"* somebody: hi\n"), r"what came instead: '* somebody: hi\n'", "any"
    ),
    "the tag with other text": Case(
        Answers(lambda line: line.replace(b"] ", b"] *** ") + b"\n"), "] *** ", "tag"
    ),
    "another encoding": Case(Answers(in_korean), "what came instead: '[", "encoding"),
    "a cut message": Case(Answers(lambda line: line[:40] + b"\n"), "what came instead: '[", "tag"),
    "no line end": Case(echo_stripped, "what came instead: 'you said [", "raw"),
    "HTTP": Case(after(1, says(HTTP)), "'HTTP/1.1 400 Bad Request", "HTTP"),
    "unprintable bytes": Case(
        Answers(lambda line: b"\x00\x00\x00\x06hello\n"), r"'\x00\x00\x00\x06hello\n'", LOOK
    ),
    "a length prefix": Case(Answers(lambda line: b"\x00\x20" + line), r"'\x00 [", LOOK),
    "hostile bytes": Case(Answers(lambda line: HOSTILE), r"'\x1b[31mred \u202e ", LOOK),
    "a hang-up": Case(after(1, lambda connection: None), "nothing came instead", LOOK),
    "bytes before the first message": Case(
        ask_for_login,
        "what came instead before the first message: 'login: '",
        LOOK,
    ),
    "nothing": Case(silent, "nothing came instead", LOOK),
}


@pytest.fixture(scope="module")
def tls_server(certificates: Path) -> Iterator[Server]:
    """Return a TLS server that echoes, and answers what is no TLS with an alert, as Go's does."""
    secure_echo = secure(echo, server_context(certificates / "good.pem"))

    def handler(connection: socket.socket) -> None:
        if connection.recv(1, socket.MSG_PEEK) != HANDSHAKE:
            connection.recv(65536)
            connection.sendall(ALERT)
            return
        secure_echo(connection)

    server = Server(handler)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def runs(tls_server: Server) -> Iterator[dict[str, Program]]:
    """Return runs that have given their hint, by the names of the cases and of the TLS server's.

    They run at the same time, as most of it is waiting.
    """
    servers = {name: Server(case.server) for name, case in CASES.items()}
    servers["TLS"] = tls_server
    programs = {
        name: Program(*STANDALONE, server.address, TIMEOUT) for name, server in servers.items()
    }
    waiting = [gevent.spawn(each.prints, "hint: ") for each in programs.values()]
    gevent.joinall(waiting)
    yield programs
    for program in programs.values():
        program.kill()
    for name in CASES:
        servers[name].stop()


def hint_of(run: Program) -> str:
    """Return the first hint of a run: it is one line, behind what came instead."""
    lines = run.output.splitlines()
    hints = [line for line in lines if line.startswith("  hint: ")]
    number = lines.index(hints[0])
    assert "came instead" in lines[number - 1]
    assert "failed after" in lines[number - 2]
    return hints[0].removeprefix("  hint: ")


def options_in(hint: str) -> list[str]:
    """Return the options that a hint says."""
    return re.findall(r"--[a-z-]+=\S+", hint)


@pytest.mark.parametrize("name", CASES)
def test_where_no_echo_comes_it_says_what_came_instead_with_a_hint(
    runs: dict[str, Program], name: str
) -> None:
    run, case = runs[name], CASES[name]
    hint = hint_of(run)
    assert case.shown in run.output
    options = {
        "any": ["--chat-echo=any"],
        "tag": ["--chat-echo=tag"],
        "encoding": ["--chat-encoding=cp949"],
        "raw": ["--chat-framing=raw", "--chat-echo=tag"],
    }
    assert options_in(hint) == options.get(case.hint, [])
    assert case.hint in hint


def test_what_came_is_escaped_and_cut(runs: dict[str, Program]) -> None:
    output = runs["hostile bytes"].output
    assert not set(output) & set("\x1b\x07\x00\u202e")
    assert r"\xff" in output
    assert max(map(len, output.splitlines())) < 200


@pytest.mark.parametrize(
    "name",
    [
        "lines without the tag",
        "the tag with other text",
        "another encoding",
        "a cut message",
        "no line end",
    ],
)
def test_the_hint_taken_works(runs: dict[str, Program], name: str) -> None:
    run = runs[name]
    address = re.search(r"\d+\.\d+\.\d+\.\d+:\d+", run.output)
    assert address is not None
    hinted = options_in(hint_of(run))
    again = Program(*STANDALONE, address[0], "--chat-timeout=60", *hinted)
    assert again.ends() == 0
    assert "5 of 5 messages came back" in again.output
    assert "hint" not in again.output


def test_a_tls_server_is_named_and_its_hint_works(
    runs: dict[str, Program], certificates: Path, tls_server: Server
) -> None:
    hint = hint_of(runs["TLS"])
    assert options_in(hint) == [f"--host=tls://{tls_server.address}"]
    authority = str(certificates / "ca.pem")
    again = Program(*STANDALONE, *options_in(hint), SSL_CERT_FILE=authority)
    assert again.ends() == 0
    assert "5 of 5 messages came back" in again.output


def test_where_other_messages_came_back_the_hint_is_that_some_texts_are_refused() -> None:
    server = Server(Answers(lambda line: line[:99] + b"\n" if len(line) < 99 else b"Too long!\n"))
    run = Program(*STANDALONE, server.address, "--chat-timeout=1")
    assert run.ends() == 1
    assert "what came instead: 'Too long!" in run.output
    assert hint_of(run).startswith("others came back: the server may refuse some texts, see docs/")
    server.stop()


def test_a_greeting_is_no_fault_where_the_echoes_come() -> None:
    server = Server(greets(b"welcome\r\n"))
    run = Program(*STANDALONE, server.address, "--chat-timeout=60")
    assert run.ends() == 0
    assert "hint" not in run.output
    server.stop()


def test_the_same_hint_is_given_once_and_the_code_is_1(runs: dict[str, Program]) -> None:
    run = runs["a hang-up"]  # it does not have to wait for a time-out
    assert run.ends() == 1
    assert run.output.count("hint: ") == 1
    assert run.output.count("nothing came instead") == 5
    assert "0 of 5 messages came back" in run.output
