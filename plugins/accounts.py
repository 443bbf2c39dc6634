"""Give each user an account of its own: a row of a CSV file.

    locust -f locustfile.py,plugins/accounts.py,member.py Member --headless --users=50 \\
        --spawn-rate=10 --run-time=1m --host=localhost:12345 --chat-accounts=members.csv

``members.csv``, in UTF-8. Its first line names the columns, the others are accounts::

    name,password
    anna,hush
    ben,"quiet, please"

``member.py``. ``self.account`` is the user's row, a dictionary::

    import accounts
    import locustfile

    class Member(accounts.WithAccount, locustfile.ChatClient):
        def on_connect(self) -> None:
            login = f"/login {self.account['name']} {self.account['password']}"
            self.client.send_chat(login, echo=lambda payload: payload.startswith(b"Welcome"))

List this file before those that import it, and name the class. Workers that are started with
``-f -`` need nothing else: the master alone reads the CSV file, once, before any user starts, and
hands out the rows.

No two running users share a row, whichever process or machine they run on. A user keeps its row
until it has ended, and its connection with it. The rows of a lost worker go to others when the
master sees that it is missing; should the worker return, those users are stopped. At the start of
a run all rows are free.

A user that finds no row waits for one, up to ``--chat-timeout``: when workers come or go, users
start in one place before others stop elsewhere. (Where ``--stop-timeout`` is longer than that, have
some rows to spare.) Then it ends without having run. A warning says so once a run, and a line at
the end says how often. With an ``on_start`` of its own that does not call ``super()``, it may have
connected by then.

--chat-accounts FILE (CHAT_ACCOUNTS)  the CSV file. It is not in the web form, where anybody could
                                      name files of this machine

Rows: none of its own. Exit code: 1 where a user found no row; 1 before any user starts, with one
line, where the file is missing or wrong; 2 where its name is empty; else Locust's.
"""

from __future__ import annotations

from locust import env, events, runners  # isort: skip

import argparse
import csv
import itertools
import logging
import re
import sys
from collections import deque
from collections.abc import Iterable

import gevent
from gevent.event import AsyncResult
from locust.argument_parser import LocustArgumentParser
from locust.exception import StopUser
from locust.rpc import Message

import locustfile

logger = logging.getLogger(__name__)

COLUMN = re.compile(r"[^\W\d][\w -]*")  # what the name of a column looks like
WATCH_INTERVAL = 0.1  # seconds between two looks for lost workers, well below any time-out

# Messages between the processes of a run; within a single process Locust passes them on, too.
REQUEST = "account_request"  # from a user's process: number, timeout
RELEASE = "account_release"  # from a user's process: number
ANSWER = "account_answer"  # to a user's process: number, account or None
WITHDRAWAL = "account_withdrawal"  # to a user's process: numbers

Account = dict[str, str]


# -------------------------------------------------------------------------------------- the option


def parse_path(text: str) -> str:
    """Return the name of a file; raise ``ArgumentTypeError`` for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name: use that of a CSV file")
    return text


@events.init_command_line_parser.add_listener
def add_option(parser: LocustArgumentParser) -> None:
    """Add the option to Locust's."""
    try:
        parser.add_argument(
            "--chat-accounts",
            metavar="<file>",
            env_var="CHAT_ACCOUNTS",
            type=parse_path,
            help="CSV file with a header; each user has a row of its own",
            include_in_web_ui=False,
        )
    except argparse.ArgumentError:  # two copies of this module
        sys.exit("locust: error: list plugins/accounts.py before the files that import it")


@events.init.add_listener
def prepare(environment: env.Environment, **_: object) -> None:
    """Take part in the messages; end Locust with one line where the file is missing or wrong."""
    runner = environment.runner
    if runner is None:
        return
    if not isinstance(runner, runners.MasterRunner):  # it runs users
        runner.register_message(ANSWER, on_answer)
        runner.register_message(WITHDRAWAL, on_withdrawal)
    if isinstance(runner, runners.WorkerRunner):  # the master has the file
        return
    options = vars(environment.parsed_options) if environment.parsed_options else {}
    path: str | None = options.get("chat_accounts")
    try:
        if path is not None:
            AccountPool(runner, path, read_accounts(path))
        elif any(issubclass(user_class, WithAccount) for user_class in environment.user_classes):
            raise ValueError("--chat-accounts is missing: add --chat-accounts=FILE, a CSV file")
    except ValueError as error:
        locustfile.refuse_to_start(environment, error)


