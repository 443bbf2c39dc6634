"""How a connection is opened: addresses, look-ups, tidy hosts, and the options of its socket."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter

import gevent
import pytest
from certificates import Context
from clients import Connect
from gevent.event import Event
from gevent.server import StreamServer
from plain_servers import ServerProcess, read_slowly
from plain_servers import echo as echo_apart
from programs import Start, narrow_network, wait_until
from rows import Rows
from servers import Serve, black_hole, echo, family_of, free_port

import locustfile
from locustfile import Address, parse_address

AddressInfo = tuple[int, int, int, str, tuple[str, int]]

needs_loopback_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 without being told"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="these are options of Linux")


class Names:
    """Stands for the resolver: a name has the addresses that the test says."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.addresses: dict[str, list[str]] = {}
        self.before_answer: Callable[[], object] = lambda: None

    def getaddrinfo(self, host: str, port: int, **_: object) -> list[AddressInfo]:
        """Answer as ``socket.getaddrinfo`` does, for connections of TCP."""
        self.asked.append(host)
        self.before_answer()
        if not self.addresses.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (family_of(address), socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in self.addresses[host]
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    return names


@pytest.fixture
def accept_nothing() -> Iterator[Callable[[str, int], int]]:
    """Return a function that lets an address accept nothing, until the test ends."""
    with ExitStack() as holes:
        yield lambda address, port: holes.enter_context(black_hole(address, port))


class Node(StreamServer):  # type: ignore[misc]
    """One server of several behind a name, which counts its connections and echoes."""

    def __init__(self, address: str, port: int = 0) -> None:
        super().__init__((address, port), self.serve, backlog=1024)
        self.opened = 0
        self.start()

    def serve(self, connection: socket.socket, _address: object) -> None:
        self.opened += 1
        with suppress(OSError):
            echo(connection)


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    """Return a function that starts a server on an address; it is stopped after the test."""
    nodes: list[Node] = []

    def make(address: str, port: int = 0) -> Node:
        nodes.append(Node(address, port))
        return nodes[-1]

    yield make
    for each in nodes:
        each.stop(timeout=0.1)


# ---------------------------------------------------------------------- several addresses of a name


@needs_loopback_addresses
@pytest.mark.parametrize("dead", [1, 3])
def test_addresses_share_the_time_so_that_dead_ones_do_not_use_it_up(
    serve: Serve,
    connect: Connect,
    rows: Rows,
    names: Names,
    accept_nothing: Callable[[str, int], int],
    dead: int,
) -> None:
    port = serve(echo).port
    holes = [f"127.0.0.{number}" for number in range(20, 20 + dead)]
    for hole in holes:
        accept_nothing(hole, port)
    names.addresses["several.test"] = [*holes, "127.0.0.1"]
    client = connect(port, host="several.test", timeout=1.6)
    assert client.connect()
    assert rows.counts() == {"connect": 1}
    assert 1600 * dead / (dead + 1) - 50 < rows[0]["response_time"] < 1600


@needs_loopback_addresses
def test_where_all_addresses_are_dead_connecting_takes_the_time_out_once(
    connect: Connect, rows: Rows, names: Names, accept_nothing: Callable[[str, int], int]
) -> None:
    port = free_port()
    for hole in ("127.0.0.20", "127.0.0.21"):
        accept_nothing(hole, port)
    names.addresses["dead.test"] = ["127.0.0.20", "127.0.0.21"]
    assert not connect(port, host="dead.test", timeout=0.5).connect()
    assert rows.counts() == {"connect: TimeoutError": 1}
    assert str(rows[0]["exception"]) == "no connection within the time-out"
    assert rows[0]["response_time"] > 450


@needs_loopback_addresses
def test_an_address_that_refuses_is_followed_by_the_next(
    serve: Serve, connect: Connect, rows: Rows, names: Names
) -> None:
    names.addresses["first-refuses.test"] = ["127.0.0.20", "127.0.0.1"]
    assert connect(serve(echo).port, host="first-refuses.test").connect()
    assert rows.counts() == {"connect": 1}


@needs_loopback_addresses
def test_users_begin_in_turn_with_the_addresses_of_the_first_family(
    connect: Connect, names: Names, node: Callable[..., Node]
) -> None:
    """One of another family stays out of it, until all of the first have failed."""
    first = node("127.0.0.31")
    port = first.server_port
    others = [node("127.0.0.32", port), node("127.0.0.33", port)]
    spare = node("::1", port)
    names.addresses["cluster.test"] = ["127.0.0.31", "::1", "127.0.0.32", "127.0.0.33"]
    for _ in range(9):
        assert connect(port, host="cluster.test").send_chat("hello") is not None
    assert [each.opened for each in (first, *others, spare)] == [3, 3, 3, 0]
    for each in (first, *others):
        each.stop(timeout=0.1)
    assert connect(port, host="cluster.test").send_chat("hello") is not None
    assert spare.opened == 1


# ----------------------------------------------------------------------------------------- look-ups


def test_one_look_up_is_for_all_users(serve: Serve, connect: Connect, names: Names) -> None:
    server = serve(echo)
    names.addresses["shared.test"] = ["127.0.0.1"]
    names.before_answer = lambda: gevent.sleep(0.1)
    clients = [connect(server.port, host="shared.test") for _ in range(20)]
    connecting = [gevent.spawn(client.connect) for client in clients]
    assert all(greenlet.get() for greenlet in connecting)
    for client in clients:
        client.close()
        assert client.connect()
    wait_until(lambda: server.opened == 40)
    assert names.asked == ["shared.test"]


def test_a_look_up_is_made_again_when_it_is_old(
    serve: Serve, connect: Connect, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locustfile, "LOOK_UP_KEPT", 0.1)
    port = serve(echo).port
    names.addresses["old.test"] = ["127.0.0.1"]
    client = connect(port, host="old.test")
    assert client.connect()
    gevent.sleep(0.15)
    client.close()
    assert client.connect()
    assert len(names.asked) == 2


def test_a_look_up_that_has_failed_is_made_again(
    serve: Serve, connect: Connect, rows: Rows, names: Names
) -> None:
    port = serve(echo).port
    client = connect(port, host="not-yet.test")
    assert not client.connect()
    names.addresses["not-yet.test"] = ["127.0.0.1"]
    assert client.connect()
    assert names.asked == ["not-yet.test"] * 2
    assert rows.counts() == {"connect: gaierror": 1, "connect": 1}


def test_a_look_up_goes_on_for_the_others_where_the_user_that_began_it_is_stopped(
    serve: Serve, connect: Connect, names: Names
) -> None:
    go_on = Event()
    names.addresses["stopped.test"] = ["127.0.0.1"]
    names.before_answer = go_on.wait
    port = serve(echo).port
    first, second = (connect(port, host="stopped.test") for _ in range(2))
    stopped = gevent.spawn(first.connect)
    wait_until(lambda: names.asked)
    waiting = gevent.spawn(second.connect)
    gevent.sleep(0.01)
    stopped.kill()
    go_on.set()
    assert waiting.get()
    assert len(names.asked) == 1


def test_a_look_up_that_takes_too_long_has_a_text_of_its_own_and_is_good_for_the_next_attempt(
    serve: Serve, connect: Connect, rows: Rows, names: Names
) -> None:
    go_on = Event()
    names.addresses["slow.test"] = ["127.0.0.1"]
    names.before_answer = go_on.wait
    client = connect(serve(echo).port, host="slow.test", timeout=0.2)
    assert not client.connect()
    assert rows.counts() == {"connect: TimeoutError": 1}
    assert str(rows[0]["exception"]) == "the name was not looked up within the time-out"
    go_on.set()
    assert client.connect()
    assert len(names.asked) == 1


# -------------------------------------------------------------------------------- tidy addresses


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("localhost.:1", Address("localhost.", 1, False)),
        ("chat.example.com.:6667", Address("chat.example.com.", 6667, False)),
        ("[fe80::1%br-0]:1", Address("fe80::1%br-0", 1, False)),
        ("[fe80::1%eth0.5]:1", Address("fe80::1%eth0.5", 1, False)),
        ("TLS://x:1", Address("x", 1, True)),
        ("Tls://[::1]:1", Address("::1", 1, True)),
        ("TCP://x:1", Address("x", 1, False)),
    ],
)
def test_tidy_addresses_are_understood(written: str, address: Address) -> None:
    assert parse_address(written) == address


