"""``tls://``: real certificates, real handshakes, and all the rest as without TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from certificates import Context, secure, server_context
from clients import Connect
from gevent.server import StreamServer
from locust.env import Environment
from programs import (
    LOCUST,
    PATH,
    ROOT,
    STANDALONE,
    Program,
    Start,
    code_blocks,
    latest_counts,
    program,
    quiet,
    rows_of,
    wait_until,
)
from rows import Rows
from servers import (
    Handler,
    Serve,
    Server,
    deaf,
    echo,
    free_port,
    lines,
    reset,
    send_garbage,
    silent,
)

import locustfile
from locustfile import ChatClient, ConnectionClosed, TCPSocketClient

ServeSecurely = Callable[[Callable[[ssl.SSLSocket], object]], Server]

DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"]


@pytest.fixture
def serve_securely(serve: Serve, identity: ssl.SSLContext) -> ServeSecurely:
    """Return a function that starts a server that shakes hands first."""
    return lambda handler: serve(secure(handler, identity))


def connected(
    connect: Connect, server: Server, trusting: Context, **settings: Any
) -> TCPSocketClient:
    client = connect(server.port, tls=trusting, **settings)
    assert client.connect()
    return client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("framing", ["line", ">I", "raw"])
def test_a_message_is_echoed(
    connect: Connect,
    rows: Rows,
    identity: ssl.SSLContext,
    serve_securely: ServeSecurely,
    trusting: Context,
    version: Any,
    framing: str,
) -> None:
    identity.maximum_version = version
    client = connect(serve_securely(echo).port, tls=trusting, framing=framing)
    assert str(client.send_chat("안녕하세요 👋")).endswith("안녕하세요 👋")
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_the_handshake_counts_into_connect(
    serve: Serve, connect: Connect, rows: Rows, identity: ssl.SSLContext, trusting: Context
) -> None:
    def server(connection: socket.socket) -> None:
        gevent.sleep(0.2)
        secure(echo, identity)(connection)

    connected(connect, serve(server), trusting)
    assert rows.named("connect")[0]["response_time"] >= 100


def test_an_echo_in_records_of_one_byte_is_put_together(
    connect: Connect, serve_securely: ServeSecurely, trusting: Context
) -> None:
    def server(connection: ssl.SSLSocket) -> None:
        while data := connection.recv(65536):
            for position in range(len(data)):
                connection.sendall(data[position : position + 1])

    client = connect(serve_securely(server).port, tls=trusting)
    assert client.send_chat("hello") is not None
    assert client.send_chat("hello again") is not None


def test_many_messages_in_one_record_are_told_apart(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely, trusting: Context
) -> None:
    def server(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"welcome\n" * 20)  # in the wake of the handshake
        for line in lines(connection):
            connection.sendall(b"<bob> hi\n" * 50 + line + b"\n<bob> bye\n")

    client = connect(serve_securely(server).port, tls=trusting)
    for _ in range(5):
        assert str(client.send_chat("hello")).endswith("hello")
    assert rows.counts()["echo_response"] == 5


def test_a_message_longer_than_a_record_and_than_the_buffers_of_the_kernel_passes(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely, trusting: Context
) -> None:
    def server(connection: ssl.SSLSocket) -> None:
        prefix = connection.recv(4)
        (length,) = struct.unpack(">I", prefix)
        gevent.sleep(0.2)  # until the client cannot send any more
        received = b""
        while len(received) < length:
            received += connection.recv(65536)
        connection.sendall(prefix + received)

    client = connect(serve_securely(server).port, tls=trusting, framing=">I", timeout=60)
    text = "x" * (1024 * 1024 - 100)
    assert str(client.send_chat(text)).endswith(text)
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}


def test_a_server_that_does_not_read_is_a_failed_send_at_the_timeout(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely, trusting: Context
) -> None:
    client = connected(connect, serve_securely(deaf), trusting, timeout=0.5)
    assert client.send_chat("x" * 8_000_000) is None
    assert rows.counts() == {"connect": 1, "send_chat: TimeoutError": 1}
    assert rows.named("send_chat")[0]["response_time"] >= 500


def test_what_has_come_before_the_send_is_not_the_answer_also_in_several_records(
    connect: Connect, identity: ssl.SSLContext, trusting: Context
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = gevent.spawn(accept_securely, listener, identity)
        client = connect(listener.getsockname()[1], tls=trusting, echo="any", timeout=60)
        assert client.connect()
        with accepted.get() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(10):
                connection.sendall(b"news\n")  # nothing lets the event loop run, so it is unread
            gevent.spawn(lambda: connection.sendall(connection.recv(100).upper()))
            assert client.send_chat("hello") == "HELLO"


def accept_securely(listener: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return the next connection, after its handshake."""
    connection, _ = listener.accept()
    return context.wrap_socket(connection, server_side=True)


