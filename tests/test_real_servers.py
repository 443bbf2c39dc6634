"""Servers that others wrote, each with its example, or with the users of the core."""

from __future__ import annotations

import base64
import datetime
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from clients import Connect
from example_files import (
    LOGIN_ROWS,
    changed,
    client_of,
    command_with,
    run_command,
    trusting_class,
    user_of,
    users_in,
)
from programs import Program, Start, latest_counts, program, stopped, wait_until
from rows import Rows, RunUsers
from servers import free_port, lines

import locustfile
from locustfile import TCPChatUser

StartServer = Callable[..., Program]

(IrcUser,) = users_in(changed("irc"))
(XmppUser,) = users_in(changed("xmpp"))
DELIVERED_USER = """
import delivery
import xmpp

class DeliveredUser(delivery.Delivery, xmpp.XmppUser):
    pass
"""
ROOM = "ncat --verbose --listen --chat 127.0.0.1 PORT"
NGIRCD_SETTINGS = (
    "[Global]",
    "Name = irc.test",
    "Listen = 127.0.0.1",
    "AdminEMail = nobody@localhost",
    "[Options]",
    "DNS = no",
    "Ident = no",
    "PAM = no",
    "[Limits]",
    "MaxConnectionsIP = 0",
    "MaxPenaltyTime = 0",
)
PROSODY_SETTINGS = (
    "run_as_root = true",
    'c2s_interfaces = { "127.0.0.1" }',
    'log = { info = "*console" }',
)


def start_listener(start: Start, command: str, port: int) -> Program:
    """Start a server command with PORT in it; return it once it says that it is listening."""
    name, *arguments = shlex.split(command.replace("PORT", str(port)))
    server = start(program(name), *arguments)
    server.prints("istening on")
    return server


def start_ncat(start: Start, _folder: Path, port: int) -> Program:
    """Start an echo server."""
    command = "ncat --verbose --listen --keep-open 127.0.0.1 PORT --exec /bin/cat"
    return start_listener(start, command, port)


def start_socat(start: Start, _folder: Path, port: int) -> Program:
    """Start another echo server."""
    command = "socat -d -d TCP-LISTEN:PORT,bind=127.0.0.1,fork,reuseaddr,backlog=100 PIPE"
    return start_listener(start, command, port)


def start_ngircd(start: Start, folder: Path, port: int, *settings: str) -> Program:
    """Start an IRC server without look-ups and limits, with more lines of configuration."""
    configuration = folder / "ngircd.conf"
    everything = (*NGIRCD_SETTINGS, "[Global]", f"Ports = {port}", *settings, "")
    configuration.write_text("\n".join(everything))
    installed = Path("/usr/sbin/ngircd")  # not on the path of every user
    command = installed if installed.exists() else program("ngircd")
    server = start(command, "-n", "-f", configuration)
    server.prints("Now listening on")
    return server


def make_certificate(folder: Path) -> None:
    """Write the files of an authority, and of a certificate for this machine with its key."""
    authority = trustme.CA()
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=10)
    # ejabberd sets a timer for the day, which cannot be far away.
    certificate = authority.issue_cert("localhost", "127.0.0.1", not_after=expires)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "localhost.pem")
    certificate.private_key_pem.write_to_path(folder / "localhost.key")


class Account(NamedTuple):
    """Who may log in to Prosody."""

    name: str
    password: str


def start_prosody(
    start: Start,
    folder: Path,
    port: int,
    account: Account | None = None,
    tls: bool = True,
    room_locking: bool = False,
) -> Program:
    """Start an XMPP server with rooms, for one account, or else for everybody.

    Its certificate is of ``ca.pem`` in the folder. It insists on TLS, or has none.
    """
    command = program("prosody")
    authentication = "internal_hashed" if account else "anonymous"
    modules = ('modules_enabled = { "saslauth", "tls" }', 'modules_disabled = { "s2s" }')
    if not tls:
        modules = ('modules_enabled = { "saslauth" }', 'modules_disabled = { "s2s", "tls" }')
    elif not (folder / "ca.pem").exists():
        make_certificate(folder)
    settings = (
        *PROSODY_SETTINGS,
        f'data_path = "{folder}"',
        f'pidfile = "{folder}/prosody.pid"',
        f"c2s_ports = {{ {port} }}",
        f"c2s_require_encryption = {str(tls).lower()}",
        f'ssl = {{ certificate = "{folder}/localhost.pem", key = "{folder}/localhost.key" }}',
        *modules,
        f'authentication = "{authentication}"',
        'VirtualHost "localhost"',
        'Component "rooms.localhost" "muc"',
        f"muc_room_locking = {str(room_locking).lower()}",
    )
    configuration = folder / "prosody.cfg.lua"
    configuration.write_text("\n".join(settings))
    if account:
        registering = ("register", account.name, "localhost", account.password)
        control = program("prosodyctl")
        assert start(control, "--root", "--config", configuration, *registering).ends() == 0
    server = start(command, "--config", configuration, "-F")
    server.prints("Activated service 'c2s'")
    return server


