"""Time a chat room's deliveries to the others, and account for every one of them.

    locust -f plugins/delivery.py --host=localhost:12345 --headless --users=20 --run-time=1m
    locust -f locustfile.py,plugins/delivery.py RoomClient --host=localhost:12345 --processes=2

``RoomClient`` is ``ChatClient`` in a room: what a user says goes to the others. For a user class
of your own put this file beside it (and first in the list of ``-f``, if you list it):

    import delivery
    class MyRoomUser(delivery.Delivery, MyUser): ...

If ``MyUser`` is in the same file, name ``MyRoomUser`` in the command, or both run. Your own
``on_message``, ``on_echo`` and ``expected`` have to call super's.

Row ``delivery``: from the making of one user's text (``compose``) to its arrival at another. It has
a time between users of one machine, and is only counted between machines, as their clocks differ.
A user's own echoes are no deliveries, nor is what was said before its login had ended (history),
nor what users send within ``on_connect``. Failures:

    DeliveryLost       it was said, and did not come to a user who was there
    DeliveryRepeated   it had come to this user before; one's own message twice, too
    DeliveryReordered  it came after a later message of its sender; it counts as arrived, too

A message counts as said once its sender's echo or anybody's copy of it has come. It is judged half
a second after ``--chat-timeout``, or later where this process is behind with what has arrived:
every other user of the room in the same process who was logged in when it was made, and has stayed,
has to have it once. A copy that comes after twice that time is not seen to be a repetition. Not
judged is

- who is gone by then, as everybody is at the end of a run;
- what a user missed between its login and the first sign that the server has it in the room: a
  message, or its own echo. Who never hears anything has lost everything;
- the order of what an untagged exchange took for its answer (``echo="any"``, or a function);
- what came from another process, but for repetition and order. The master sees whether a process
  hears nobody of the others.

One line sums up at the end: how many deliveries arrived, were lost, repeated or out of order; the
reach, that is, which share of those that were judged arrived; how many messages were stamped, and
how many of them nobody else heard in time; how many users heard nobody; what was not judged.

Exit code: 1 where a request failed, as Locust has it; where there is a message that nobody else
heard; where nothing arrived at all; where a process heard nobody of the others. Else 0.

A server that sends to the others only wants ``--chat-echo=none``. In mode ``any`` a user's own
messages are not stamped: where all users have it, nothing arrives. A message that was made and
could not be sent (a line break in it) counts as one that nobody else heard.

There are no options but two class attributes. ``room`` names the room of a user, where there are
several. Where a sender's messages go to some only (private messages, changing rooms), and with the
framing ``raw``, where a read may end within a message, set ``numbered = False``: they are timed and
counted, and not judged. What is not for the room, a ping say, is left out by a ``compose`` that
does not call ``super().compose``.
"""

from __future__ import annotations

from locust import env, events, runners  # isort: skip

import itertools
import logging
import math
import random
import re
import sys
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypedDict

import gevent

import locustfile

logger = logging.getLogger(__name__)

GRACE = 0.5  # seconds after the time-out in which what has arrived in time is handled
LOOK_INTERVAL = 0.25  # seconds between two looks at who is there, and what is due
LAGS_KEPT = 8  # looks for which it is remembered how far this process was behind
LONGEST_SLICE = 0.001  # seconds of judging after which others go on
MESSAGES_KEPT = 100_000  # more from other processes come from a server that makes up stamps
SENDERS_KEPT = 10_000  # senders whose order a user follows
ROOMS_REPORTED = 1_000  # rooms of which a worker tells its master
REPORT_TOLERANCE = 1.0  # seconds that a report takes to the master, at most

TICKS = 100_000  # of the clock in a stamp, a second

# Seven digits that all processes share for which ``perf_counter`` is the same clock. Where the
# system has none, those of this process, which the workers of --processes inherit.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE = BOOT_ID.read_text()[:7] if BOOT_ID.exists() else f"{random.getrandbits(28):07x}"

# ~ tag . connection of the sender, 0 if not numbered . ticks of its clock . its machine.
# It begins with a rare character: a search for that costs next to nothing.
STAMP = re.compile(rb"~([0-9a-f]{8}\.\d{1,9})\.(\d{1,9})\.([0-9a-f]{1,14})\.([0-9a-f]{7})")


