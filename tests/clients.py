"""Clients for the tests: hooks out of functions, and what the fixture ``connect`` returns."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

from collections.abc import Callable

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