def start_ejabberd(start: Start, folder: Path, port: int) -> Program:
    """Start another XMPP server with rooms, for everybody, that insists on TLS."""
    libraries = next(Path("/usr/lib").glob("*/ejabberd-*"), None)  # where Debian has them
    if libraries is None:
        pytest.skip("ejabberd is not installed")
    make_certificate(folder)
    settings = (
        "hosts: [localhost]",
        f"certfiles: [{folder}/localhost.pem, {folder}/localhost.key]",
        f"ca_file: {folder}/ca.pem",
        "auth_method: [anonymous]",
        "anonymous_protocol: sasl_anon",
        "allow_multiple_connections: true",
        "listen:",
        "  - module: ejabberd_c2s",
        "    ip: 127.0.0.1",
        f"    port: {port}",
        "    starttls_required: true",
        "modules:",
        "  mod_muc: {host: rooms.localhost}",
    )
    configuration = folder / "ejabberd.yml"
    configuration.write_text("\n".join(settings))
    server = start(
        program("erl"),
        *("-noinput", "-mnesia", "dir", f'"{folder}/mnesia"', "-s", "ejabberd"),
        ERL_LIBS=str(libraries.parent),
        EJABBERD_CONFIG_PATH=str(configuration),
        EJABBERD_LOG_PATH=str(folder / "ejabberd.log"),
    )
    server.prints("Start accepting TCP connections")
    return server


SERVERS: dict[str, tuple[StartServer, type[TCPChatUser]]] = {
    "ncat": (start_ncat, locustfile.ChatClient),
    "socat": (start_socat, locustfile.ChatClient),
    "ngircd": (start_ngircd, IrcUser),
    "prosody": (start_prosody, XmppUser),
}
# What is replaced in xmpp.py, where the server wants no TLS.
WITHOUT_TLS = (
    """        self.await_stanza(STARTTLS, rb"<proceed")
        if not self.client.start_tls():
            return  # the row ``starttls`` says why
        self.await_stanza(STREAM, rb"<stream:features")
""",
    "",
)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_killed_and_started_again_is_loaded_again(
    start: Start, run_users: RunUsers, tmp_path: Path, name: str
) -> None:
    start_server, user_class = SERVERS[name]
    port = free_port()
    server = start_server(start, tmp_path, port)
    user_class = trusting_class(user_class, tmp_path / "ca.pem")
    loaded = run_users(user_class, f"127.0.0.1:{port}", users=5, chat_wait="0.05")
    rows = loaded.rows
    wait_until(lambda: rows.counts()["echo_response"] > 20)
    assert set(rows.counts()) <= {*LOGIN_ROWS, "starttls"}

    server.kill()
    wait_until(lambda: rows.counts()["connect: ConnectionRefusedError"] > 0)
    rows.clear()
    start_server(start, tmp_path, port)
    wait_until(lambda: rows.counts()["connect"] >= 5)
    wait_until(lambda: rows.counts()["echo_response"] > 20)
    assert not loaded.runner.exceptions


@pytest.mark.parametrize("start_server", [start_ncat, start_socat])
@pytest.mark.parametrize(
    ("framing", "echo"), [("line", "full"), ("crlf", "full"), (">I", "full"), ("raw", "tag")]
)
def test_an_echo_server_is_spoken_to_in_every_framing(
    start: Start,
    connect: Connect,
    tmp_path: Path,
    start_server: StartServer,
    framing: str,
    echo: str,
) -> None:
    port = free_port()
    start_server(start, tmp_path, port)
    client = connect(port, framing=framing, echo=echo)
    for text in ("hello", "안녕하세요 👋", "x" * 900):
        assert str(client.send_chat(text)).endswith(text)