class DeliveryLost(locustfile.ChatError):
    """A message of another user was said, and did not come."""

    text = "A message of another user did not come."


class DeliveryRepeated(locustfile.ChatError):
    """A message came more than once."""

    text = "A message came again."


class DeliveryReordered(locustfile.ChatError):
    """A message of another user came after one that its sender had sent later."""

    text = "A message of another user came after a later one."


# -------------------------------------------------------------------------------------- the users


class Delivery(locustfile.TCPChatUser):
    """A mixin that reports what other users' messages come to: put it before the user class."""

    abstract = True

    numbered: bool = True
    """Whether all that a user says goes to everybody in its room, so that it can be judged."""

    room: str = ""
    """The name of the user's room, where there are several. It is read at each login."""

    def __init__(self, environment: env.Environment) -> None:
        super().__init__(environment)
        self._session: Session | None = None  # the latest: its connection may have ended
        self._stamped_tag = ""  # the latest
        USERS.add(self)

    def update_session(self) -> Session | None:
        """Begin and end the session as the connection does; return the latest, None in a login."""
        since = self.client.logged_in_since
        session = self._session
        if session is not None and session.since == since:
            return session
        if session is not None and session.is_present:
            session.left_at = perf_counter()
        if since is not None:
            self._session = ACCOUNT.join(self, since)
        elif self.client.connected_since is not None:
            return None
        return self._session

    def compose(self, tag: str, message: str) -> str | bytes:
        """Put a stamp in place of the tag of what is said to the room; not within a login."""
        session = self.update_session()
        if session is None:
            return super().compose(tag, message)
        now = perf_counter()
        connection = session.connection if self.numbered else 0
        stamped_tag = f"~{tag}.{connection}.{int(now * TICKS):x}.{MACHINE}"
        payload = super().compose(stamped_tag, message)
        self._stamped_tag = stamped_tag  # after it: another greenlet may compose meanwhile
        ACCOUNT.stamp(session, tag.encode(), connection, now)
        return payload

    def expected(self, tag: str, message: str) -> str | bytes | None:
        """Expect the stamp too. The client asks just after it has called ``compose``."""
        if self._stamped_tag.startswith(f"~{tag}."):
            tag = self._stamped_tag
        return super().expected(tag, message)

    def on_echo(self, tag: str, payload: bytes, arrived: float) -> None:
        """Record that a message was said; or another user's, that an untagged exchange took."""
        session = self.update_session()
        if session is not None:
            # Its greenlet may be before or behind that of ``on_message``, so it tells no order.
            ACCOUNT.take(session, payload, arrived, is_in_order=False)
        super().on_echo(tag, payload, arrived)

    def on_message(self, payload: bytes, arrived: float) -> None:
        """Report what other users have said."""
        session = self.update_session()
        if session is None:
            super().on_message(payload, arrived)
            return
        session.handled_until = arrived
        try:
            ACCOUNT.take(session, payload, arrived)
            super().on_message(payload, arrived)
        finally:
            session.handled_until = math.inf
            ACCOUNT.note_lag(perf_counter() - arrived)

    def report_delivery(
        self, milliseconds: float | None, size: int, error: locustfile.ChatError | None
    ) -> None:
        """Fire a row ``delivery``."""
        self.environment.events.request.fire(
            request_type="TCP",
            name="delivery",
            response_time=milliseconds,
            response_length=size,
            exception=error,
            context=self.context(),
        )


class RoomClient(Delivery, locustfile.ChatClient):
    """``ChatClient`` in a room."""


USERS: weakref.WeakSet[Delivery] = weakref.WeakSet()


def update_sessions() -> None:
    """See who has logged in, and who has left."""
    for user in list(USERS):
        user.update_session()


def watch_run() -> None:
    """Look again and again who is there, and judge what is due, until another run is watched."""
    while ACCOUNT.watcher is gevent.getcurrent():
        looked_at = perf_counter()
        gevent.sleep(LOOK_INTERVAL)
        now = perf_counter()
        ACCOUNT.note_lag(now - looked_at - LOOK_INTERVAL)
        update_sessions()
        ACCOUNT.judge_due(now)


# ------------------------------------------------------------------------------------ the account


