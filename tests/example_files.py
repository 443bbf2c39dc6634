"""The files of ``examples/``: as modules, as clients without a run, and as their own commands."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import inspect
import re
import shutil
import ssl
import types
from pathlib import Path

from certificates import context_that_trusts
from clients import Connect
from programs import (
    PATH,
    ROOT,
    Program,
    Start,
    content_of,
    documented_commands,
)

from locustfile import TCPChatUser, TCPSocketClient

FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
LOGIN_ROWS = {"connect", "send_chat", "login", "echo_response"}
HOOKS_OF_EXAMPLES = (
    "on_connect",
    "compose",
    "expected",
    "is_refusal",
    "on_message",
)

Change = tuple[str, str]


def source_of(name: str, *changes: Change) -> str:
    """Return the text of an example after changes, each of which replaces a text in it."""
    source = content_of(FOLDER / f"{name}.py")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def changed(name: str, *changes: Change) -> types.ModuleType:
    """Return an example as a module, after changes that its first lines describe."""
    module = types.ModuleType(name)
    source = source_of(name, *changes)
    exec(source, vars(module))
    return module


def users_in(module: types.ModuleType) -> list[type[TCPChatUser]]:
    """Return the user classes that a module defines."""
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, TCPChatUser)
    ]


def user_of(name: str, *changes: Change) -> type[TCPChatUser]:
    """Return the one user class of an example, after changes."""
    module = changed(name, *changes)
    (user_class,) = users_in(module)
    return user_class


def client_of(
    connect: Connect, port: int, user_class: type[TCPChatUser], **settings: object
) -> TCPSocketClient:
    """Return a client with the hooks and the settings of a user class, without a run."""
    user = user_class.__new__(user_class)
    hooks = {name: getattr(user, name) for name in HOOKS_OF_EXAMPLES}
    if "tls_context" in vars(user_class):
        hooks["tls_context"] = user.tls_context
    keywords = {
        "framing": user.framing,
        "echo": user.echo,
        "encoding": user.encoding,
        **settings,
    }
    user.client = connect(port, **hooks, **keywords)
    return user.client


def trusting_class(user_class: type[TCPChatUser], authority: Path) -> type[TCPChatUser]:
    """Return a class like this one that trusts an authority."""

    def tls_context() -> ssl.SSLContext:
        return context_that_trusts(authority)

    name = user_class.__name__
    attributes = {"tls_context": staticmethod(tls_context)}
    return type(name, (user_class,), attributes)


def documented_command(name: str) -> str:
    """Return the command in the first lines of an example, in one line."""
    module = changed(name)
    (command,) = documented_commands(module.__doc__)
    return command


def command_with(name: str, port: int, users: int) -> str:
    """Return the documented command for these users of a server; the test ends the run."""
    command = documented_command(name)
    values = {
        "--host": f"127.0.0.1:{port}",
        "--users": users,
        "--spawn-rate": users,
        "--run-time": "4m",
    }
    for option, value in values.items():
        command, found = re.subn(rf"{option}=\S+", f"{option}={value}", command)
        assert found == 1
    return command


def copied(command: str, folder: Path) -> str:
    """Copy the core and the files of a command into a folder; return the command for that one."""
    shutil.copy(ROOT / "locustfile.py", folder)
    for path in re.findall(r"\w+/\w+\.py", command):
        shutil.copy(ROOT / path, folder)
    return re.sub(r"\w+/(\w+\.py)", r"\1", command)


def run_command(
    start: Start,
    command: str,
    folder: Path = ROOT,
    wait: str = "0.1",
    **variables: str,
) -> Program:
    """Start a command of an example in a shell."""
    shell = ("bash", "-euo", "pipefail", "-c")
    return start(
        *shell,
        f"exec {command}",
        cwd=folder,
        PATH=PATH,
        CHAT_WAIT=wait,
        **variables,
    )
