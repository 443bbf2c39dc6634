"""``--chat-source`` and the framing ``crlf``."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from locust.env import Environment
from locust.event import Events
from programs import LOCUST, Program, program, wait_until
from rows import Rows
from servers import Server, free_port

from locustfile import ChatClient, CrlfFraming, TCPSocketClient

Serve = Callable[..., Server]
Connect = Callable[..., TCPSocketClient]
Start = Callable[..., Program]

needs_loopback_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 without being told"
)


def noting(peers: list[str]) -> Callable[[socket.socket], None]:
    """Return an echo server that notes the addresses that connections come from."""

    def server(connection: socket.socket) -> None:
        peers.append(connection.getpeername()[0])
        while data := connection.recv(65536):
            connection.sendall(data)

    return server


# ------------------------------------------------------------------------------------ --chat-source


@needs_loopback_addresses
def test_connections_come_from_the_addresses_in_turn(serve: Serve, connect: Connect) -> None:
    peers: list[str] = []
    port = serve(noting(peers)).port
    sources = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    for _ in range(6):
        assert connect(port, sources=sources).send_chat("hello") is not None
    assert peers[:3] == peers[3:]
    assert sorted(peers[:3]) == list(sources)


@needs_loopback_addresses
def test_a_reconnect_takes_the_next_address(serve: Serve, connect: Connect) -> None:
    peers: list[str] = []
    client = connect(serve(noting(peers)).port, sources=("127.0.0.5", "127.0.0.6"))
    for _ in range(4):
        assert client.send_chat("hello") is not None
        client.close()
    assert peers[:2] == peers[2:]
    assert sorted(peers[:2]) == ["127.0.0.5", "127.0.0.6"]


@needs_loopback_addresses
def test_the_option_spreads_the_users_over_the_addresses(serve: Serve) -> None:
    peers: list[str] = []
    environment = Environment(
        user_classes=[ChatClient],
        host=serve(noting(peers)).address,
        events=Events(),
        parsed_options=Namespace(stop_timeout=0.0, chat_source="127.0.0.7,127.0.0.8"),
    )
    runner = environment.create_local_runner()
    runner.start(10, spawn_rate=10)
    wait_until(lambda: len(peers) == 10)
    runner.quit()
    assert Counter(peers) == {"127.0.0.7": 5, "127.0.0.8": 5}


def test_without_sources_the_system_chooses(serve: Serve, connect: Connect) -> None:
    peers: list[str] = []
    assert connect(serve(noting(peers)).port).send_chat("hello") is not None
    assert peers == ["127.0.0.1"]


def test_the_addresses_of_the_host_that_the_source_cannot_reach_are_left_out(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    """``localhost`` may be ``::1`` first."""
    client = connect(serve(noting([])).port, host="localhost", sources=("127.0.0.1",))
    assert client.send_chat("hello") is not None


def test_a_source_of_another_family_than_the_host_is_a_failed_connect(
    serve: Serve, connect: Connect, rows: Rows
) -> None:
    assert not connect(serve(noting([])).port, sources=("::1",)).connect()
    assert rows.counts() == {"connect: OSError": 1}
    assert "same family as the source" in str(rows[0]["exception"])


def narrow_network(*command: str) -> list[str]:
    """Return a command in a network of its own, whose addresses have 20 ports each.

    Skips the test where that cannot be had.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can have a network with few ports")
    unshare = program("unshare")
    ip = program("ip")
    if subprocess.run([unshare, "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody have a network of his own")
    ports = "echo 40000 40019 > /proc/sys/net/ipv4/ip_local_port_range"
    return [unshare, "--net", "sh", "-c", f'{ip} link set lo up; {ports}; exec "$@"', "-", *command]


@pytest.mark.parametrize(("sources", "connected"), [("127.0.0.1", 20), ("127.0.0.1,127.0.0.2", 35)])
def test_more_connections_than_one_address_has_ports_for(
    start: Start, tmp_path: Path, sources: str, connected: int
) -> None:
    locust = [
        *map(str, LOCUST),
        "--headless",
        "--users=35",
        "--spawn-rate=35",
        "--run-time=8s",
        "--host=127.0.0.1:12345",
        "--echo-server",
        "--chat-wait=100",
        f"--chat-source={sources}",
        f"--csv={tmp_path / 'run'}",
    ]
    start(*narrow_network(*locust)).ends()
    with (tmp_path / "run_stats.csv").open() as file:
        by_name = {line["Name"]: line for line in csv.DictReader(file)}
    connects = by_name["connect"]
    succeeded = int(connects["Request Count"]) - int(connects["Failure Count"])
    assert succeeded == connected
    assert (int(connects["Failure Count"]) == 0) == (connected == 35)


@pytest.mark.parametrize(
    "sources", ["nowhere", "127.0.0.1,", "127.0.0.1:80", "127.0.0.1;127.0.0.2"]
)
def test_what_is_no_address_is_refused_by_the_command_line(start: Start, sources: str) -> None:
    running = start(*LOCUST, "--headless", "--host=localhost:9", f"--chat-source={sources}")
    assert running.ends() != 0
    instead = "write addresses of this machine, such as 127.0.0.1,127.0.0.2"
    assert f"'{sources}' will not do: {instead}" in running.output
    assert "Traceback" not in running.output


@pytest.mark.parametrize("more", [[], ["--processes=2"]], ids=["one process", "--processes"])
def test_an_address_that_this_machine_lacks_is_one_line_at_the_start(
    start: Start, more: list[str]
) -> None:
    bus = str(free_port())  # of its own: on the usual port, workers of another run could join
    running = start(
        *LOCUST,
        "--headless",
        "--users=2",
        "--run-time=20s",
        "--host=localhost:9",
        "--chat-source=127.0.0.1,192.0.2.1",
        *more,
        LOCUST_MASTER_BIND_PORT=bus,
        LOCUST_MASTER_NODE_PORT=bus,
    )
    assert running.ends() != 0
    told = [line for line in running.output.splitlines() if "Starting Locust" not in line]
    assert told == [
        "locust: error: '192.0.2.1' will not do: write an address that this machine has"
    ]


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


def test_crlf_loads_such_a_server_from_the_command_line(serve: Serve, start: Start) -> None:
    server = serve(waits_for_both)
    running = start(
        *LOCUST,
        "--headless",
        "--users=3",
        "--spawn-rate=3",
        "--run-time=3s",
        "--chat-wait=0.1",
        f"--host={server.address}",
        "--chat-framing=crlf",
    )
    assert running.ends() == 0, running.output
    assert "echo_response" in running.output


def test_crlf_takes_lines_that_end_either_way_cut_anywhere() -> None:
    stream = b"one\r\ntwo\nthree\r\r\n\r\n\nfour"
    expected = [b"one", b"two", b"three\r", b"", b""]
    for cut in range(len(stream) + 1):
        framing = CrlfFraming()
        payloads = [*framing.feed(stream[:cut]), *framing.feed(stream[cut:])]
        assert payloads == expected, cut


@pytest.mark.parametrize("payload", [b"a\nb", b"a\r", b"a\r\n"])
def test_crlf_refuses_what_the_server_would_take_for_something_else(payload: bytes) -> None:
    with pytest.raises(ValueError, match="carries no line break"):
        CrlfFraming().encode(payload)