def test_a_room_that_does_not_echo_shows_other_peoples_messages_and_none_is_taken_for_an_echo(
    start: Start, connect: Connect, rows: Rows
) -> None:
    """``ncat --chat`` sends a line to everybody but its sender, after a banner of its own."""
    port = free_port()
    start_listener(start, ROOM, port)
    heard: list[bytes] = []
    ours = connect(port, timeout=1.0, on_message=lambda payload, _arrived: heard.append(payload))

    def answer(payload: bytes, _arrived: float) -> None:
        if payload.endswith(b"question"):
            other.send_chat("answer")

    other = connect(port, echo="none", on_message=answer)
    assert other.connect()
    assert ours.send_chat("question") is None
    assert any(line.endswith(b"answer") for line in heard)
    assert rows.counts()["echo_response: EchoTimeout"] == 1
    assert rows.counts()["echo_response"] == 0


def test_a_room_is_loaded_without_waiting_for_echoes(start: Start, run_users: RunUsers) -> None:
    port = free_port()
    start_listener(start, ROOM, port)
    options = {"chat_wait": "0.05", "chat_echo": "none"}
    loaded = run_users(locustfile.ChatClient, f"127.0.0.1:{port}", users=5, **options)
    wait_until(lambda: loaded.rows.counts()["send_chat"] > 25)
    assert set(loaded.rows.counts()) == {"connect", "send_chat"}


def listen_in_channel(observer: socket.socket) -> Iterator[bytes]:
    """Log in, join the channel, and yield what is said there."""
    observer.sendall(b"NICK observer\nUSER observer 0 * observer\n")
    for line in lines(observer):
        if line.startswith(b"PING "):
            observer.sendall(b"PONG" + line[4:] + b"\n")
        if line.startswith(b":irc.test 001"):
            observer.sendall(b"JOIN #load\n")
        if b" 366 " in line or b"PRIVMSG" in line:
            yield line


@pytest.mark.together
@pytest.mark.parametrize(
    "settings", [[], ["[Options]", "RequireAuthPing = yes"]], ids=["plain", "PING at the login"]
)
def test_the_command_of_the_irc_example_loads_ngircd(
    start: Start, tmp_path: Path, settings: list[str]
) -> None:
    port = free_port()
    start_ngircd(start, tmp_path, port, *settings)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as observer:
        heard = listen_in_channel(observer)
        assert b" 366 " in next(heard)
        running = run_command(start, command_with("irc", port, users=8))
        talk = re.compile(rb":u[0-9a-f]{8}!\S+ PRIVMSG #load :.")
        for _ in range(25):
            assert talk.match(next(heard))
    wait_until(lambda: latest_counts(running, "echo_response").successes > 20)
    rows = stopped(running)
    assert set(rows) == LOGIN_ROWS
    assert rows["connect"].requests == 8
    assert rows["login"].requests == 16


