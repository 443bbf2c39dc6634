"""``@pytest.mark.together``: the tests of a file that have it run at the same time, a few at once.

They start programs, and wait for them most of the time. Such a test may ask for ``start``,
``serve``, ``tmp_path`` and its parameters, and has these for itself. What it raises is its own.
"""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import inspect
import tempfile
from pathlib import Path

import pytest
from gevent.pool import Pool
from programs import programs
from servers import servers

AT_ONCE = 4  # a Locust that starts has a processor for a second
Outcomes = dict[str, BaseException | None]  # what the tests have raised, by their names
OUTCOMES = pytest.StashKey[Outcomes]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test that has the mark; with the first one of a file, call the others of the file."""
    file = pyfuncitem.getparent(pytest.Module)
    if not is_marked(pyfuncitem) or file is None:
        return None
    if OUTCOMES not in file.stash:
        file.stash[OUTCOMES] = outcomes_of_all_in(file)
    error = file.stash[OUTCOMES][pyfuncitem.name]
    if error is not None:
        raise error
    return True


def is_marked(item: pytest.Item) -> bool:
    """Return whether a test runs together with others."""
    return item.get_closest_marker("together") is not None


def outcomes_of_all_in(file: pytest.Module) -> Outcomes:
    """Call the tests of a file that have the mark and were asked for; return what they raised."""
    outcomes: Outcomes = {}
    pool = Pool(AT_ONCE)
    for item in file.session.items:
        if isinstance(item, pytest.Function) and is_marked(item) and file in item.iter_parents():
            pool.spawn(call, item, outcomes)
    pool.join()
    return outcomes


def call(item: pytest.Function, outcomes: Outcomes) -> None:
    """Call a test with what it asks for, and keep what it raises."""
    outcomes[item.name] = None
    try:
        with servers() as serve, programs() as start, tempfile.TemporaryDirectory() as folder:
            given = {"serve": serve, "start": start, "tmp_path": Path(folder)}
            if hasattr(item, "callspec"):
                given |= item.callspec.params
            names = inspect.signature(item.function).parameters
            item.function(**{name: given[name] for name in names})
    except BaseException as error:  # a skip, too
        outcomes[item.name] = error