class Room:
    """A room, as far as the users of this process are in it."""

    def __init__(self) -> None:
        self.sessions: set[Session] = set()  # the present ones, and those of pending messages
        # For the comparison with other processes.
        self.elsewhere = 0  # deliveries from there
        self.said_at = -math.inf  # when the latest message was made that was said, and judged
        self.present_since = math.inf  # when the longest present session began
        self.present_until = -math.inf  # when somebody was last there

    def look(self, now: float, pending_since: float) -> None:
        """Note who is there, and forget who had left before all that is pending was made."""
        present = [session.since for session in self.sessions if session.is_present]
        if present:
            self.present_since = min(present)
            self.present_until = now
        self.sessions = {each for each in self.sessions if each.left_at >= pending_since}


class Session:
    """A user in a room, from the end of a login to the end of its connection.

    :param connection: the user's, counted from 1
    :param since: when the login had ended
    """

    def __init__(self, user: Delivery, room: Room, connection: int, since: float) -> None:
        self.user = user
        self.identity = user.client.identity.encode()
        self.room = room
        self.connection = connection
        self.since = since
        self.left_at = math.inf
        # When the server was first seen to have it in the room: a login that awaits no answer ends
        # before the server knows of it.
        self.in_room_since = math.inf
        # All that had arrived by then is handled: a handler at work may hold up what came later.
        self.handled_until = math.inf
        self._last_positions: dict[bytes, tuple[int, int]] = {}  # by the identity of the sender

    @property
    def is_present(self) -> bool:
        """Whether its connection has not ended."""
        return self.left_at == math.inf

    def is_due(self, message: Message) -> bool:
        """Return whether this user was there when somebody else made a message."""
        return self.since < message.made_at < self.left_at and self is not message.sender

    def has_missed(self, message: Message) -> bool:
        """Return whether a message that was due, and has not come in time, had to come."""
        was_in_room = self.in_room_since < message.made_at or self.in_room_since == math.inf
        is_handled = self.handled_until >= message.made_at + self.user.client.timeout
        return self.is_present and was_in_room and is_handled

    def comes_in_order(self, message: Message) -> bool:
        """Return whether no later message of its sender's connection has come before."""
        last = self._last_positions.get(message.identity, (0, 0))
        if message.position < last:
            return message.position[0] < last[0]  # between two connections there is no order
        self._last_positions[message.identity] = message.position
        if len(self._last_positions) > SENDERS_KEPT:
            del self._last_positions[next(iter(self._last_positions))]
        return True


class Message:
    """A stamped message, from its making until some time after it was judged.

    :param connection: the sender's, counted from 1; 0 where the message goes to some only
    :param made_at: when it was made; from another machine, when its first copy came
    :param noted_at: when this process first knew of it
    :param sender: None where it is in another process
    :param has_time: whether it was made by the clock of this machine
    """

    def __init__(
        self,
        tag: bytes,
        connection: int,
        made_at: float,
        noted_at: float,
        room: Room,
        sender: Session | None,
        has_time: bool = True,
    ) -> None:
        self.tag = tag
        self.identity, _, number = tag.partition(b".")
        self.position = (connection, int(number))
        self.is_numbered = connection > 0  # it goes to the whole room, so that it can be judged
        self.made_at = made_at
        self.noted_at = noted_at
        self.room = room
        self.sender = sender
        self.has_time = has_time
        self.is_said = False
        self.is_judged = False
        self.heard_by: set[Session] = set()  # in time; its sender, too


