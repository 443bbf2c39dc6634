"""``@pytest.mark.together``: the tests of a file that have it run at the same time, a few at once.

They start programs, and wait for them most of the time. Such a test may ask for ``start``,
``serve``, ``tmp_path`` and its parameters, which it shares with no other test. pytest-xdist cannot
do this: its worker processes end under gevent's patching.
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import inspect
import tempfile
from pathlib import Path

import gevent
import pytest
from gevent.lock import BoundedSemaphore
from programs import programs
from servers import servers

AT_ONCE = 3  # tests; each Locust that starts takes a second of a processor
TIME_LIMIT = 240  # seconds for one test
RAISED = (Exception, gevent.Timeout, pytest.fail.Exception, pytest.skip.Exception)
Greenlets = dict[str, gevent.Greenlet]  # by the name of the test; each returns what it raised
GREENLETS = pytest.StashKey[Greenlets]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Wait for a test that has the mark; the first one of a file starts all of the file."""
    file = pyfuncitem.getparent(pytest.Module)
    if not is_marked(pyfuncitem) or file is None:
        return None
    if GREENLETS not in file.stash:
        greenlets = file.stash[GREENLETS] = start_all_in(file)
        file.addfinalizer(lambda: gevent.killall(list(greenlets.values())))
    error = file.stash[GREENLETS][pyfuncitem.name].get()
    if error is not None:
        raise error
    return True


def is_marked(item: pytest.Item) -> bool:
    """Return whether a test runs together with others."""
    return item.get_closest_marker("together") is not None


def start_all_in(file: pytest.Module) -> Greenlets:
    """Start the tests of a file that have the mark, and were asked for."""
    free = BoundedSemaphore(AT_ONCE)
    greenlets: Greenlets = {}
    for item in file.session.items:
        if isinstance(item, pytest.Function) and is_marked(item) and file in item.iter_parents():
            greenlets[item.name] = gevent.spawn(call, item, free)
    return greenlets


def call(item: pytest.Function, free: BoundedSemaphore) -> BaseException | None:
    """Call a test with what it asks for, as soon as fewer than AT_ONCE run; return its error."""
    try:
        with free, gevent.Timeout(TIME_LIMIT):
            with servers() as serve, programs() as start, tempfile.TemporaryDirectory() as folder:
                given = {"serve": serve, "start": start, "tmp_path": Path(folder)}
                if hasattr(item, "callspec"):
                    given |= item.callspec.params
                names = inspect.signature(item.function).parameters.keys()
                assert names <= given.keys(), "together, a test may not ask for other fixtures"
                item.function(**{name: given[name] for name in names})
    except RAISED as error:
        return error
    return None
