"""``--chat-source`` and the framing ``crlf``."""

from __future__ import annotations

import socket
import sys
from collections import Counter

import pytest
from clients import Connect
from programs import Start, narrow_network, wait_until
from rows import Rows, RunUsers
from servers import Serve, echo

from locustfile import ChatClient

needs_loopback_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 without being told"
)


class NotesPeers:
    """An echo server that notes the addresses that connections come from."""

    def __init__(self) -> None:
        self.peers: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        self.peers.append(connection.getpeername()[0])
        echo(connection)


@pytest.fixture
def server() -> NotesPeers:
    """Return a server that notes where connections come from."""
    return NotesPeers()


# ------------------------------------------------------------------------------------ --chat-source


@needs_loopback_addresses
def test_connections_come_from_the_addresses_in_turn(
    serve: Serve, connect: Connect, server: NotesPeers
) -> None:
    port = serve(server).port
    sources = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    for _ in range(6):
        assert connect(port, sources=sources).send_chat("hello") is not None
    assert server.peers == [*sources, *sources]


@needs_loopback_addresses
def test_a_reconnect_takes_the_next_address(
    serve: Serve, connect: Connect, server: NotesPeers
) -> None:
    client = connect(serve(server).port, sources=("127.0.0.5", "127.0.0.6"))
    for _ in range(4):
        assert client.send_chat("hello") is not None
        client.close()
    assert server.peers == ["127.0.0.5", "127.0.0.6"] * 2


@needs_loopback_addresses
def test_the_option_spreads_the_users_over_the_addresses(
    serve: Serve, run_users: RunUsers, server: NotesPeers
) -> None:
    run_users(ChatClient, serve(server).address, users=10, chat_source="127.0.0.7,127.0.0.8")
    wait_until(lambda: len(server.peers) == 10)
    assert Counter(server.peers) == {"127.0.0.7": 5, "127.0.0.8": 5}


def test_without_sources_the_system_chooses(
    serve: Serve, connect: Connect, server: NotesPeers
) -> None:
    assert connect(serve(server).port).send_chat("hello") is not None
    assert server.peers == ["127.0.0.1"]


def test_the_addresses_of_the_host_that_the_source_cannot_reach_are_left_out(
    serve: Serve, connect: Connect
) -> None:
    """``localhost`` may be ``::1`` first."""
    client = connect(serve(echo).port, host="localhost", sources=("127.0.0.1",))
    assert client.send_chat("hello") is not None


def test_a_source_of_another_family_than_the_host_is_a_failed_connect(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    assert not connect(serve(echo).port, sources=("::1",)).connect()
    assert rows.counts() == {"connect: OSError": 1}
    assert "same family as the source" in str(rows[0]["exception"])


CONNECT_35 = """
from gevent.server import StreamServer
from locust.event import EventHook
from locustfile import TCPSocketClient, echo_all

BOTH = ("127.0.0.2", "127.0.0.3")
for port in 12345, 12346:
    StreamServer(("127.0.0.1", port), echo_all).start()
kept = []  # open until the end
for sources, port in (("127.0.0.1",), 12345), (("127.0.0.1",), 12346), (BOTH, 12345):
    clients = [TCPSocketClient("127.0.0.1", port, EventHook(), sources=sources) for _ in range(35)]
    kept += clients
    print(sum(client.connect() for client in clients))
"""


def test_more_addresses_connect_more_than_one_has_ports_for(start: Start) -> None:
    """Of 35 clients, 20 have a port on one address for each server, and all on two."""
    running = start(*narrow_network(sys.executable, "-c", CONNECT_35))
    assert running.ends() == 0, running.output
    assert running.output.split() == ["20", "20", "35"]


# --------------------------------------------------------------------------------------------- crlf


def waits_for_both(connection: socket.socket) -> None:
    r"""Echo messages that end with ``\r\n``, as Twisted's servers and telnet's do."""
    rest = b""
    while data := connection.recv(65536):
        *complete, rest = (rest + data).split(b"\r\n")
        for message in complete:
            connection.sendall(message + b"\r\n")


def test_crlf_is_understood_by_a_server_that_waits_for_both(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    client = connect(serve(waits_for_both).port, framing="crlf")
    echoed = client.send_chat("안녕하세요")
    assert echoed == f"[{client.identity}.1] 안녕하세요"
    payload = len(str(echoed).encode())
    lengths = {row["name"]: row["response_length"] for row in rows}
    assert lengths == {"connect": 0, "send_chat": payload + 2, "echo_response": payload}


def test_line_is_not_which_is_why_there_is_crlf(serve: Serve, connect: Connect, rows: Rows) -> None:
    assert connect(serve(waits_for_both).port, timeout=0.3).send_chat("hello") is None
    assert rows.counts()["echo_response: EchoTimeout"] == 1


def test_the_option_loads_a_server_that_waits_for_both(serve: Serve, run_users: RunUsers) -> None:
    run = run_users(ChatClient, serve(waits_for_both).address, chat_framing="crlf", chat_wait="0")
    wait_until(lambda: run.count("echo_response") > 5)
    assert not run.errors
