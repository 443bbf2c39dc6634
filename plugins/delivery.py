"""Time a chat room's deliveries to the others, and account for every one of them.

    locust -f plugins/delivery.py --host=localhost:12345 --headless --users=20 --run-time=1m
    locust -f locustfile.py,plugins/delivery.py RoomClient --host=localhost:12345 --processes=2

``RoomClient`` is ``ChatClient`` in a room: what a user says goes to the others. For a user class
of your own put this file beside it (and first in the list of ``-f``, if you list it):

    import delivery
    class MyRoomUser(delivery.Delivery, MyUser): ...

If ``MyUser`` is in the same file, name ``MyRoomUser`` in the command, or both run.

Rows, besides those of locustfile.py: ``delivery``, from the making of one user's text (``compose``)
to its arrival at another. It has a time between users of one machine, and is only counted between
machines, as their clocks differ. A user's own echoes are no deliveries, nor is what was said before
its ``on_connect`` had ended (history), nor what users send within ``on_connect``. Failures of this
row:

    DeliveryLost       a later message of the same sender came, and this one did not within
                       ``--chat-timeout`` after it
    DeliveryRepeated   it had come before
    DeliveryReordered  it came after a later message of the same sender

So that these can be told, each sender numbers its messages, anew on each connection. The first
that a receiver hears on a connection sets where its account begins. What has not come yet when a
run or a connection ends is not counted, nor does a user who hears nothing of a sender miss
anything: so compare what arrived with send_chat × (users - 1), and have the room to yourself.

One line sums up at the end of a run: arrived, lost, repeated, out of order, and the reach, which
is how many of those that had to arrive have arrived. The exit code is Locust's: 1 where any
request failed, so where any delivery was lost, repeated or out of order; 0 also if nothing arrived
at all.

An ``on_message`` of your own that blocks for longer than the time-out makes late ones look lost.

A server that sends to the others only wants ``--chat-echo=none``; in mode ``any``, messages are not
stamped and nothing is counted.

There are no options but one class attribute: where a sender's messages go to different people
(private messages, changing rooms), set ``numbered = False``. The same goes for the framing
``raw``, where a read may end within a message. A message that the server refuses counts as
lost. One that is not for the room, a ping say, is left out by a ``compose`` that does not call
``super().compose``. Your own ``on_message``, ``is_refusal`` and ``expected`` have to call super's.
"""

from __future__ import annotations

from locust import env, events, runners  # isort: skip

import functools
import logging
import random
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

import gevent

import locustfile

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

TICKS = 100_000  # of the clock in a stamp, a second
SENDERS_KEPT = 10_000  # connections of senders whose messages a receiver accounts for
NUMBERS_KEPT = 10_000  # missing messages that a receiver watches; more come from a broken server
MACHINES_KEPT = 1_000  # other machines whose clocks a process follows

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: one for all who share the clock


def machine_mark() -> bytes:
    """Return seven digits that all processes have for which ``perf_counter`` is the same clock.

    Where the system has none, those of this process, which the workers of --processes inherit.
    """
    if BOOT_ID.exists():
        return BOOT_ID.read_bytes()[:7]
    return f"{random.getrandbits(28):07x}".encode()


MACHINE = machine_mark()

# ~ tag . connection of the sender . number on it, 0 for none . ticks of its clock . its machine.
# It begins with a rare character: a search for that costs next to nothing.
STAMP = re.compile(
    rb"~([0-9a-f]{8})\.\d{1,9}\.(\d{1,9})\.(\d{1,9})\.([0-9a-f]{1,14})\.([0-9a-f]{7})"
)

# What the clock of each other machine showed when the latest message was sent that any user of
# this process has heard. So a user knows which messages of theirs are older than its login.
LATEST_HEARD: dict[bytes, int] = {}


class DeliveryLost(locustfile.ChatError):
    """A message of another user never came, though a later one did."""


class DeliveryRepeated(locustfile.ChatError):
    """A message of another user came again."""


class DeliveryReordered(locustfile.ChatError):
    """A message of another user came after a later one."""


