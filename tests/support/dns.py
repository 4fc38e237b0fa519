"""A DNS server for names that only exist in a test (RFC 1035: what a stub resolver asks for, over UDP)."""

import socketserver
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from tests.support.serving import serving_udp

_RESPONSE = 0x8180  # a response, recursion desired and available
_NAME_ERROR = 3
_TYPES = {4: 1, 6: 28}  # IP version -> A, AAAA


@dataclass
class DnsServer:
    """Answers from `records`: name -> addresses. A name that is not in it does not exist (NXDOMAIN)."""

    port: int = 0
    records: Mapping[str, Sequence[str]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    """The names that were asked for."""
    delay: float = 0
    """Seconds before each answer."""

    def answer(self, query: bytes) -> bytes:
        """Return the response to a query."""
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
            at += 1 + query[at]
        question = query[12 : at + 5]  # with type and class
        (kind,) = struct.unpack_from(">H", query, at + 1)
        name = ".".join(labels)
        self.asked.add(name)
        addresses = [ip_address(text) for text in self.records.get(name, ())]
        found = [address.packed for address in addresses if _TYPES[address.version] == kind]
        flags = _RESPONSE if name in self.records else _RESPONSE | _NAME_ERROR
        # Each record: the name (a pointer to the question), type, class IN, TTL, length, address.
        records = [b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 1, len(packed)) + packed for packed in found]
        return query[:2] + struct.pack(">HHHHH", flags, 1, len(found), 0, 0) + question + b"".join(records)


def asking(port: int) -> dict[str, Any]:
    """Return what makes an Envoy ask the server on this port: a part of its bootstrap."""
    resolver = {
        "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
        "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": port}}],
        "dns_resolver_options": {"no_default_search_domain": True},
    }
    return {
        "typed_dns_resolver_config": {"name": "envoy.network.dns_resolver.cares", "typed_config": resolver}
    }


@contextmanager
def running_dns_server(address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[DnsServer]:
    """Run a server until the end of the block, by default on a free port of 127.0.0.1."""
    state = DnsServer()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            query, socket = self.request
            time.sleep(state.delay)
            socket.sendto(state.answer(query), self.client_address)

    with serving_udp(Handler, address) as state.port:
        yield state