class Account:
    """What one process knows of the messages of a run. All times are ``perf_counter``'s.

    It counts

    - messages: ``stamped``, and ``unheard``, those that nobody else heard in time;
    - deliveries: ``arrived`` (those out of order, too), ``lost``, ``repeated``, ``reordered``;
    - of the arrived: ``reached``, those that were judged; ``elsewhere``, from other processes;
    - what has not arrived, and could not be judged: ``missing``.
    """

    def __init__(self) -> None:
        self.watcher: gevent.Greenlet | None = None  # while a run lasts
        self.begin()

    def begin(self) -> None:
        """Begin a run at nothing."""
        self.counts: Counter[str] = Counter()
        self.timeout = 0.0  # the longest of the users
        self.rooms: dict[str, Room] = {}
        self.logins: Counter[bytes] = Counter()  # by the identities of users
        self.hearing_users: set[bytes] = set()  # who have heard somebody
        self.messages: dict[bytes, Message] = {}  # by tag: the pending and the judged
        self._pending: deque[Message] = deque()  # the oldest first
        self._judged: deque[Message] = deque()
        self._lags = deque([0.0], LAGS_KEPT)  # the longest since each of the last looks

    # -- what users say and hear

    def join(self, user: Delivery, since: float) -> Session:
        """Begin the session of a user that has logged in."""
        room = self.rooms.setdefault(user.room, Room())
        self.timeout = max(self.timeout, user.client.timeout)
        identity = user.client.identity.encode()
        self.logins[identity] += 1
        session = Session(user, room, self.logins[identity], since)
        room.sessions.add(session)
        return session

    def stamp(self, session: Session, tag: bytes, connection: int, now: float) -> None:
        """Record that a user has made a message."""
        self.counts["stamped"] += 1
        if connection:
            self._add(Message(tag, connection, now, now, session.room, session))

    def take(
        self, session: Session, payload: bytes, arrived: float, is_in_order: bool = True
    ) -> None:
        """Record the messages in a payload that has come to a user.

        :param is_in_order: whether all that came earlier has been taken before
        """
        stamps = STAMP.findall(payload)
        if len(stamps) > 1:  # one that stands twice is one message
            stamps = list(dict.fromkeys(stamps))
        for stamp in stamps:
            message = self.messages.get(stamp[0]) or self._foreign_message(session, stamp, arrived)
            if message is not None:
                self._record(session, message, len(payload), arrived, is_in_order)

    def _foreign_message(
        self, session: Session, stamp: Sequence[bytes], arrived: float
    ) -> Message | None:
        """Return the message of an unknown stamp; None where it was judged long ago."""
        tag, connection, ticks, machine = stamp
        has_time = machine == MACHINE.encode()
        made_at = int(ticks, 16) / TICKS if has_time else arrived
        message = Message(tag, int(connection), made_at, arrived, session.room, None, has_time)
        if not message.is_numbered:
            return message
        if message.identity in self.logins:
            return None
        if made_at >= session.since and len(self.messages) < MESSAGES_KEPT:
            self._add(message)
        return message

    def _add(self, message: Message) -> None:
        self.messages[message.tag] = message
        self._pending.append(message)

    def _record(
        self, session: Session, message: Message, size: int, arrived: float, is_in_order: bool
    ) -> None:
        """Record a copy of a message, and report it where it is a delivery."""
        if message.made_at < session.since:  # history
            message.is_said = True
            return
        error: locustfile.ChatError | None = None
        if session in message.heard_by:
            self.counts["repeated"] += 1
            error = DeliveryRepeated()
        elif message.is_judged:  # it came too late
            return
        else:
            if message.is_numbered and message.room is session.room:
                self._note_heard(session, message, arrived)
                if is_in_order and not session.comes_in_order(message):
                    error = DeliveryReordered()
            if message.identity == session.identity:
                return
            self._count_arrival(session, message)
            self.counts["reordered"] += error is not None
        milliseconds = max(0.0, arrived - message.made_at) * 1000 if message.has_time else None
        session.user.report_delivery(milliseconds, size, error)

    def _note_heard(self, session: Session, message: Message, arrived: float) -> None:
        """Note that a message was said, and that the server has both users in the room."""
        message.is_said = True
        message.heard_by.add(session)
        for seen in (session, message.sender):
            if seen is not None and arrived < seen.in_room_since:
                seen.in_room_since = arrived

    def _count_arrival(self, session: Session, message: Message) -> None:
        self.counts["arrived"] += 1
        self.hearing_users.add(session.identity)
        if message.identity not in self.logins:
            self.counts["elsewhere"] += 1
            session.room.elsewhere += 1

    # -- what is due

    def note_lag(self, seconds: float) -> None:
        """Note how far this process is behind, with what has arrived or with its own work."""
        if seconds > self._lags[-1]:
            self._lags[-1] = seconds

    def judge_due(self, now: float) -> None:
        """Judge what is due, the oldest first, and report what was lost."""
        max_age = self.timeout + GRACE + max(self._lags)
        self._lags.append(0.0)
        slice_ends_at = perf_counter() + LONGEST_SLICE
        while self._pending and self._pending[0].noted_at < now - max_age:
            message = self._pending.popleft()
            for session in self._judge(message):
                session.user.report_delivery(None, 0, DeliveryLost())
            if perf_counter() > slice_ends_at:
                gevent.sleep(0)
                slice_ends_at = perf_counter() + LONGEST_SLICE
        while self._judged and self._judged[0].noted_at < now - 2 * max_age:
            del self.messages[self._judged.popleft().tag]
        for room in self.rooms.values():
            room.look(now, now - max_age)

    def end(self) -> None:
        """Count what is pending as not judged: a run is over."""
        now = perf_counter()
        for room in self.rooms.values():
            for session in room.sessions:
                session.left_at = min(session.left_at, now)
        while self._pending:
            self._judge(self._pending.popleft())

    def _judge(self, message: Message) -> list[Session]:
        """Count what has become of a message; return the sessions that have lost it."""
        message.is_judged = True
        self._judged.append(message)
        sender = message.sender
        if sender is None:  # it is in another process
            return []
        others = message.heard_by - {sender}
        not_come = message.room.sessions - message.heard_by
        due = [session for session in not_come if session.is_due(message)]
        missed = [session for session in due if session.has_missed(message)]
        if not message.is_said and not sender.is_present:  # maybe the server never had it
            missed = []
        self.counts["reached"] += sum(session.is_present for session in others)
        self.counts["missing"] += len(due) - len(missed)
        if missed and not others:
            self.counts["unheard"] += 1
        if not message.is_said:
            return []
        if sender.is_present:
            message.room.said_at = message.made_at
        self.counts["lost"] += len(missed)
        return missed


