"""``python locustfile.py``: five messages without a load test."""

from __future__ import annotations

import re
import signal
import socket
import sys
from collections.abc import Callable

import pytest
from programs import STANDALONE, Program, wait_until
from servers import Server, echo, free_port, lines

Start = Callable[..., Program]
Serve = Callable[..., Server]


def test_five_messages_that_come_back_are_five_lines_a_summary_and_code_0(
    start: Start, serve: Serve
) -> None:
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(line + b"\n")

    running = start(*STANDALONE, "127.0.0.1", str(serve(server).port))
    assert running.ends() == 0
    printed = running.output.splitlines()
    assert len(printed) == 6
    matches = [re.fullmatch(r" *(\d+) bytes +[\d.]+ ms  '\[.*'", line) for line in printed[:5]]
    sizes = [int(match[1]) for match in matches if match]
    assert sizes == [len(line) for line in received]
    assert max(sizes) > 512
    assert re.fullmatch(r"5 of 5 messages came back, median [\d.]+ ms", printed[5])


def test_messages_that_do_not_come_back_are_said_and_code_1(start: Start, serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            connection.sendall(line[:512] + b"\n")

    running = start(*STANDALONE, serve(server).address)
    assert running.ends() == 1
    assert "echo_response failed after" in running.output
    assert "The echo ends before the message does." in running.output
    assert "4 of 5 messages came back" in running.output


def test_no_server_is_code_1_without_a_traceback(start: Start) -> None:
    running = start(*STANDALONE, "127.0.0.1", str(free_port()))
    assert running.ends() == 1
    assert running.output.count("connect failed after") == 5
    assert "0 of 5 messages came back" in running.output and "Traceback" not in running.output


def test_the_port_may_stand_in_the_environment_or_the_host(start: Start, serve: Serve) -> None:
    server = serve(echo)
    assert start(*STANDALONE, TCP_PORT=str(server.port)).ends() == 0
    assert start(*STANDALONE, f"tcp://127.0.0.1:{server.port}", TCP_PORT="1").ends() == 0
    assert start(*STANDALONE, "127.0.0.1", str(server.port), TCP_PORT="1").ends() == 0
    assert server.opened == 3


def test_the_chat_options_apply(start: Start, serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            connection.sendall(len(data).to_bytes(4, "big") + data.upper())

    port = str(serve(server).port)
    options = ("--chat-framing=>I", "--chat-echo=any", "--chat-timeout=60")
    running = start(*STANDALONE, "127.0.0.1", port, *options)
    assert running.ends() == 0
    assert "HELLO, EVERYONE!" in running.output
    nothing = start(*STANDALONE, "127.0.0.1", port, "--chat-echo=none")
    assert nothing.ends() == 0
    assert "5 of 5 messages sent" in nothing.output


def test_bytes_from_the_server_are_escaped(start: Start, serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        for _ in lines(connection):
            connection.sendall(b"\x1b[31mred\x07\x00\xff\xe2\x80\xae" + b"x" * 5000 + b"\n")

    running = start(*STANDALONE, serve(server).address, "--chat-echo=any")
    assert running.ends() == 0
    assert "\\x1b[31mred\\x07\\x00" in running.output and "\\u202e" in running.output
    assert not set(running.output) & set("\x1b\x07\x00\u202e")
    assert max(map(len, running.output.splitlines())) < 150


def test_a_terminal_without_unicode_is_no_obstacle(start: Start, serve: Serve) -> None:
    running = start(*STANDALONE, serve(echo).address, PYTHONIOENCODING="ascii")
    assert running.ends() == 0
    assert "\\uc548\\ub155" in running.output


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_the_echo_server_serves_until_interrupted_and_ends_quietly(start: Start) -> None:
    port = str(free_port())
    server = start(*STANDALONE, "--echo-server", "127.0.0.1", port)
    server.prints("Ctrl-C ends it")
    assert start(*STANDALONE, "127.0.0.1", port).ends() == 0
    assert start(*STANDALONE, "127.0.0.1", port, "--chat-framing=<H").ends() == 0
    server.process.send_signal(signal.SIGINT)
    assert server.ends() == 130
    assert server.output == f"echo server on 127.0.0.1:{port}, Ctrl-C ends it\n"


def test_an_interrupt_ends_the_five_messages_quietly(start: Start, serve: Serve) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)])
    running = start(*STANDALONE, server.address, "--chat-timeout=60")
    wait_until(lambda: server.open == 1)
    running.process.send_signal(signal.SIGINT)
    assert running.ends() == 130
    assert running.output == ""


def test_help_shows_the_options_with_their_environment_variables(start: Start) -> None:
    """``locust --help`` cannot: Locust prints it before it reads a locustfile."""
    running = start(*STANDALONE, "--help")
    assert running.ends() == 0
    text = " ".join(running.output.split())
    for option in (
        "tcp-port",
        "chat-framing",
        "chat-echo",
        "chat-timeout",
        "chat-wait",
        "chat-rate",
        "chat-source",
    ):
        assert re.search(rf"--{option} <\w+>", text)
        assert f"[env var: {option.upper().replace('-', '_')}]" in text
    assert "--echo-server" in text
