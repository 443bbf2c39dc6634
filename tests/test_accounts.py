"""``plugins/accounts.py``: a row of a CSV file for each user."""

from __future__ import annotations

import locust  # isort: skip  # replaces blocking calls with gevent's

import functools
import logging
import re
import shlex
import signal
import socket
import textwrap
import urllib.request
from collections.abc import Callable
from pathlib import Path

import accounts
import gevent
import pytest
from gevent.event import Event
from gevent.pool import Group
from locust.exception import StopUser
from programs import (
    QUICK_LOCUST,
    ROOT,
    Start,
    WebUI,
    bus_options,
    documented_commands,
    quiet,
    rows_of,
    wait_until,
)
from rows import Run, RunUsers
from servers import Serve, lines

import locustfile

Write = Callable[[str], str]
RunMembers = Callable[..., Run]

DOCUMENTATION = accounts.__doc__ or ""
FILES = "locustfile.py,plugins/accounts.py"
TOO_FEW = (
    r"accounts: \S*members.csv has too few rows \({rows}\): "
    r"users that found none and did not run: {users}"
)


def documented(name: str) -> str:
    """Return the file of that name in the plugin's first lines."""
    indented = re.search(rf"^``{name}``.*::\n\n((?:    .*\n|\n)+)", DOCUMENTATION, re.MULTILINE)
    assert indented is not None
    return textwrap.dedent(indented[1])


class Members:
    """A handler that logs members in, echoes what they say, and notes who shares an account."""

    def __init__(self) -> None:
        self.logins: list[str] = []
        self.present: set[str] = set()
        self.shared: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        """Serve a connection until its client is gone."""
        names: list[str] = []
        try:
            for line in lines(connection):
                if line.startswith(b"/login "):
                    login = line.decode()
                    names.append(login)
                    self.log_in(login)
                    connection.sendall(b"Welcome\n")
                else:
                    connection.sendall(line + b"\n")
        finally:
            self.present.difference_update(names)

    def log_in(self, login: str) -> None:
        """Note a login; the end of an earlier connection may have arrived and not been read."""
        for _ in range(50):
            if login in self.present:
                gevent.sleep(0.01)
        if login in self.present:
            self.shared.append(login)
        self.present.add(login)
        self.logins.append(login)


class Member(accounts.WithAccount, locustfile.ChatClient):
    """Logs in with its account, and stays logged in."""

    wait_time = locust.constant(0.1)

    def on_connect(self) -> None:
        name = self.account["name"]
        self.client.send_chat(f"/login {name}", echo=b"Welcome".__eq__)


@pytest.fixture
def csv_file(tmp_path: Path) -> Write:
    """Return a function that writes a CSV file and returns its name."""

    def write(text: str) -> str:
        path = tmp_path / "members.csv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return str(path)

    return write


@pytest.fixture
def run_members(run_users: RunUsers, serve: Serve, csv_file: Write) -> RunMembers:
    """Return a function that runs users with so many accounts, in the process of the test."""

    def begin(
        user_class: type[Member],
        handler: Members,
        rows: int,
        users: int,
        chat_timeout: str = "60",
    ) -> Run:
        names = "".join(f"user{number}\n" for number in range(rows))
        run = run_users(
            user_class,
            serve(handler).address,
            users,
            chat_timeout=chat_timeout,
            chat_accounts=csv_file(f"name\n{names}"),
        )
        accounts.prepare(run.environment)
        return run

    return begin


# ---------------------------------------------------------------------------------------- the file


def test_a_row_is_a_dictionary_of_its_columns(csv_file: Write) -> None:
    path = csv_file('\ufeff이름,pass-word\r\n\r\nanna,"a, ""b""\n c"\r\nben,\r\n')
    assert accounts.read_accounts(path) == [
        {"이름": "anna", "pass-word": 'a, "b"\n c'},
        {"이름": "ben", "pass-word": ""},
    ]


