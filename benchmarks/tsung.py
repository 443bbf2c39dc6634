"""Tsung's raw TCP plugin as a load generator: a closed loop that sends the messages of
``ChatClient``."""

from __future__ import annotations

import random
import shutil

import psutil
from harness import END_LIMIT, Bench, Generator, Server, free_port, kill
from texts import mixed_lines

# ack="local": a user goes on when something was received. The text is checked by nobody, other than
# in locustfile.py.
CONFIGURATION = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE tsung SYSTEM "/usr/share/tsung/tsung-1.0.dtd">
<tsung loglevel="error">
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


def requests() -> str:
    """Return the requests of one round, in a random order that is always the same."""
    lines = mixed_lines()
    random.Random(1).shuffle(lines)
    # Tsung sends each character as one byte, so every byte of the UTF-8 is written as a character.
    texts = ("".join(f"&#{byte};" for byte in line) for line in lines)
    return "\n".join(
        f'        <request><raw data="{text}" ack="local"/></request>' for text in texts
    )


def tsung_is_installed() -> bool:
    """Return whether there is a Tsung to compare with."""
    return all(map(shutil.which, ("tsung", "erl", "epmd")))


class Tsung(Generator):
    """Tsung under way: all users arrive at once and go on until it is ended, for five minutes at
    most.

    The port mapper of Erlang is started here, on a port of its own: else Tsung would leave one
    behind. The Erlang machine is told not to wait busily, which would count as processor time of
    the messages."""

    def __init__(self, bench: Bench, users: int, server: Server) -> None:
        port, home = free_port(), bench.new_file()
        self._mapper = bench.start(["epmd", "-port", port])
        home.mkdir()
        configuration = home / "tsung.xml"
        text = CONFIGURATION.format(port=server.port, users=users, seconds=300, requests=requests())
        configuration.write_text(text, "ascii")
        command = ["tsung", "-n", "-f", str(configuration), "-l", str(home / "log"), "start"]
        flags = "+sbwt none +sbwtdcpu none +sbwtdio none"
        super().__init__(
            bench, users, [server], command, HOME=str(home), ERL_EPMD_PORT=port, ERL_FLAGS=flags
        )

    def finish(self) -> str:
        """End it: the shell script that was started ends with its child, the Erlang machine."""
        for child in psutil.Process(self.process.pid).children():
            child.terminate()
        try:
            self.process.wait(END_LIMIT)
        finally:
            kill(self.process)
            kill(self._mapper)
        return ""