def test_an_idle_irc_user_outlives_one_who_does_not_answer_the_ping_of_ngircd(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    shortest = ("[Limits]", "PingTimeout = 5", "PongTimeout = 5")  # ngircd takes no less
    start_ngircd(start, tmp_path, port, *shortest)
    idle = client_of(connect, port, IrcUser)
    assert idle.connect()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
        silent.sendall(b"NICK silent\nUSER silent 0 * silent\n")
        heard = list(lines(silent))  # until ngircd hangs up
    assert any(line.startswith(b"PING ") for line in heard)
    assert idle.send_chat("still here")
    assert rows.counts()["connect"] == 1


def test_a_login_without_the_password_of_ngircd_is_a_failed_row(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_ngircd(start, tmp_path, port, "[Global]", "Password = secret")
    client = client_of(connect, port, IrcUser)
    assert client.send_chat("hello") is None
    assert rows.counts() == {"connect": 1, "send_chat": 2, "login: ConnectionClosed": 1}
    name_line = '        self.client.send_chat(f"NICK {name}".encode(), echo="none")'
    password_line = '        self.client.send_chat(b"PASS secret", echo="none")'
    knowing = user_of("irc", (name_line, f"{password_line}\n{name_line}"))
    assert client_of(connect, port, knowing).send_chat("hello")


def test_ngircd_takes_five_connections_of_an_address_unless_it_is_told_otherwise(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    port = free_port()
    start_ngircd(start, tmp_path, port, "[Limits]", "MaxConnectionsIP = 5")
    clients = [client_of(connect, port, IrcUser) for _ in range(6)]
    assert [client.connect() for client in clients] == [True] * 5 + [False]


def test_a_line_over_512_bytes_ends_the_connection_to_ngircd(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_ngircd(start, tmp_path, port)
    client = client_of(connect, port, IrcUser)
    assert "PONG irc.test :[" in str(client.send_chat("x" * 400))
    assert client.send_chat("x" * 512) is None
    assert rows.counts()["echo_response: ConnectionClosed"] == 1


def prosody_client(
    connect: Connect, port: int, folder: Path, user_class: type[TCPChatUser] = XmppUser
) -> locustfile.TCPSocketClient:
    """Return a client that trusts the authority in the folder."""
    return client_of(connect, port, trusting_class(user_class, folder / "ca.pem"))


@pytest.mark.together
def test_the_command_of_the_xmpp_example_loads_a_room_of_prosody_that_insists_on_tls(
    start: Start, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port)
    command = command_with("xmpp", port, users=4)
    running = run_command(start, command, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    wait_until(lambda: latest_counts(running, "echo_response").successes > 20)
    rows = stopped(running)
    assert set(rows) == {*LOGIN_ROWS, "starttls"}
    assert rows["connect"].requests == rows["starttls"].requests == 4
    assert rows["login"].requests == 7 * 4


def test_a_certificate_of_prosody_that_is_not_trusted_is_a_failed_starttls(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port)
    assert not client_of(connect, port, XmppUser).connect()
    failed = {"starttls: SSLCertVerificationError": 1}
    assert rows.counts() == {"connect": 1, "send_chat": 2, "login": 2, **failed}


@pytest.mark.together
def test_every_message_in_a_room_of_ejabberd_is_delivered_to_everybody(
    start: Start, tmp_path: Path
) -> None:
    port = free_port()
    start_ejabberd(start, tmp_path, port)
    (tmp_path / "xmpp_room.py").write_text(DELIVERED_USER)
    files = f"locustfile.py,plugins/delivery.py,examples/xmpp.py,{tmp_path}/xmpp_room.py"
    command = command_with("xmpp", port, users=5)
    command = command.replace("-f examples/xmpp.py", f"-f {files} DeliveredUser --chat-timeout=1")
    running = run_command(start, command, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    wait_until(lambda: latest_counts(running, "delivery").successes > 600)
    rows = stopped(running)
    assert set(rows) == {*LOGIN_ROWS, "starttls", "delivery"}
    assert "reach 100" in running.output
    assert "0 of 5 users heard nobody" in running.output


def test_a_text_with_every_special_character_comes_back_from_prosody_whole(
    start: Start, connect: Connect, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port)
    echo = prosody_client(connect, port, tmp_path).send_chat("안녕 <b> & '\" 👋")
    assert "안녕 &lt;b&gt; &amp; &apos;&quot; 👋</body>" in str(echo)


def test_only_the_first_user_gets_into_a_room_that_prosody_locks(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port, room_locking=True)
    first = prosody_client(connect, port, tmp_path)
    second = prosody_client(connect, port, tmp_path)
    assert first.connect()
    assert not second.connect()
    assert rows.counts()["login: EchoRefused"] == 1


def test_a_message_to_a_room_of_prosody_that_the_user_is_not_in_is_refused_with_its_tag(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port)
    example = changed("xmpp")
    client = prosody_client(connect, port, tmp_path, *users_in(example))
    assert client.connect()
    vars(example)["ROOM"] = "another@rooms.localhost"
    assert client.send_chat("hello") is None
    assert rows.counts()["echo_response: EchoRefused"] == 1


def user_with_password(password: str) -> type[TCPChatUser]:
    """Return the class for XMPP with the login that its first lines show."""
    text = base64.b64encode(f"\0kim\0{password}".encode()).decode()
    plain = ("mechanism='ANONYMOUS'/>\"\nBIND", f"mechanism='PLAIN'>{text}</auth>\"\nBIND")
    return user_of("xmpp", plain)


def test_prosody_takes_a_login_with_the_right_password_alone(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port, Account("kim", "secret"))
    right, wrong = user_with_password("secret"), user_with_password("guess")
    assert prosody_client(connect, port, tmp_path, right).send_chat("hello")
    rows.clear()
    assert prosody_client(connect, port, tmp_path, wrong).send_chat("hello") is None
    counts = rows.counts()
    assert counts["login: EchoRefused"] == 1
    assert counts["send_chat"] == 4  # the stream, STARTTLS, the stream again, the login


def test_a_prosody_without_tls_is_loaded_without_it(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port, tls=False)
    assert client_of(connect, port, user_of("xmpp", WITHOUT_TLS)).send_chat("hello")
    assert rows.counts()["starttls"] == 0


def test_prosody_refuses_an_anonymous_login_where_it_wants_an_account(
    start: Start, connect: Connect, rows: Rows, tmp_path: Path
) -> None:
    port = free_port()
    start_prosody(start, tmp_path, port, Account("kim", "secret"))
    assert not prosody_client(connect, port, tmp_path).connect()
    assert rows.counts()["login: EchoRefused"] == 1
