"""Addresses for servers that are yet to start: nobody else is given them meanwhile."""

import socket
import subprocess
import sys
from itertools import chain, repeat

import pytest

from llmplane import local
from llmplane.local import HTTP_PROXY_PORT, LocalMeshError, free_bind_address, free_port


def choose(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Have these ports tried first, and then the last one for ever."""
    tried = chain(ports, repeat(ports[-1]))
    monkeypatch.setattr(local._random, "randrange", lambda *_: next(tried))


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = free_port(), free_port()
    assert one != other
    choose(monkeypatch, one, other)
    with pytest.raises(LocalMeshError, match=r"127\.0\.0\.1 has no free port"):
        free_port()


def test_a_port_that_is_listened_on_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        choose(monkeypatch, server.getsockname()[1])
        with pytest.raises(LocalMeshError):
            free_port()


def test_another_process_is_not_given_it_as_long_as_this_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from llmplane.local import *; print(free_port(), free_bind_address(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout
        port, address = other.stdout.readline().split()
        assert free_bind_address() != address
        choose(monkeypatch, int(port))
        with pytest.raises(LocalMeshError):
            free_port()
        other.communicate("\n")
    assert free_port() == int(port)


def test_a_server_can_listen_on_what_was_given() -> None:
    for address in (("127.0.0.1", free_port()), (free_bind_address(), HTTP_PROXY_PORT)):
        with socket.create_server(address):
            pass


def test_claims_are_given_back_in_the_end() -> None:
    first = free_port()
    for _ in range(local._MOST_CLAIMS):
        free_port()
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", first))