ACCOUNT = Account()


# --------------------------------------------------------------------------------- the end of a run


class Report(TypedDict):
    """What a worker tells its master, each time from the beginning of the run."""

    counts: dict[str, int]
    rooms: dict[str, list[float]]  # the fields of ``RoomReport``, with ages in place of times


class RoomReport(NamedTuple):
    """What a worker knows of a room, in times of the master."""

    elsewhere: float  # deliveries from other processes
    said_at: float  # when the latest message was made that was said, and judged
    present_since: float  # when the longest present session began
    due_until: float  # what was said later may not have come yet

    def has_missed(self, other: RoomReport) -> bool:
        """Return whether nothing came of what was said in another process, and had to come."""
        was_due = self.present_since + REPORT_TOLERANCE < other.said_at < self.due_until
        return was_due and not self.elsewhere


COUNTS_OF_WORKERS: dict[str, Counter[str]] = {}  # on a master, as their latest reports say
ROOMS_OF_WORKERS: dict[str, dict[str, RoomReport]] = {}
PRINTED: weakref.WeakSet[env.Environment] = weakref.WeakSet()  # at a signal Locust may end twice


@events.test_start.add_listener
def begin_run(**_: object) -> None:
    """Begin each run at nothing."""
    COUNTS_OF_WORKERS.clear()
    ROOMS_OF_WORKERS.clear()
    ACCOUNT.begin()
    ACCOUNT.watcher = gevent.spawn(watch_run)


@events.test_stop.add_listener
def end_run(environment: env.Environment, **_: object) -> None:
    """End the account; tell the master, or log the line of a run in the web UI."""
    if ACCOUNT.watcher is None:  # Locust stops also what was never started
        return
    ACCOUNT.watcher = None
    update_sessions()
    ACCOUNT.end()
    if isinstance(environment.runner, runners.WorkerRunner):
        environment.runner.send_message("delivery", dict(make_report()))
    elif environment.web_ui is not None and has_delivery(environment):
        logger.info("%s", result_line(total_counts()))


@events.report_to_master.add_listener
def send_report(data: dict[str, object], **_: object) -> None:
    """Report to the master during a run, as a worker may be lost before the end."""
    if ACCOUNT.watcher is not None:
        data["delivery"] = make_report()


def make_report() -> Report:
    """Return what this process knows of the run."""
    now = perf_counter()
    rooms = {}
    for name, room in itertools.islice(ACCOUNT.rooms.items(), ROOMS_REPORTED):
        times = (room.said_at, room.present_since, room.present_until - ACCOUNT.timeout)
        rooms[name] = [float(room.elsewhere), *(now - time for time in times)]
    return Report(counts=own_counts(), rooms=rooms)