NO_HEADER = "its first line has to name the columns, such as name,password"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", NO_HEADER),
        ("\nname,password\nanna,hush\n", NO_HEADER),
        ("anna,hush!\nben,hush!\n", NO_HEADER),
        ("name;password\nanna;hush\n", NO_HEADER),
        ("name,password,\nanna,hush,\n", NO_HEADER),
        ("name,name\nanna,hush\n", NO_HEADER),
        ("name,password\n", "it has no rows below its header"),
        ("name,password\nanna,hush\nben\n", "line 3: 1 fields, where the header has 2"),
        ("name,password\nanna,hush,hush\n", "line 2: 3 fields, where the header has 2"),
        ("name,password\nanna,hush\nben,hush\nanna,hush\n", "line 4: the same row as line 2"),
        ('name,password\nanna,"hush\nben,hush\n', "unexpected end of data"),
        ("name,password\nanna,hush\udcff\n", "it is not in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_its_secrets(
    csv_file: Write, text: str, fault: str
) -> None:
    path = csv_file(text)
    with pytest.raises(ValueError, match="accounts") as caught:
        accounts.read_accounts(path)
    assert str(caught.value) == f"--chat-accounts={path}: {fault}"


@pytest.mark.together
@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        ("", 1, "--chat-accounts is missing: add --chat-accounts=FILE, a CSV file"),
        ("--processes=2 --chat-accounts=none.csv", 1, "none.csv: No such file or directory"),
        ("--chat-accounts=plugins", 1, "--chat-accounts=plugins: Is a directory"),
        ("--chat-accounts=", 2, "an empty name: use that of a CSV file"),
    ],
)
def test_a_run_without_its_file_ends_with_one_line_before_any_user_starts(
    arguments: str, exit_code: int, text: str, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "member.py").write_text(documented("member.py"))
    run = start(
        *QUICK_LOCUST,
        *("-f", f"{FILES},{tmp_path / 'member.py'}", "Member"),
        *("--headless", "--host=127.0.0.1:1"),
        *arguments.split(),
        *bus_options(),
    )
    assert run.ends() == exit_code
    (said,) = (line for line in run.output.splitlines() if "INFO" not in line)
    assert said.startswith("locust: error: ")
    assert said.endswith(text)


def test_without_a_user_class_that_needs_accounts_no_file_is_needed(run_users: RunUsers) -> None:
    run = run_users(locustfile.ChatClient, "127.0.0.1:1")
    accounts.prepare(run.environment)


@pytest.mark.together
def test_the_plugin_listed_after_a_file_that_imports_it_is_told_with_one_line(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "member.py").write_text(documented("member.py"))
    files = f"locustfile.py,{tmp_path / 'member.py'},plugins/accounts.py"
    run = start(*QUICK_LOCUST, "-f", files, "Member", PYTHONPATH=str(ROOT / "plugins"))
    assert run.ends() == 1
    assert run.output.splitlines() == [
        "locust: error: list plugins/accounts.py before the files that import it"
    ]


# ------------------------------------------------------------------------------------- one process


def test_users_that_come_and_go_never_share_an_account(run_members: RunMembers) -> None:
    class Careless(Member):
        def on_connect(self) -> None:
            super().on_connect()
            self.account.clear()

    members = Members()
    run = run_members(Careless, members, rows=3, users=3)

    def has(users: int) -> bool:
        return len(members.present) == run.runner.user_count == users

    for users in (3, 1, 3, 0, 2, 3):
        run.runner.start(users, spawn_rate=100)
        wait_until(functools.partial(has, users))
    assert len(members.logins) == 3 + 2 + 2 + 1
    assert not members.shared
    run.environment.events.quitting.fire(environment=run.environment)
    assert run.environment.process_exit_code is None


def test_an_account_is_free_only_when_the_connection_of_its_user_has_ended(
    run_members: RunMembers,
) -> None:
    is_stopping = Event()
    may_stop = Event()

    class SlowToStop(Member):
        def on_stop(self) -> None:
            is_stopping.set()
            may_stop.wait()

    members = Members()
    run = run_members(SlowToStop, members, rows=1, users=1)
    wait_until(lambda: members.present)
    run.runner.start(0, spawn_rate=1)
    is_stopping.wait()
    (second,) = run.runner.spawn_users({"SlowToStop": 1})
    wait_until(lambda: second.account_answer is not None)
    may_stop.set()
    wait_until(lambda: len(members.logins) == 2)
    assert not members.shared


