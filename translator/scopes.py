"""Many hosts: scoped routes, so that a change costs one small route configuration and not all of them.

Envoy rebuilds a route configuration whole: one that holds 10,000 hosts costs it half a second for each
change. So above a number of hosts a proxy gets many small route configurations, the buckets, and for each
name of a host a scope (SRDS) that says in which bucket it is.

* A host is in the bucket of its hash, all of its names in the same one. The number of buckets is fixed, so
  no host ever moves to another one: Envoy (1.40) answers 404 while a scope's bucket is on its way. It also
  makes the buckets the same for all replicas and after a restart.
* A scope's key is compared letter by letter and has no wildcards. The listener turns hosts into lower case;
  a proxy with a wildcard host keeps one route configuration.
* A listener that changes its form drains connections, on which requests are still answered by the other
  form. So around the threshold a proxy is given both forms, of which it asks for what it uses.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

from translator.memory import Memory
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
    return len(table.hosts) > THRESHOLD and not table.has_wildcards


def needs_one(table: RouteTable) -> bool:
    """Whether the proxy is given its routes as one route configuration."""
    return not is_scoped(table) or len(table.hosts) <= THRESHOLD + MARGIN


def needs_scopes(table: RouteTable) -> bool:
    """Whether the proxy is given its routes as scopes and buckets."""
    return len(table.hosts) > THRESHOLD - MARGIN


def scoped_routes(table: RouteTable, memory: Memory) -> Iterator[tuple[Resource, Sequence[HostRoutes]]]:
    """Make the scopes and the buckets of a proxy's routes, each with the hosts that are in it."""
    for name, hosts in _buckets(table):
        routes, scopes = memory.recall((name, *map(id, hosts)), hosts, partial(_bucket, name, hosts))
        yield routes, hosts
        for host, resources in zip(hosts, scopes, strict=True):
            for resource in resources:
                yield resource, (host,)


def _bucket(name: str, hosts: Sequence[HostRoutes]) -> tuple[Resource, list[list[Resource]]]:
    return (
        Resource.of(route_configuration(name, hosts)),
        [[_scope(domain, name) for domain in host.names if not domain.startswith("*")] for host in hosts],
    )


def _scope(host: str, bucket: str) -> Resource:
    key = {"fragments": [{"string_key": host}]}
    return Resource.of(protos.ScopedRouteConfiguration(name=host, route_configuration_name=bucket, key=key))


def _buckets(table: RouteTable) -> Iterator[tuple[str, Sequence[HostRoutes]]]:
    buckets: defaultdict[int, list[HostRoutes]] = defaultdict(list)
    for host in table.hosts:
        buckets[host.place % BUCKETS].append(host)
    for number, hosts in sorted(buckets.items()):
        yield f"{table.name}/{number}", hosts