@events.init.add_listener
def take_last_reports(environment: env.Environment, **_: object) -> None:
    """Let a master take what workers send at the end of a run."""
    if isinstance(environment.runner, runners.MasterRunner):
        environment.runner.register_message(
            "delivery", lambda msg, **_: take_report(msg.node_id, {"delivery": msg.data})
        )


@events.worker_report.add_listener
def take_report(client_id: str, data: dict[str, Report], **_: object) -> None:
    """Keep the report of a worker. One that was started without this file sends none."""
    if "delivery" in data:
        report = data["delivery"]
        now = perf_counter()
        COUNTS_OF_WORKERS[client_id] = Counter(report["counts"])
        ROOMS_OF_WORKERS[client_id] = {
            name: RoomReport(elsewhere, *(now - age for age in ages))
            for name, (elsewhere, *ages) in report["rooms"].items()
        }


@events.quitting.add_listener
def decide_exit_code(environment: env.Environment, **_: object) -> None:
    """Fail a run for what no row tells, and have its line printed after Locust's tables."""
    runner = environment.runner
    if runner is None or isinstance(runner, runners.WorkerRunner):
        return
    if runner.state == runners.STATE_INIT or not has_delivery(environment):
        return  # there was no run, or it had no such users
    runner.stop()  # after Ctrl-C the users are still there
    counts = total_counts()
    if has_failed(counts):
        environment.process_exit_code = environment.process_exit_code or 1
    if environment.web_ui is None and environment not in PRINTED:
        PRINTED.add(environment)
        line = result_line(counts)
        environment.events.quit.add_listener(lambda **_: print(line, file=sys.stderr))


def has_delivery(environment: env.Environment) -> bool:
    """Return whether a run has users whose deliveries are accounted for."""
    return any(issubclass(user_class, Delivery) for user_class in environment.user_classes)


def own_counts() -> Counter[str]:
    """Return the counts of this process."""
    counts = ACCOUNT.counts.copy()
    counts["users"] = len(ACCOUNT.logins)
    counts["deaf_users"] = len(ACCOUNT.logins.keys() - ACCOUNT.hearing_users)
    return counts


def total_counts() -> Counter[str]:
    """Return the counts of all processes."""
    counts = sum(COUNTS_OF_WORKERS.values(), own_counts())
    counts["workers"] = len(COUNTS_OF_WORKERS)
    counts["deaf_workers"] = len(deaf_workers())
    return counts


def deaf_workers() -> set[str]:
    """Return the workers that heard nothing of what others have said in one of their rooms."""
    deaf = set()
    for (worker, rooms), (_, others) in itertools.permutations(ROOMS_OF_WORKERS.items(), 2):
        shared = rooms.keys() & others.keys()
        if any(rooms[name].has_missed(others[name]) for name in shared):
            deaf.add(worker)
    return deaf


def has_failed(counts: Counter[str]) -> bool:
    """Return whether there is a failure that no row tells of."""
    return not counts["arrived"] or counts["unheard"] > 0 or counts["deaf_workers"] > 0


def result_line(counts: Counter[str]) -> str:
    """Return the line for the end of a run."""
    young = counts["arrived"] - counts["reached"] - counts["elsewhere"]
    parts = [
        f"{counts['arrived']:,} arrived, {counts['lost']:,} lost, "
        f"{counts['repeated']:,} repeated, {counts['reordered']:,} out of order",
        reach(counts["reached"], counts["lost"]),
        f"{counts['stamped']:,} messages stamped, {counts['unheard']:,} that nobody else heard",
        f"{counts['deaf_users']:,} of {counts['users']:,} users heard nobody",
        f"not judged: {young:,} that arrived, {counts['missing']:,} that did not, "
        f"{counts['elsewhere']:,} from other processes",
    ]
    if counts["deaf_workers"]:
        parts.append(
            f"{counts['deaf_workers']} of {counts['workers']} processes heard nobody of the others"
        )
    return f"delivery: {'; '.join(parts)}"


def reach(reached: int, lost: int) -> str:
    """Return the share of deliveries that arrived, rounded down: one lost of a million shows."""
    judged = reached + lost
    if not judged:
        return "reach unknown"
    return f"reach {reached * 10_000 // judged / 100:.2f} % of {judged:,}"
