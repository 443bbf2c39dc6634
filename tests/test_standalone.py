"""``python locustfile.py``: five messages without a load test."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from typing import NamedTuple

import pytest
from programs import STANDALONE, Start, wait_until
from servers import (
    Answers,
    Serve,
    echo,
    free_port,
    in_turn,
    silent,
    with_the_line,
)

Run = Callable[..., "Result"]

OPTIONS = (
    "tcp-port",
    "chat-framing",
    "chat-echo",
    "chat-encoding",
    "chat-timeout",
    "chat-wait",
    "chat-rate",
    "chat-source",
)


class Result(NamedTuple):
    """What came of a run."""

    code: int
    output: str


@pytest.fixture
def run(start: Start) -> Run:
    """Return a function that lets five messages be sent, and returns what came of it."""

    def run(*arguments: str, **variables: str) -> Result:
        running = start(*STANDALONE, *arguments, **variables)
        return Result(running.ends(), running.output)

    return run


def test_five_messages_that_come_back_are_the_target_five_lines_a_summary_and_code_0(
    run: Run, serve: Serve
) -> None:
    chat = Answers(with_the_line)
    server = serve(chat)
    result = run("127.0.0.1", str(server.port))
    assert result.code == 0
    target, *messages, summary = result.output.splitlines()
    assert target == f"connecting to {server.address}, framing line, echo full"
    assert len(messages) == 5
    sizes = [len(line) for line in chat.received]
    for message, size in zip(messages, sizes, strict=True):
        assert re.fullmatch(rf" *{size} bytes +[\d.]+ ms  '\[.*'", message)
    assert max(sizes) > 512
    assert re.fullmatch(r"5 of 5 messages came back, median [\d.]+ ms", summary)


def test_messages_that_do_not_come_back_are_said_and_code_1(run: Run, serve: Serve) -> None:
    cutting = Answers(lambda line: line[:512] + b"\n")
    result = run(serve(cutting).address)
    assert result.code == 1
    assert "echo_response failed after" in result.output
    assert "The echo ends before the message does." in result.output
    assert "4 of 5 messages came back" in result.output


def test_a_refused_connect_ends_it_at_once_with_code_1_and_without_a_traceback(run: Run) -> None:
    result = run("127.0.0.1", str(free_port()))
    assert result.code == 1
    assert result.output.count("connect failed after") == 1
    assert "0 of 5 messages came back" in result.output
    assert "Traceback" not in result.output


def test_the_port_may_stand_in_the_environment(run: Run, serve: Serve) -> None:
    server = serve(echo)
    result = run(TCP_PORT=str(server.port))
    assert result.code == 0
    assert server.opened == 1


def test_a_port_in_the_command_wins_over_the_environment(run: Run, serve: Serve) -> None:
    server = serve(echo)
    with_url = run(f"tcp://{server.address}", TCP_PORT="1")
    with_port = run("127.0.0.1", str(server.port), TCP_PORT="1")
    assert with_url.code == 0
    assert with_port.code == 0
    assert server.opened == 2


def test_the_chat_options_apply_and_the_target_names_them(run: Run, serve: Serve) -> None:
    """The server answers with a length prefix and what it got, in capitals."""

    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            length = len(data).to_bytes(4, "big")
            connection.sendall(length + data.upper())

    result = run(
        serve(server).address,
        "--chat-framing=>I",
        "--chat-echo=any",
        "--chat-timeout=60",
    )
    assert result.code == 0
    assert "HELLO, EVERYONE!" in result.output
    assert "framing >I, echo any" in result.output


def test_where_no_echo_is_awaited_all_were_sent(run: Run, serve: Serve) -> None:
    server = serve(silent)
    result = run(server.address, "--chat-echo=none")
    assert result.code == 0
    assert "5 of 5 messages sent" in result.output


def test_bytes_from_the_server_are_escaped(run: Run, serve: Serve) -> None:
    hostile = b"\x1b[31mred\x07\x00\xff\xe2\x80\xae" + b"x" * 5000 + b"\n"
    server = serve(Answers(in_turn(hostile)))
    result = run(server.address, "--chat-echo=any")
    assert result.code == 0
    assert "\\x1b[31mred\\x07\\x00" in result.output
    assert "\\u202e" in result.output
    assert not set(result.output) & set("\x1b\x07\x00\u202e")
    for line in result.output.splitlines():
        assert len(line) < 150


def test_a_terminal_without_unicode_is_no_obstacle(run: Run, serve: Serve) -> None:
    server = serve(echo)
    result = run(server.address, PYTHONIOENCODING="ascii")
    assert result.code == 0
    assert "\\uc548\\ub155" in result.output


def test_the_echo_server_serves_until_interrupted_and_ends_quietly(start: Start, run: Run) -> None:
    port = str(free_port())
    server = start(*STANDALONE, "--echo-server", "127.0.0.1", port)
    server.prints("Ctrl-C ends it")
    assert run("127.0.0.1", port).code == 0
    assert run("127.0.0.1", port, "--chat-framing=<H").code == 0
    server.process.send_signal(signal.SIGINT)
    assert server.ends() == 130
    assert server.output == f"echo server on 127.0.0.1:{port}, Ctrl-C ends it\n"


def test_an_interrupt_ends_the_five_messages_quietly(start: Start, serve: Serve) -> None:
    server = serve(silent)
    running = start(*STANDALONE, server.address, "--chat-timeout=60")
    wait_until(lambda: server.open == 1)
    running.process.send_signal(signal.SIGINT)
    assert running.ends() == 130
    assert running.output == f"connecting to {server.address}, framing line, echo full\n"


def test_help_shows_the_options_with_their_environment_variables(run: Run) -> None:
    """``locust --help`` cannot: Locust prints it before it reads a locustfile."""
    result = run("--help")
    assert result.code == 0
    text = " ".join(result.output.split())
    for option in OPTIONS:
        variable = option.upper().replace("-", "_")
        assert re.search(rf"--{option} <\w+>", text)
        assert f"[env var: {variable}]" in text
    assert "--chat-trace" in text
    assert "[env var: CHAT_TRACE]" in text
    assert "--echo-server" in text