@pytest.mark.parametrize("written", ["localhost..:1", ".:1", "[fe80::1%]:1", "ssl://x:1", "x:1:2"])
def test_untidy_ones_are_not(written: str) -> None:
    with pytest.raises(locustfile.SettingError, match="--host"):
        parse_address(written)


def test_the_certificate_of_a_name_is_that_of_the_name_with_a_dot_behind_it(
    connect: Connect, names: Names, certificates: Path, trusting: Context
) -> None:
    names.addresses["localhost."] = ["127.0.0.1"]
    with ServerProcess(echo_apart, certificate=certificates / "good.pem") as server:
        client = connect(server.port, host="localhost.", tls=trusting)
        assert client.send_chat("hello") is not None


# -------------------------------------------------------------------------- no connection to itself

# Of twenty ports, a connection to one of them has that one itself after a few attempts. The second
# half takes another port, as the first one cannot be had again at once.
CONNECT_TO_NOBODY = """
import collections, socket
from locust.event import EventHook
from locustfile import TCPSocketClient

own = 0
for _ in range(300):
    with socket.socket() as plain:
        own += plain.connect_ex(("127.0.0.1", 40010)) == 0
print("connected to itself" if own else "never by chance")

outcomes = collections.Counter()
event = EventHook()
event.add_listener(lambda name, exception, **_: outcomes.update([f"{name}: {exception!r}"]))
for _ in range(300):
    client = TCPSocketClient("127.0.0.1", 40012, event)
    client.connect()
    client.shut_down()
print(dict(outcomes))
"""


