"""Other load generators, where this machine has them: Tsung's raw TCP plugin, and tcpkali."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence

import psutil
from harness import Bench, Generator, Server, free_port, kill
from texts import mixed_lines

TSUNG, TCPKALI = "Tsung", "tcpkali"
LIMIT = 300  # seconds after which they end even if nobody ends them
SHARES_PRINTED = (50, 75, 95, 99)  # percentiles
CONFIGURATION = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE tsung SYSTEM "/usr/share/tsung/tsung-1.0.dtd">
<tsung loglevel="error" backend="{backend}">
  <clients><client host="localhost" use_controller_vm="true" maxusers="60000"/></clients>
  <servers><server host="127.0.0.1" port="{port}" type="tcp"/></servers>
  <load duration="{seconds}" unit="second">
    <arrivalphase phase="1" duration="{seconds}" unit="second">
      <users maxnumber="{users}" arrivalrate="{users}" unit="second"/>
    </arrivalphase>
  </load>
  <sessions>
    <session name="chat" probability="100" type="ts_raw">
      <for from="1" to="1000000000" var="round">
{requests}
      </for>
    </session>
  </sessions>
</tsung>
"""
# A user goes on when something was received. The text is checked by nobody, other than in
# locustfile.py.
REQUEST = '<request><raw data="{text}" ack="local"/></request>'
PAUSE = '<thinktime value="{seconds}" random="true"/>'


def installed_peers() -> list[str]:
    """Return the names of those that this machine has."""
    peers = []
    if all(map(shutil.which, ("tsung", "erl", "epmd"))):
        peers.append(TSUNG)
    if shutil.which("tcpkali"):
        peers.append(TCPKALI)
    return peers


class Tsung(Generator):
    """Tsung under way: a closed loop, whose users all arrive at once.

    The port mapper of Erlang is started here, on a port of its own: else Tsung would leave one
    behind. The Erlang machine is told not to wait busily, which would count as processor time of
    the messages.

    :param pause: mean seconds between an answer and the next message
    :param keeps_trips: whether it writes every round trip to its log
    """

    def __init__(
        self, bench: Bench, users: int, server: Server, pause: float, *, keeps_trips: bool
    ) -> None:
        port = free_port()
        self._mapper = bench.start(["epmd", "-port", port], {})
        self._folder = bench.new_path()
        self._folder.mkdir()
        configuration = self._folder / "tsung.xml"
        text = CONFIGURATION.format(
            backend="fullstats" if keeps_trips else "text",
            port=server.port,
            users=users,
            seconds=LIMIT,
            requests="\n".join(self._requests(pause)),
        )
        configuration.write_text(text, "ascii")
        logs = str(self._folder / "logs")
        command = ["tsung", "-n", "-f", str(configuration), "-l", logs, "start"]
        variables = {
            "HOME": str(self._folder),
            "ERL_EPMD_PORT": port,
            "ERL_FLAGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }
        super().__init__(bench, users, [server], command, variables)

    def _requests(self, pause: float) -> list[str]:
        """Return the requests of a round, in a random order that is always the same."""
        lines = mixed_lines()
        random.Random(1).shuffle(lines)
        requests = []
        for line in lines:
            # Tsung sends each character as one byte, so every byte of the UTF-8 is one.
            text = "".join(f"&#{byte};" for byte in line)
            requests.append(REQUEST.format(text=text))
            if pause:
                requests.append(PAUSE.format(seconds=pause))
        return requests

    def finish_clean(self) -> None:
        """End it: the shell script that was started ends with its child, the Erlang machine."""
        for child in psutil.Process(self.process.pid).children():
            child.terminate()
        self.wait()
        kill(self._mapper)

    def round_trips(self) -> Sequence[float]:
        """Return the round trips that it has kept."""
        (log,) = self._folder.glob("logs/*/tsung-fullstats.log")
        lists = re.findall(r"\{sample,request,\s*\[?([^]}]+)", log.read_text())
        return [float(sample) for samples in lists for sample in samples.split(",")]


class Tcpkali(Generator):
    """tcpkali under way: it sends one and the same line, and does not wait for echoes.

    :param rate: messages a second of each user; 0 for as many as possible
    :param seconds: how long it runs and measures round trips, once all users are there; 0 for as
        long as nobody ends it, and without them
    """

    def __init__(
        self, bench: Bench, users: int, server: Server, rate: float, seconds: float
    ) -> None:
        lengths = [len(line) for line in mixed_lines()]
        text = "x" * (sum(lengths) // len(lengths) - 1) + r"\n"
        command = ["tcpkali", "--connections", str(users), "--connect-rate", "1000"]
        command += [
            "--duration",
            f"{seconds or LIMIT:.0f}s",
            "--nagle=off",
            "-e",
            "--message",
            text,
        ]
        if rate:
            command += ["--message-rate", f"{rate:g}"]
        if seconds:
            command += ["--latency-marker", r"\n"]
            command += ["--latency-percentiles", ",".join(map(str, SHARES_PRINTED))]
        self._ends_by_itself = seconds > 0
        super().__init__(bench, users, [server], [*command, server.host], {})

    def finish_clean(self) -> None:
        """End it. Where it measures round trips it ends by itself, and prints them then."""
        if self._ends_by_itself:
            self.wait()
        else:
            kill(self.process)

    def percentiles(self) -> dict[int, float]:
        """Return the percentiles that it has printed."""
        found = re.search(r"latency at percentiles: ([\d./]+) ms", self.wait())
        if found is None:
            raise self.error("it printed no percentiles")
        values = map(float, found[1].split("/"))
        return dict(zip(SHARES_PRINTED, values, strict=True))