def test_a_user_that_stops_while_it_waits_takes_no_account(run_members: RunMembers) -> None:
    members = Members()
    run = run_members(Member, members, rows=1, users=1)
    wait_until(lambda: members.present)
    (second,) = run.runner.spawn_users({"Member": 1})
    wait_until(lambda: second.account_answer is not None)
    second.stop(force=True)
    run.runner.start(0, spawn_rate=1)
    wait_until(lambda: not members.present)
    run.runner.start(1, spawn_rate=1)
    wait_until(lambda: members.present)


def test_the_greenlets_of_a_user_have_one_account_or_are_stopped(run_members: RunMembers) -> None:
    taken: list[dict[str, str]] = []
    errors: list[BaseException | None] = []

    class OwnStart(Member):
        def on_start(self) -> None:
            readers = [gevent.spawn(lambda: self.account) for _ in range(3)]
            gevent.joinall(readers)
            for reader in readers:
                if reader.successful():
                    taken.append(reader.value)
                else:
                    errors.append(reader.exception)
            taken.append(self.account)

    members = Members()
    run = run_members(OwnStart, members, rows=1, users=2, chat_timeout="1")
    wait_until(lambda: members.present)
    wait_until(lambda: run.runner.user_count == 1)
    first, *others = taken
    assert len(others) == 3
    for account in others:
        assert account is first
    assert [type(error) for error in errors] == [StopUser, StopUser, StopUser]
    assert not run.runner.exceptions


@pytest.mark.parametrize("calls_super", [True, False])
def test_users_without_an_account_stop_without_an_error_and_the_others_go_on(
    run_members: RunMembers, caplog: pytest.LogCaptureFixture, calls_super: bool
) -> None:
    class OwnStart(Member):
        def on_start(self) -> None:
            self.client.connect()

    members = Members()
    user_class = Member if calls_super else OwnStart
    run = run_members(user_class, members, rows=2, users=5, chat_timeout="1")
    wait_until(lambda: run.runner.user_count == 2)
    assert len(members.present) == 2
    assert len(members.logins) == 2
    assert run.count("connect") == (2 if calls_super else 5)
    assert not run.runner.exceptions
    (warning,) = (record for record in caplog.records if record.levelno > logging.INFO)
    said = r"all rows of .* are in use \(2\), and users wait for one \(3\)"
    assert re.search(said, warning.getMessage())


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_users_that_the_end_of_a_run_finds_waiting_fail_it(
    run_members: RunMembers, capfd: pytest.CaptureFixture[str], is_interrupted: bool
) -> None:
    members = Members()
    run = run_members(Member, members, rows=1, users=1)
    wait_until(lambda: members.present)
    (second,) = run.runner.spawn_users({"Member": 1})
    wait_until(lambda: second.account_answer is not None)
    if not is_interrupted:  # after Ctrl-C, Locust decides on the exit code before it stops users
        run.runner.quit()
    run.environment.events.quitting.fire(environment=run.environment)
    run.runner.quit()
    run.environment.events.quit.fire(exit_code=1)
    assert run.environment.process_exit_code == 1
    said = TOO_FEW.format(rows=1, users=1)
    assert re.fullmatch(f"{said}\n", capfd.readouterr().err)


def test_at_the_start_of_a_run_all_accounts_are_free(run_members: RunMembers) -> None:
    members = Members()
    run = run_members(Member, members, rows=1, users=1)
    wait_until(lambda: members.present)
    run.runner.stop()
    wait_until(lambda: not members.present)
    from_before = Member(run.environment)
    from_before.start(Group())
    wait_until(lambda: members.present)
    run.runner.start(1, spawn_rate=1)
    wait_until(lambda: len(members.logins) == 3)
    from_before.stop(force=True)


# --------------------------------------------------------------------------------------- commands


@pytest.mark.together
def test_the_documented_files_and_command(start: Start, serve: Serve, tmp_path: Path) -> None:
    for name in ("member.py", "members.csv"):
        (tmp_path / name).write_text(documented(name))
    members = Members()
    command, *_ = documented_commands(DOCUMENTATION)
    command = re.sub(r"member\.py|members\.csv", rf"{tmp_path}/\g<0>", command)
    _, *given = shlex.split(command)
    run = start(
        *QUICK_LOCUST,
        *given,
        f"--host={serve(members).address}",
        *("--users=2", "--processes=2"),
        *bus_options(),
    )
    wait_until(lambda: len(members.logins) == 2)
    assert run.stop() == 0
    assert sorted(members.logins) == ["/login anna hush", "/login ben quiet, please"]
    assert quiet(run.output)
    assert "accounts: " not in run.output