class Tally:
    """What came of the deliveries of a run, in this process or in all."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin at nothing."""
        self.arrived = 0  # those out of order too
        self.lost = 0
        self.repeated = 0
        self.reordered = 0

    def take(self) -> dict[str, int]:
        """Return the counts, and begin at nothing."""
        counts = dict(vars(self))
        self.reset()
        return counts

    def add(self, counts: dict[str, int]) -> None:
        """Add the counts of another process."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)

    def summary(self) -> str:
        """Return the line for the end of a run."""
        expected = self.arrived + self.lost
        if not expected:
            return "delivery: no message of another user arrived"
        reach = self.arrived / expected
        # Rounded down: one lost of a million is not 100 %.
        return (
            f"delivery: {self.arrived:,} arrived, {self.lost:,} lost, {self.repeated:,} repeated, "
            f"{self.reordered:,} out of order; reach {int(reach * 10_000) / 100:.2f} %"
        )


TALLY = Tally()


class Outcome(Enum):
    """What the account says of a numbered message that has come."""

    ARRIVED = 1
    REORDERED = 2
    REPEATED = 3
    IGNORED = 4


class Series:
    """What a receiver has heard of one connection of a sender: the numbers in a row."""

    __slots__ = ("first", "next")

    def __init__(self, number: int) -> None:
        self.first = number  # the lowest that the account covers
        self.next = number  # the one above the highest that has come


class Ledger:
    """The account of what a receiver hears on one connection."""

    __slots__ = ("_lost", "_older", "_series", "_since_ticks", "_taken", "missing", "since")

    def __init__(self) -> None:
        self.since = perf_counter()  # what was sent earlier is history
        self._since_ticks = int(self.since * TICKS)
        self._older = dict(LATEST_HEARD)  # the same, by the clocks of other machines
        self._series: dict[bytes, Series] = {}  # the last to be heard comes last
        # Gaps: what is missing, and the time since when; the oldest come first.
        self.missing: dict[tuple[Series, int], float] = {}
        self._lost: dict[tuple[Series, int], None] = {}
        self._taken: dict[tuple[Series, int], None] = {}

    def is_history(self, machine: bytes, ticks: int) -> bool:
        """Return whether a message is known to have been sent before this account began."""
        if machine == MACHINE:
            return ticks < self._since_ticks
        latest = LATEST_HEARD.get(machine)
        if latest is None:
            if len(LATEST_HEARD) < MACHINES_KEPT:
                LATEST_HEARD[machine] = ticks
        elif ticks > latest:
            LATEST_HEARD[machine] = ticks
        return ticks <= self._older.get(machine, -1)

    def enter(
        self,
        sender: bytes,
        number: int,
        arrived: float | None,
        *,
        may_be_history: bool,
    ) -> Outcome:
        """Enter a message that has come, and return what it is.

        :param arrived: None where it is not known when it came among the others
        """
        series = self._series.pop(sender, None) or self._begin_series(number)
        self._series[sender] = series
        if arrived is None:
            self.missing.pop((series, number), None)
            remember(self._taken, (series, number))
            return Outcome.ARRIVED
        if number == series.next:
            series.next += 1
            return Outcome.ARRIVED
        if number > series.next:
            self._open_gap(series, series.next, number, arrived)
            series.next = number + 1
            return Outcome.ARRIVED
        if number >= series.first:
            return self._enter_late(series, number)
        if may_be_history:
            return Outcome.IGNORED
        self._open_gap(series, number + 1, series.first, arrived)
        series.first = number
        return Outcome.REORDERED

    def _begin_series(self, number: int) -> Series:
        """Begin an account at this number; where there are many, forget the longest silent one."""
        if len(self._series) >= SENDERS_KEPT:
            del self._series[next(iter(self._series))]
        return Series(number)

    def _open_gap(self, series: Series, start: int, end: int, since: float) -> None:
        """Note that the numbers from start to before end have not come."""
        free = NUMBERS_KEPT - len(self.missing)
        for number in range(max(start, end - free), end):
            if (series, number) not in self._taken:
                self.missing[series, number] = since

    def _enter_late(self, series: Series, number: int) -> Outcome:
        """Enter a message after a later one of its sender has come."""
        key = (series, number)
        if self.missing.pop(key, None) is not None:
            return Outcome.REORDERED
        if key in self._lost:  # it counts as lost already
            return Outcome.IGNORED
        return Outcome.REPEATED

    def give_up(self, latest: float) -> int:
        """Give up what has been missing since then or longer; return how many messages."""
        count = 0
        while self.missing:
            key = next(iter(self.missing))
            if self.missing[key] > latest:
                break
            del self.missing[key]
            remember(self._lost, key)
            count += 1
        return count


def remember(numbers: dict[tuple[Series, int], None], key: tuple[Series, int]) -> None:
    """Add to a set, and forget what was added first where it is too large."""
    numbers[key] = None
    if len(numbers) > NUMBERS_KEPT:
        del numbers[next(iter(numbers))]


class Delivery(locustfile.TCPChatUser):
    """A mixin that reports what other users' messages come to: put it before the user class."""

    abstract = True

    numbered: bool = True
    """Whether all that a user says goes to the same people, who can tell by its numbers what they
    miss."""

    def __init__(self, environment: env.Environment) -> None:
        # Put around the login itself, so that a class need not call super's ``on_connect``.
        self._log_in = self.on_connect
        self.on_connect = self._enter_room  # type: ignore[method-assign]
        self._connections = 0
        self._number = 0
        self._stamped = ""
        self._ledger: Ledger | None = None  # there is one from the end of a login on
        self._watcher: gevent.Greenlet | None = None
        super().__init__(environment)
        self._own_identity = self.client.identity.encode()
        send = self._new_series_after_error(self.client.send_chat)
        self.client.send_chat = send  # type: ignore[method-assign]

    def _enter_room(self) -> None:
        """Log in, and account for what comes afterwards."""
        self._ledger = None
        self._begin_series()
        self._log_in()
        self._ledger = Ledger()

    # -- the sender

    def _begin_series(self) -> None:
        """Number from 1 again, where the server may not have all that was numbered.

        So a gap is told only where a later message of the same connection came: TCP keeps their
        order, so the server had the missing one.
        """
        self._connections += 1
        self._number = 0

    def _new_series_after_error(
        self, send: Callable[Arguments, Result]
    ) -> Callable[Arguments, Result]:
        """Return send_chat, made to begin a new series where a message may not have been sent.

        It may have been refused by the framing, or its greenlet was stopped before its turn.
        """

        @functools.wraps(send)
        def send_chat(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
            try:
                return send(*arguments, **settings)
            except BaseException:
                self._begin_series()
                raise

        return send_chat

    def compose(self, tag: str, message: str) -> str | bytes:
        """Put a stamp beside the tag of what is said to the room; not of what is sent to log in."""
        self._stamped = tag
        if self._ledger is None:
            return super().compose(tag, message)
        number = 0
        if self.numbered:
            self._number += 1
            number = self._number
        ticks = int(perf_counter() * TICKS)
        stamped = f"~{tag}.{self._connections}.{number}.{ticks:x}.{MACHINE.decode()}"
        payload = super().compose(stamped, message)
        self._stamped = stamped  # after it: another greenlet may compose meanwhile
        return payload

    def expected(self, tag: str, message: str) -> str | bytes | None:
        """Expect the stamp too. The client asks just after it has called ``compose``."""
        return super().expected(self._stamped if tag in self._stamped else tag, message)

    # -- the receiver

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Report what other users have said."""
        for stamp in STAMP.findall(payload):
            self._hear(stamp, len(payload), arrived)
        super().on_message(payload, arrived)

    def is_refusal(self, payload: bytes) -> bool:
        """Count also what an exchange took for its answer: ``any``, or a function, may do so."""
        for stamp in STAMP.findall(payload):
            self._hear(stamp, len(payload), None)
        return super().is_refusal(payload)

    def _hear(self, stamp: tuple[bytes, ...], size: int, arrived: float | None) -> None:
        """Report a message, unless it is this user's own, or history.

        :param stamp: the groups of ``STAMP``
        :param arrived: None where it is not known
        """
        sender, connection, number, hexadecimal_ticks, machine = stamp
        ledger = self._ledger
        if ledger is None or sender == self._own_identity:
            return
        if arrived is not None and arrived < ledger.since:  # on the connection before this one
            return
        ticks = int(hexadecimal_ticks, 16)
        if ledger.is_history(machine, ticks):
            return
        milliseconds = None
        if arrived is not None and machine == MACHINE:
            milliseconds = (arrived - ticks / TICKS) * 1000
        outcome = Outcome.ARRIVED
        if number != b"0":
            outcome = ledger.enter(
                sender + connection, int(number), arrived, may_be_history=machine != MACHINE
            )
            if ledger.missing and self._watcher is None:
                self._watcher = gevent.spawn(self._watch_gaps)
        self._report(outcome, milliseconds, size)

    def _report(self, outcome: Outcome, milliseconds: float | None, size: int) -> None:
        """Count a message that came, and fire its row."""
        if outcome is Outcome.ARRIVED:
            TALLY.arrived += 1
            self._fire(milliseconds, size, None)
        elif outcome is Outcome.REORDERED:
            TALLY.arrived += 1
            TALLY.reordered += 1
            self._fire(milliseconds, size, DeliveryReordered())
        elif outcome is Outcome.REPEATED:
            TALLY.repeated += 1
            self._fire(milliseconds, size, DeliveryRepeated())

    def _fire(self, milliseconds: float | None, size: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="TCP",
            name="delivery",
            response_time=milliseconds,
            response_length=size,
            exception=error,
            context={},
        )

    def _watch_gaps(self) -> None:
        """Report what stays missing, as long as anything is and the connection stands."""
        timeout = self.client.timeout
        try:
            while self._ledger is not None and self._ledger.missing:
                ledger = self._ledger
                oldest = next(iter(ledger.missing.values()))
                gevent.sleep(max(0.01, oldest + timeout - perf_counter()))
                if self.client.connected_since is None:
                    ledger.missing.clear()
                elif ledger is self._ledger:
                    self._report_lost(ledger.give_up(perf_counter() - timeout))
        finally:
            self._watcher = None

    def _report_lost(self, count: int) -> None:
        """Count so many messages as lost, and fire their rows."""
        for _ in range(count):
            TALLY.lost += 1
            self._fire(None, 0, DeliveryLost())


class RoomClient(Delivery, locustfile.ChatClient):
    """``ChatClient`` in a room."""


class Ending:
    """The line at the end of a run, logged once, when the counts of all workers are in."""

    def __init__(self) -> None:
        self._is_due = False

    def log_at(self, seconds: float) -> None:
        """Log the line after so many seconds, or before, where Locust ends."""
        self._is_due = True
        if seconds:
            gevent.spawn_later(seconds, self.log)
        else:
            self.log()

    def log(self, **_: object) -> None:
        """Log the line if it is due."""
        if self._is_due:
            self._is_due = False
            logger.info(TALLY.summary())


ENDING = Ending()
events.quit.add_listener(ENDING.log)


@events.test_start.add_listener
def begin_tally(**_: object) -> None:
    """Begin each run at nothing."""
    ENDING.log()
    TALLY.reset()


@events.report_to_master.add_listener
def report_tally(data: dict[str, object], **_: object) -> None:
    """Tell the master what this worker has counted since its last report."""
    data["delivery"] = TALLY.take()


@events.worker_report.add_listener
def add_tally(data: dict[str, dict[str, int]], **_: object) -> None:
    """Add what a worker has counted."""
    TALLY.add(data.get("delivery", {}))


@events.test_stop.add_listener
def sum_up(environment: env.Environment, **_: object) -> None:
    """Let the line be logged that sums up a run."""
    if not any(issubclass(user_class, Delivery) for user_class in environment.user_classes):
        return
    if isinstance(environment.runner, runners.MasterRunner):  # workers report now and then
        ENDING.log_at(runners.WORKER_REPORT_INTERVAL + 1)
    elif not isinstance(environment.runner, runners.WorkerRunner):
        ENDING.log_at(0)