# ---------------------------------------------------------------------------------------- the file


def read_accounts(path: str) -> list[Account]:
    """Return the rows of a CSV file by the names of their columns.

    :raises ValueError: where it cannot be read or is wrong; no field of it is in the text, as
        there are passwords among them
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return accounts_in(file)
    except OSError as error:
        fault = error.strerror or "it cannot be read"
    except UnicodeDecodeError:
        fault = "it is not in UTF-8"
    except (ValueError, csv.Error) as error:
        fault = str(error)
    raise ValueError(f"--chat-accounts={path}: {fault}")


def accounts_in(file: Iterable[str]) -> list[Account]:
    """Return the rows below the header by the names of their columns.

    :raises ValueError: where the header or a row is wrong
    """
    reader = csv.reader(file, strict=True)
    columns: list[str] = next(reader, [])
    are_names = bool(columns) and all(map(COLUMN.fullmatch, columns))
    if not are_names or len(set(columns)) < len(columns):
        raise ValueError("its first line has to name the columns, such as name,password")
    accounts: list[Account] = []
    line_of: dict[tuple[str, ...], int] = {}
    for row in reader:
        line = reader.line_num
        if not row:  # an empty line
            continue
        if len(row) != len(columns):
            raise ValueError(f"line {line}: {len(row)} fields, where the header has {len(columns)}")
        first_line = line_of.setdefault(tuple(row), line)
        if first_line != line:
            raise ValueError(f"line {line}: the same row as line {first_line}")
        accounts.append(dict(zip(columns, row, strict=True)))
    if not accounts:
        raise ValueError("it has no rows below its header")
    return accounts


# ------------------------------------------------------------------ the process that has the file


Ticket = tuple[str, int]  # a worker and the number of a request, which it never uses again


class AccountPool:
    """The rows, and which request has which: with the master, or with the only process.

    :param runner: of this process
    :param path: of the file, for the messages
    :param accounts: its rows
    """

    def __init__(self, runner: runners.Runner, path: str, accounts: list[Account]) -> None:
        self._runner = runner
        self._path = path
        self._accounts = accounts
        self._free = deque(accounts)  # the row that has been free for longest is lent first
        self._lent: dict[Ticket, Account] = {}
        self._waiting: dict[Ticket, None] = {}  # in the order of the requests
        self._refused = 0  # requests that found no row
        runner.register_message(REQUEST, self._on_request)
        runner.register_message(RELEASE, self._on_release)
        hooks = runner.environment.events
        hooks.test_start.add_listener(self._free_all)
        hooks.test_stopping.add_listener(self._refuse_waiting)
        hooks.quitting.add_listener(self._fail_run)
        hooks.quit.add_listener(self._print_line)
        if isinstance(runner, runners.MasterRunner):
            runner.greenlet.spawn(self._watch_workers, runner.clients)

    def _on_request(self, msg: Message, **_: object) -> None:
        ticket = (msg.node_id, msg.data["number"])
        self._waiting[ticket] = None
        self._lend()
        if ticket in self._waiting:
            gevent.spawn_later(msg.data["timeout"], self._refuse, ticket)

    def _on_release(self, msg: Message, **_: object) -> None:
        self._take_back((msg.node_id, msg.data["number"]))
        self._lend()

    def _lend(self) -> None:
        """Give the free rows to those who have waited for longest."""
        while self._free and self._waiting:
            ticket = next(iter(self._waiting))
            del self._waiting[ticket]
            self._lent[ticket] = self._free.popleft()
            self._answer(ticket, dict(self._lent[ticket]))  # a user may change its own

    def _answer(self, ticket: Ticket, account: Account | None) -> None:
        worker, number = ticket
        self._runner.send_message(ANSWER, {"number": number, "account": account}, worker)

    def _take_back(self, ticket: Ticket) -> None:
        """Forget a request, which may be one of an earlier run."""
        self._waiting.pop(ticket, None)
        if ticket in self._lent:
            self._free.append(self._lent.pop(ticket))

    def _refuse(self, ticket: Ticket) -> None:
        """Tell a request that has waited for the time-out that there is no row."""
        if ticket not in self._waiting:
            return
        if self._refused == 0:
            logger.warning(
                "all rows of %s are in use (%d), and users wait for one (%d): "
                "those who find none within the time-out do not run",
                self._path,
                len(self._accounts),
                len(self._waiting),
            )
        self._refused += 1
        del self._waiting[ticket]
        self._answer(ticket, None)

    def _watch_workers(self, clients: runners.WorkerNodes) -> None:
        """Take back what lost workers have."""
        while True:
            for node in clients.missing:
                self._withdraw(node.id)
            gevent.sleep(WATCH_INTERVAL)

    def _withdraw(self, worker: str) -> None:
        """Take back all that a worker has, which hears of it should it come back."""
        tickets = [ticket for ticket in (*self._lent, *self._waiting) if ticket[0] == worker]
        if not tickets:
            return
        for ticket in tickets:
            self._take_back(ticket)
        numbers = [number for _, number in tickets]
        self._runner.send_message(WITHDRAWAL, {"numbers": numbers}, worker)
        self._lend()

    # -- the run

    def _free_all(self, **_: object) -> None:
        """Begin a run: whatever is lent belongs to an earlier one."""
        self._free = deque(self._accounts)
        self._lent.clear()
        self._waiting.clear()
        self._refused = 0

    def _refuse_waiting(self, **_: object) -> None:
        """End a run: those who wait have not run either."""
        for ticket in list(self._waiting):
            self._refuse(ticket)

    def _fail_run(self, environment: env.Environment, **_: object) -> None:
        """Set the exit code. After a Ctrl-C, the run has not ended yet."""
        self._refuse_waiting()
        if self._refused:
            environment.process_exit_code = environment.process_exit_code or 1

    def _print_line(self, **_: object) -> None:
        """Say how often there was no row."""
        if self._refused:
            print(
                f"accounts: {self._path} has too few rows ({len(self._accounts)}): "
                f"users that found none and did not run: {self._refused}",
                file=sys.stderr,
            )


# ----------------------------------------------------------------------- the processes with users


class WithAccount(locustfile.TCPChatUser):
    """Mixin: a user with an account of its own. The first lines of this file have an example."""

    abstract = True

    account_answer: AsyncResult | None = None
    """The row that was asked for, or None where none came in time."""

    @property
    def account(self) -> Account:
        """The user's row, by the names of its columns.

        Its first use asks for it, and waits until it is there. Where none has become free within
        the time-out, the user is stopped.

        :raises GreenletExit: in the user's own greenlet, or ``StopUser`` in another one, to stop it
        """
        if self.account_answer is None:
            self.account_answer = AsyncResult()
            request_account(self)
        account: Account | None = self.account_answer.get()
        if account is not None:
            return account
        if gevent.getcurrent() is self.greenlet:
            raise gevent.GreenletExit  # Locust logs a StopUser that on_start raises as an error
        raise StopUser

    def on_start(self) -> None:
        """Wait for an account, and connect only then."""
        _ = self.account
        super().on_start()


NUMBERS = itertools.count()
USERS: dict[int, WithAccount] = {}  # of this process, by the numbers of their requests


def request_account(user: WithAccount) -> None:
    """Ask for a row, which is released when the user's greenlet, and so its connection, has ended.

    ``on_answer`` gets it.
    """
    runner = user.environment.runner
    assert runner is not None
    number = next(NUMBERS)

    def release(_: object) -> None:
        if USERS.pop(number, None) is not None:  # else it was withdrawn
            runner.send_message(RELEASE, {"number": number})

    USERS[number] = user
    user.greenlet.link(release)
    runner.send_message(REQUEST, {"number": number, "timeout": user.client.timeout})


def on_answer(msg: Message, **_: object) -> None:
    """Give a user the row that it has asked for. One that has ended meanwhile releases it."""
    user = USERS.get(msg.data["number"])
    if user is not None and user.account_answer is not None:
        user.account_answer.set(msg.data["account"])


def on_withdrawal(msg: Message, **_: object) -> None:
    """Stop users whose rows others have by now: the master had lost this process."""
    for number in msg.data["numbers"]:
        user = USERS.pop(number, None)
        if user is not None:
            gevent.spawn(user.stop, force=True)