def member_files(folder: Path, *more_files: str) -> tuple[str, ...]:
    """Return the options that run the documented member, from a folder, with four accounts."""
    (folder / "member.py").write_text(documented("member.py"))
    rows = "".join(f"user{number},hush\n" for number in range(4))
    (folder / "members.csv").write_text(f"name,password\n{rows}")
    files = ",".join((FILES, str(folder / "member.py"), *more_files))
    return "-f", files, "Member", f"--chat-accounts={folder / 'members.csv'}"


@pytest.mark.together
def test_too_few_accounts_for_two_processes_fail_the_run_with_one_line_at_its_end(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    members = Members()
    server = serve(members)
    run = start(
        *QUICK_LOCUST,
        *member_files(tmp_path),
        f"--host={server.address}",
        *("--headless", "--users=7", "--spawn-rate=7", "--run-time=4"),
        *("--processes=2", "--chat-timeout=1"),
        *bus_options(),
    )
    assert run.ends() == 1
    assert server.opened == 4
    assert len(members.logins) == len(set(members.logins)) == 4
    assert rows_of(run.output)["connect"] == (4, 0)
    assert "Traceback" not in run.output
    assert run.output.count("WARNING") == 1
    assert "are in use (4), and users wait for one (" in run.output
    tables, _, after_the_tables = run.output.partition("\nResponse time percentiles")
    assert "\naccounts: " not in tables
    chat, _, said = after_the_tables.partition("\naccounts: ")
    assert "\nchat: " in chat
    assert re.fullmatch(TOO_FEW.format(rows=4, users=3), f"accounts: {said.rstrip()}")


@pytest.mark.together
def test_each_run_in_the_web_ui_has_all_accounts_and_its_form_no_file(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    members = Members()
    web_ui = WebUI()
    running = start(
        *QUICK_LOCUST,
        *member_files(tmp_path),
        f"--host={serve(members).address}",
        "--chat-timeout=1",
        *web_ui.options,
    )
    web_ui.swarm(user_count="5")
    running.prints("are in use (4), and users wait for one (1)")
    web_ui.stop()
    with urllib.request.urlopen(web_ui.address) as page:
        form = page.read().decode()
    assert "chat_timeout" in form
    assert "chat_accounts" not in form
    web_ui.swarm(user_count="4")
    wait_until(lambda: len(members.logins) == 8)
    wait_until(lambda: len(members.present) == 4)
    assert running.stop() == 0
    assert not members.shared
    assert "too few" not in running.output  # said of the last run, as the exit code


@pytest.mark.together
def test_a_lost_workers_accounts_go_to_others_and_its_users_stop_should_it_return(
    start: Start, serve: Serve, tmp_path: Path
) -> None:
    members = Members()
    server = serve(members)
    bus = bus_options()
    master = start(
        *QUICK_LOCUST,
        *member_files(tmp_path, "tests/locustfiles/quick_heartbeat.py"),
        f"--host={server.address}",
        *("--headless", "--users=4", "--spawn-rate=9"),
        *("--master", "--expect-workers=2", "--enable-rebalancing", *bus),
    )
    worker = (*QUICK_LOCUST, "-f", "-", "--worker", *bus)
    frozen = start(*worker, cwd=tmp_path)
    killed = start(*worker, cwd=tmp_path)
    wait_until(lambda: len(members.logins) == 4)

    frozen.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: len(members.logins) == 6)
    assert len(members.shared) == 2
    assert server.open == 6
    frozen.process.send_signal(signal.SIGCONT)
    wait_until(lambda: server.open == 4)

    killed.process.send_signal(signal.SIGKILL)
    wait_until(lambda: len(members.logins) == 10)
    wait_until(lambda: len(members.present) == server.open == 4)
    assert len(members.shared) == 2
    assert master.stop() == 0
    assert frozen.ends() == 0
    assert "accounts: " not in master.output
