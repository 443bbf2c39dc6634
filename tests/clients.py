"""Clients for the tests: their hooks, what their calls return, and several calls at once."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

from collections.abc import Callable, Iterable
from typing import Any

import gevent

from locustfile import ChatHooks, TCPSocketClient

Connect = Callable[..., TCPSocketClient]
HOOKS = frozenset(name for name in vars(ChatHooks) if not name.startswith("_"))


def hooks_with(**overrides: object) -> ChatHooks:
    """Return hooks with these in place of their defaults, as a class of a user's own has them.

    :param overrides: by name: ``on_message=``, ``heartbeat=``, …
    """
    hooks = ChatHooks()
    for name, override in overrides.items():
        setattr(hooks, name, override)
    return hooks


class Inbox(list[bytes]):
    """What ``on_message`` got, where it is the method ``take``."""

    def take(self, payload: bytes, arrived: float) -> None:
        """Keep a message."""
        self.append(payload)


def text_of(message: object) -> str:
    """Return the text of a message or of its echo, without its tag and what stands before it."""
    text = message.decode() if isinstance(message, bytes) else str(message)
    return text.partition("] ")[2]


def results(greenlets: Iterable[gevent.Greenlet]) -> list[object]:
    """Wait for greenlets; return what each has returned."""
    waiting = list(greenlets)
    gevent.joinall(waiting, timeout=60)
    return [greenlet.value for greenlet in waiting]


def at_once(function: Callable[[Any], object], arguments: Iterable[object]) -> list[object]:
    """Call a function with each argument, all at the same time; return what each call returned."""
    return results(gevent.spawn(function, argument) for argument in arguments)
