"""How many connections a second there are where names are looked up."""

from __future__ import annotations

import shutil
import subprocess
import sys

from beside import joined, others, to
from harness import (
    ROOT,
    Bench,
    BenchmarkError,
    Locust,
    Look,
    Server,
    Skipped,
    each,
    ratios,
    watch_in_turn,
)
from table import Row

NAME, ADDRESS = "chat.test", "127.0.0.1"
DELAY = 100  # milliseconds that the name server takes
TOOLS = ("unshare", "nsenter", "ip", "mount")
AS_MANY = 0.97  # the rest is what neighbouring turns differ by

Windows = dict[str, list[Look]]  # by the host that the users were given


class SlowNames:
    """A network of its own, whose name server is slow: all that is started from now on is in it.

    :raises Skipped: where this user or this machine cannot make one
    """

    def __init__(self, bench: Bench) -> None:
        missing = [tool for tool in TOOLS if not shutil.which(tool)]
        if missing:
            raise Skipped(f"a network of its own takes {', '.join(missing)}")
        folder = bench.new_path()
        folder.mkdir()
        command = ["unshare", "--net", "--mount", "sh", "benchmarks/slow_names.sh"]
        command += [str(folder), str(DELAY), sys.executable]
        pipe = subprocess.PIPE
        names = bench.start(command, {}, stdin=pipe, stdout=pipe)
        assert names.stdin is not None
        assert names.stdout is not None
        self._requests = names.stdin
        self._replies = names.stdout
        if self._replies.readline() != "ready\n":
            raise Skipped("a network of its own could not be made: that takes root")
        bench.prefix = ["nsenter", f"--target={names.pid}", "--net", "--mount", f"--wd={ROOT}"]

    def questions(self) -> int:
        """Return how many questions the name server was asked."""
        self._requests.write("\n")
        self._requests.flush()
        return int(self._replies.readline())


def start_visitors(bench: Bench, host: str) -> Locust:
    """Return users under way who connect, say one thing and leave, again and again."""
    server = Server(bench)
    server.host = f"{host}:{server.port}"
    options = ("--chat-wait", "0", "Visitor")
    return Locust(bench, 100, [server], *options, scripts="plugins/lurkers.py")


def look_up(bench: Bench) -> list[Row]:
    """Connections a second by a name that takes 100 ms to look up, and by address."""
    names = SlowNames(bench)
    windows: Windows = {NAME: [], ADDRESS: []}
    for _ in range(bench.pick(3, 1)):
        generators = {host: start_visitors(bench, host) for host in windows}
        for measured in watch_in_turn(generators, bench.pick(7, 2), seconds=0.8):
            for host, window in measured.items():
                windows[host].append(window)
        for generator in generators.values():
            generator.finish_clean()
    questions = names.questions()
    if not questions:
        raise BenchmarkError("the name server was not asked")
    return [visits_row(windows, questions)]


def visits_row(windows: Windows, questions: int) -> Row:
    """Compare the connections a second, turn by turn; on each, one message is sent."""
    by_name = each(windows[NAME], "rate")
    by_address = each(windows[ADDRESS], "rate")
    beside = joined(
        to(by_name, by_address, "{:,.0f}/s"),
        f"{questions} questions to the name server",
        others(windows[NAME] + windows[ADDRESS]),
    )
    return Row(
        f"connections a second, a name server of {DELAY} ms, over those by address",
        ratios(by_name, by_address),
        "{:.2f} ×",
        least=AS_MANY,
        beside=beside,
    )