def test_a_connection_that_the_server_closes_while_idle_is_a_disconnect(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely, trusting: Context
) -> None:
    connected(connect, serve_securely(lambda connection: connection.unwrap()), trusting)
    wait_until(lambda: rows.named("disconnect"))
    assert rows.counts() == {"connect": 1, "disconnect: ConnectionClosed": 1}


def test_a_connection_that_is_cut_while_an_echo_is_awaited_fails_it_at_once(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely, trusting: Context
) -> None:
    server = serve_securely(lambda connection: connection.recv(1))
    assert connect(server.port, tls=trusting).send_chat("hello") is None
    (row,) = rows.named("echo_response")
    assert isinstance(row["exception"], (ConnectionClosed, ConnectionResetError))


def test_the_server_is_told_of_the_end(
    connect: Connect, serve_securely: ServeSecurely, trusting: Context
) -> None:
    ends: list[object] = []

    def server(connection: ssl.SSLSocket) -> None:
        try:
            ends.append(connection.recv(1))
        except ssl.SSLError as error:  # an end without "close_notify" could be an attacker's
            ends.append(error)

    connected(connect, serve_securely(server), trusting).close()
    wait_until(lambda: ends)
    assert ends == [b""]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("other.pem", "IP address mismatch"), ("expired.pem", "certificate has expired")],
)
def test_a_certificate_that_is_not_valid_is_a_failed_connect(
    serve: Serve,
    connect: Connect,
    rows: Rows,
    certificates: Path,
    trusting: Context,
    name: str,
    reason: str,
) -> None:
    server = serve(secure(echo, server_context(certificates / name)))
    client = connect(server.port, tls=trusting)
    assert client.send_chat("hello") is None
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect: SSLCertVerificationError": 2}
    (text,) = {repr(row["exception"]) for row in rows}
    assert reason in text
    wait_until(lambda: server.open == 0)


def test_an_authority_that_the_system_does_not_know_is_a_failed_connect(
    connect: Connect, rows: Rows, serve_securely: ServeSecurely
) -> None:
    assert not connect(serve_securely(echo).port, tls=ssl.create_default_context).connect()
    assert "certificate verify failed" in repr(rows[0]["exception"])


def close(connection: socket.socket) -> None:
    connection.close()


@pytest.mark.parametrize("ending", [close, reset, send_garbage])
def test_a_handshake_that_breaks_off_is_a_failed_connect(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context, ending: Handler
) -> None:
    def server(connection: socket.socket) -> None:
        connection.recv(100)
        ending(connection)
        connection.close()

    client = connect(serve(server).port, tls=trusting)
    assert not client.connect()
    assert not client.connect()
    assert [row["name"] for row in rows] == ["connect", "connect"]
    (text,) = {repr(row["exception"]) for row in rows}
    assert "secret" not in text
    assert "\x1b" not in text


def test_a_handshake_that_never_ends_is_a_failed_connect_within_the_timeout(
    serve: Serve, connect: Connect, rows: Rows, trusting: Context
) -> None:
    server = serve(silent)
    with gevent.Timeout(15):
        assert not connect(server.port, tls=trusting, timeout=0.3).connect()
    assert rows[0]["response_time"] >= 300
    assert repr(rows[0]["exception"]) == "TimeoutError('no TLS handshake within the time-out')"
    wait_until(lambda: server.open == 0)  # nothing is left open


def test_the_server_name_is_indicated(
    connect: Connect, identity: ssl.SSLContext, serve_securely: ServeSecurely, trusting: Context
) -> None:
    names: list[object] = []
    identity.sni_callback = lambda _socket, name, _context: names.append(name)
    assert connect(serve_securely(echo).port, host="localhost", tls=trusting).connect()
    assert names == ["localhost"]


def test_ipv6_and_its_address_in_the_certificate(
    connect: Connect, rows: Rows, identity: ssl.SSLContext, trusting: Context
) -> None:
    server = StreamServer(("::1", 0), lambda connection, _: secure(echo, identity)(connection))
    try:
        server.start()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert connect(server.server_port, host="::1", tls=trusting).send_chat("hello") is not None
    server.stop()


class Counted:
    """Makes what a factory makes, and counts."""

    def __init__(self, make: Context) -> None:
        self.made = 0
        self._make = make

    def __call__(self) -> ssl.SSLContext:
        self.made += 1
        return self._make()


def test_a_context_of_the_users_own_is_made_once_for_all(
    trusting: Context, serve_securely: ServeSecurely
) -> None:
    contexts = Counted(trusting)

    class SecureChat(ChatClient):
        tls_context = staticmethod(contexts)

    environment = Environment(host=f"tls://localhost:{serve_securely(echo).port}")
    users = [SecureChat(environment) for _ in range(3)]
    assert all(user.client.send_chat("hello") for user in users)
    assert contexts.made == 1
    for user in users:
        user.client.close()