@pytest.mark.together
def test_a_socket_that_has_connected_to_itself_is_a_refused_connection(start: Start) -> None:
    running = start(*narrow_network(sys.executable, "-c", CONNECT_TO_NOBODY))
    assert running.ends() == 0, running.output
    by_chance, outcomes = running.output.splitlines()
    assert by_chance == "connected to itself"
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert outcomes == str({f"connect: {refused!r}": 300})


# --------------------------------------------------------------------------- options of the socket


@needs_linux
def test_a_slow_reader_that_reads_steadily_is_no_failure_and_the_kernel_keeps_little_for_it(
    connect: Connect, rows: Rows
) -> None:
    """Else the kernel takes megabytes, and then nothing until a third of them is free."""
    timeout = 1.2
    speed = 600_000  # bytes a second
    with ServerProcess(read_slowly, speed) as server:
        client = connect(server.port, timeout=timeout, echo="none")
        assert client.connect()
        started = perf_counter()
        while perf_counter() < started + 2 * timeout:
            client.send_chat("x" * 1000)
        read = speed * (perf_counter() - started)  # at most
        assert set(rows.counts()) == {"connect", "send_chat"}
        assert client.connected_since is not None
        assert 1000 * rows.counts()["send_chat"] < read + 1_500_000


@needs_linux
@pytest.mark.parametrize("timeout", [1, 300])
def test_a_machine_that_has_vanished_ends_its_connection_whatever_the_time_out(
    serve: Serve, timeout: float
) -> None:
    sock, _ = locustfile.open_socket("127.0.0.1", serve(echo).port, timeout, None, None)
    with sock:
        level = socket.IPPROTO_TCP
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(level, socket.TCP_KEEPIDLE) == 30
        assert sock.getsockopt(level, socket.TCP_KEEPINTVL) == 10
        assert sock.getsockopt(level, socket.TCP_KEEPCNT) == 3
        assert sock.getsockopt(level, socket.TCP_USER_TIMEOUT) == 60_000
        assert sock.getsockopt(level, socket.TCP_NODELAY) == 1


# The constants are seconds here, and not a minute. The machine vanishes with the network's routes.
LOSE_A_MACHINE = """
import subprocess, sys
import gevent
from gevent.server import StreamServer
from locust.event import EventHook
import locustfile

locustfile.TCP_USER_TIMEOUT = 1000
locustfile.KEEPALIVE_IDLE = locustfile.KEEPALIVE_INTERVAL = locustfile.KEEPALIVE_PROBES = 1
event = EventHook()
event.add_listener(lambda name, exception, **_: exception and print(name, type(exception).__name__))
server = StreamServer(("127.0.0.1", 12345), lambda connection, _: connection.recv(99) and None)
server.start()
client = locustfile.TCPSocketClient("127.0.0.1", 12345, event, timeout=60)
client.connect()
gevent.sleep(0.1)
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
if sys.argv[1] == "sending":
    client.send_chat("hello")
for _ in range(300):
    gevent.sleep(0.1)
    if client.connected_since is None:
        break
client.shut_down()
"""


@pytest.mark.together
@pytest.mark.parametrize(
    ("what", "row"),
    [("idle", "disconnect TimeoutError"), ("sending", "echo_response TimeoutError")],
)
def test_a_connection_to_a_machine_that_vanishes_ends(start: Start, what: str, row: str) -> None:
    running = start(*narrow_network(sys.executable, "-c", LOSE_A_MACHINE, what))
    assert running.ends() == 0, running.output
    assert running.output.splitlines() == [row]
