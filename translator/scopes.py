"""Many hosts: scoped routes, so that a change costs one small route configuration and not all of them.

Envoy rebuilds a route configuration whole: one that holds 10,000 hosts costs it half a second for each
change. So above a number of hosts a proxy gets many small route configurations, the buckets, and for each
host a scope (SRDS) that says in which bucket it is.

* A host is in the bucket of its hash, all of its names in the same one. The number of buckets is fixed, so
  no host ever moves to another one: Envoy (1.40) answers 404 while a scope's bucket is on its way. It also
  makes the buckets the same for all replicas and after a restart.
* A scope's key is compared letter by letter and has no wildcards. The listener turns hosts into lower case;
  a proxy with a wildcard host keeps one route configuration.
* A scope costs Envoy 2 KB, and time when its bucket changes. So the key is what stands before `.svc` in the
  host (translator.hosts.scope_key): all names of a Service have one scope, its bare name another one. All
  hosts with a key in common are in one bucket, which has their names in full.
* Before 1.40, Envoy answers 404 while a listener changes its form, and before 1.38 it never asks for scopes
  then: such a proxy keeps one route configuration.
* Each bucket has the catch-all virtual host (translator.routes). A plain provider, which has no other, adds
  only its scope. It has the bucket of its hash, too: so nothing moves when an LLMRoute takes its host.
* All listeners of a proxy see all scopes (SRDS has no names to ask for). Those of a gateway differ in what
  they serve, so a header that a gateway's listener sets is the other half of its scopes' keys.
* A listener that changes its form drains connections, on which requests are still answered by the other
  form. So around the threshold a proxy is given both forms, of which it asks for what it uses.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

from google.protobuf.message import Message

from crds.problems import ObjectKey
from translator.hosts import scope_key
from translator.memory import Memory
from translator.parts import Collection, Part
from translator.routes import HostRoutes, RouteTable, route_configuration
from xds import protos
from xds.resources import Resource

THRESHOLD = 1000
"""Virtual hosts of a proxy above which its routes are scoped: a change of one route configuration with so
many costs Envoy 50 ms; scopes and buckets for fewer hosts would be more bytes."""

MARGIN = 100
"""How far from the threshold both forms are given."""

BUCKETS = 1024
"""With 10,000 hosts ten in each, 4 KB; one that is in use costs Envoy 26 KB of memory."""


def is_scoped(table: RouteTable) -> bool:
    """Whether the listener of a proxy shall use scoped routes."""
    return len(table.hosts) > THRESHOLD and table.can_be_scoped and not table.has_wildcards


def needs_one(table: RouteTable) -> bool:
    """Whether the proxy is given its routes as one route configuration."""
    return not is_scoped(table) or len(table.hosts) <= THRESHOLD + MARGIN


def needs_scopes(table: RouteTable) -> bool:
    """Whether the proxy is given its routes as scopes and buckets."""
    return len(table.hosts) > THRESHOLD - MARGIN and table.can_be_scoped


def one_configuration(table: RouteTable, memory: Memory) -> Part:
    """Make the one route configuration of a proxy's routes."""
    key = (table.name, table.hosts, id(table.catch_all))
    make = partial(_configuration, table.name, table.hosts, table.catch_all)
    return memory.recall(key, table.catch_all, make)


def scoped_routes(table: RouteTable, memory: Memory) -> Iterator[Part]:
    """Make the scopes and the buckets of a proxy's routes, two parts for each bucket."""
    catch_all = memory.recall(("catch-all", id(table.catch_all)), table.catch_all, partial(_catch_all, table))
    for name, hosts, plain in _buckets(table):
        make = partial(_configuration, name, hosts, catch_all)
        yield memory.recall((name, hosts, id(catch_all)), catch_all, make)
        # By their names: a host whose routes change keeps its scopes, and nobody compares all of them.
        named = tuple((host.names, host.objects) for host in (*hosts, *plain))
        scopes = partial(_scopes, name, named, table.listener)
        yield memory.recall(("scopes", name, table.listener, named), None, scopes)


def _configuration(name: str, hosts: Sequence[HostRoutes], catch_all: Message | None) -> Part:
    found = Collection()
    made = route_configuration(name, hosts, catch_all)
    found.add(Resource.of(made), *(key for host in hosts for key in host.objects))
    return found.part()


def _catch_all(table: RouteTable) -> Message | None:
    """Make the catch-all virtual host of the buckets: the listener has turned hosts into lower case."""
    if table.catch_all is None:
        return None
    made = protos.VirtualHost()
    made.CopyFrom(table.catch_all)
    del made.routes[:-1]
    return cast("Message", made)


def _scopes(
    bucket: str, hosts: Sequence[tuple[Sequence[str], Sequence[ObjectKey]]], listener: str | None
) -> Part:
    found = Collection()
    for names, objects in hosts:
        for key in dict.fromkeys(scope_key(name) for name in names if not name.startswith("*")):
            found.add(_scope(key, bucket, listener), *objects)
    return found.part()


def _scope(host: str, bucket: str, listener: str | None) -> Resource:
    keys = [host, listener] if listener else [host]
    return Resource.of(
        protos.ScopedRouteConfiguration(
            name="/".join(reversed(keys)),
            route_configuration_name=bucket,
            key={"fragments": [{"string_key": key} for key in keys]},
        )
    )


_Hosts = tuple[HostRoutes, ...]


def _buckets(table: RouteTable) -> Iterator[tuple[str, _Hosts, _Hosts]]:
    """Sort the hosts into buckets: those with a virtual host of their own, and the others."""
    buckets: defaultdict[int, tuple[list[HostRoutes], list[HostRoutes]]] = defaultdict(lambda: ([], []))
    for index, of in enumerate((table.hosts, table.plain)):
        for host in of:
            buckets[host.bucket % BUCKETS][index].append(host)
    for number, (hosts, plain) in sorted(buckets.items()):
        yield f"{table.name}/{number}", tuple(hosts), tuple(plain)