def test_without_tls_in_the_address_no_context_is_made(serve: Serve, trusting: Context) -> None:
    contexts = Counted(trusting)

    class SecureChat(ChatClient):
        tls_context = staticmethod(contexts)

    user = SecureChat(Environment(host=serve(echo).address))
    assert user.client.send_chat("hello") is not None
    user.client.close()
    assert contexts.made == 0


def test_a_context_that_cannot_be_made_is_a_failed_connect_that_says_why(rows: Rows) -> None:
    class Wrong(ChatClient):
        """Its certificate is missing."""

        tls_context = staticmethod(lambda: ssl.create_default_context(cafile="/nowhere/ca.pem"))

    environment = Environment(host="tls://localhost:1")
    environment.events.request.add_listener(lambda **row: rows.append(row))
    assert not Wrong(environment).client.connect()
    assert "No such file" in repr(rows[0]["exception"])


def test_a_client_certificate_can_be_given(
    connect: Connect,
    rows: Rows,
    certificates: Path,
    identity: ssl.SSLContext,
    serve_securely: ServeSecurely,
    trusting: Context,
) -> None:
    identity.verify_mode = ssl.CERT_REQUIRED
    identity.load_verify_locations(certificates / "ca.pem")
    server = serve_securely(echo)

    def with_certificate() -> ssl.SSLContext:
        context: ssl.SSLContext = trusting()
        context.load_cert_chain(certificates / "good.pem")
        return context

    assert connect(server.port, tls=with_certificate).send_chat("hello") is not None
    assert rows.counts() == {"connect": 1, "send_chat": 1, "echo_response": 1}
    assert connect(server.port, tls=trusting).send_chat("hello") is None


def documented(language: str, word: str) -> str:
    """Return the documents' block of code in a language that has this word in it."""
    text = "\n".join(document.read_text("utf-8") for document in DOCUMENTS)
    for block in code_blocks(text, language):
        if word in block:
            return block.strip()
    raise AssertionError(f"no block has {word}")


def listen(start: Start, certificates: Path, options: str) -> str:
    """Start a real TLS server that echoes; return its port."""
    port = str(free_port())
    files = f"cert={certificates}/good.pem,{options}"
    listening = f"OPENSSL-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,backlog=50,{files}"
    start(program("socat"), "-d", "-d", listening, "PIPE").prints("istening on")
    return port


def chats_without_an_error(running: Program, users: int) -> bool:
    """Wait until a run has had echoes, and end it; return whether nothing was amiss."""
    wait_until(lambda: latest_counts(running, "echo_response").successes > users)
    exit_code = running.stop()
    rows = rows_of(running.output)
    has_connected_once = rows["connect"] == (users, 0)
    return exit_code == 0 and has_connected_once and quiet(running.output)


def test_the_documented_command_loads_a_real_server_of_an_authority_in_ssl_cert_file(
    start: Start, certificates: Path
) -> None:
    port = listen(start, certificates, "verify=0")
    command = documented("sh", "tls://").replace("12345", port)
    shutil.copy(ROOT / "locustfile.py", certificates)
    fewer = "--users=5 --spawn-rate=5 --chat-wait=0.1 --run-time=5m"  # the last of each counts
    running = start("bash", "-c", f"exec env {command} {fewer}", cwd=certificates, PATH=PATH)
    assert chats_without_an_error(running, users=5), running.output


def test_the_documented_example_shows_a_client_certificate(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    port = listen(start, certificates, f"verify=1,cafile={certificates}/ca.pem")
    code = documented("python", "load_cert_chain")
    (tmp_path / "certificate_chat.py").write_text(code, "utf-8")
    shutil.copy(certificates / "good.pem", tmp_path / "client.pem")
    shutil.copy(ROOT / "locustfile.py", tmp_path)
    running = start(
        *LOCUST,
        *("-f", "certificate_chat.py", "CertificateChat", "--headless", "--chat-wait=0.1"),
        f"--host=tls://localhost:{port}",
        cwd=tmp_path,
        SSL_CERT_FILE=str(certificates / "ca.pem"),
    )
    assert chats_without_an_error(running, users=1), running.output


def test_the_standalone_mode_speaks_tls(
    start: Start, certificates: Path, serve_securely: ServeSecurely
) -> None:
    host = f"tls://localhost:{serve_securely(echo).port}"
    running = start(*STANDALONE, host, SSL_CERT_FILE=str(certificates / "ca.pem"))
    assert running.ends() == 0
    assert "5 of 5 messages came back" in running.output


def test_the_context_of_the_system_is_the_default() -> None:
    assert locustfile.TCPChatUser.tls_context is ssl.create_default_context
