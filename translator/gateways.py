"""Gateway -> what a gateway proxy opens: ports, their filter chains, and whose routes each of them takes.

Merging and conflicts follow Istio (pilot/pkg/model/gateway.go MergeGateways).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from crds.core import Service
from crds.gateway import Gateway, Server, ServerTLSSettings
from crds.problems import Finding, ObjectKey, Path
from translator.certificates import Certificates, MissingWorkloadCertificateError, certificates
from translator.proxy import Proxy, ProxyType, WorkloadCertificate
from translator.secrets import MissingSecretError
from translator.world import World

OWN_PORTS = {15021: "the health check", 15090: "statistics"}
"""What every proxy itself listens on, as Istio's proxies do."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server of a Gateway, by its position."""

    gateway: Gateway
    index: int

    @property
    def server(self) -> Server:
        """The server."""
        return self.gateway.spec.servers[self.index]


@dataclass(slots=True)
class Chain:
    """A filter chain of a listener: the servers whose hosts one route configuration serves."""

    routes: str
    """Istio's name of the route configuration."""
    servers: list[Served]
    tls: ServerTLSSettings | None = None
    """None: plain HTTP, and the only chain of its listener."""
    certificates: Certificates | None = None
    """What ``tls`` refers to."""
    others: tuple[str, ...] = ()
    """Names of other chains of the listener below a wildcard of this one."""

    @property
    def server_names(self) -> tuple[str, ...]:
        """The names that TLS clients ask for; none: whatever they ask for."""
        names = self.servers[0].server.names
        return () if self.tls is None or "*" in names else names

    def takes(self, name: str) -> bool:
        """Whether TLS clients that ask for this name (or names, with a wildcard) come by this chain."""

        def closeness(pattern: str) -> tuple[bool, int]:
            return pattern == name, len(pattern)

        # All that is asked for is at least as far down as "*": IPv6 addresses are written otherwise in Host.
        own = ("*", *(pattern for pattern in self.server_names if _covers(pattern, name)))
        others = (pattern for pattern in self.others if _covers(pattern, name))
        return max(map(closeness, own)) > max(map(closeness, others), default=(False, 0))


@dataclass(slots=True)
class GatewayListener:
    """An address and port that a gateway opens."""

    address: str
    port: int
    chains: list[Chain] = field(default_factory=list)
    left_out: list[Chain] = field(default_factory=list)
    """Chains whose certificates are missing. Their names stay theirs: a wildcard of another chain, that may
    ask clients for less, does not take their place."""

    @property
    def claims(self) -> list[Chain]:
        """All chains that have names, the older first among those that are there."""
        return [*self.chains, *self.left_out]

    @property
    def name(self) -> str:
        """Istio's name of the listener."""
        return f"{self.address}_{self.port}"

    @property
    def objects(self) -> tuple[ObjectKey, ...]:
        """The Gateways that it is made of."""
        return tuple(dict.fromkeys(each.gateway.key for chain in self.chains for each in chain.servers))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server that is left out, and why, in a word for conditions and in words for people."""

    served: Served
    reason: str
    path: Path
    """Below the server."""
    message: str

    @property
    def finding(self) -> Finding:
        """What to say of the Gateway."""
        return Finding(("spec", "servers", self.served.index, *self.path), self.message)


@dataclass(slots=True)
class Merged:
    """All that a gateway opens, and what is left out."""

    by_address: dict[tuple[str, int], GatewayListener] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def listeners(self) -> list[GatewayListener]:
        """What is opened."""
        return [listener for listener in self.by_address.values() if listener.chains]


def merge(world: World, proxy: Proxy) -> Merged:
    """Put the Gateways of a gateway proxy together; of servers that exclude each other, the older's wins."""
    merged = Merged()
    ports = _target_ports(world, proxy)
    for gateway in world.gateways_for(proxy):
        for index in range(len(gateway.spec.servers)):
            refusal = _add(merged, Served(gateway, index), world, proxy, ports)
            if refusal is not None:
                merged.refusals.append(refusal)
    for listener in merged.listeners:
        for chain in listener.chains:
            chain.others = tuple(_names_below(chain, listener.claims))
    return merged


def _names_below(chain: Chain, chains: Iterable[Chain]) -> Iterator[str]:
    """Return the names of other chains that a wildcard of this one covers."""
    own = chain.server_names or ("*",)
    wildcards = [name for name in own if name.startswith("*")]
    for other in (other for other in chains if other is not chain) if wildcards else ():
        yield from (name for name in other.server_names if any(_covers(wider, name) for wider in wildcards))


def _add(
    merged: Merged, served: Served, world: World, proxy: Proxy, ports: Mapping[int, int]
) -> Refusal | None:
    """Add a server; return why it cannot be, if so."""
    server = served.server
    port = ports.get(server.port.number, server.port.number)
    address = server.bind or proxy.bind_address
    listener = merged.by_address.get((address, port))
    refusal = _unsupported(served) or _conflict(served, port, listener)
    if refusal is not None:
        return refusal
    listener = merged.by_address.setdefault((address, port), GatewayListener(address, port))
    chain = Chain(_route_name(served, port), [served], server.tls if server.port.is_https else None)
    if chain.tls is not None:
        try:
            chain.certificates = certificates(world, proxy, chain.tls)
        except MissingSecretError as error:
            listener.left_out.append(chain)
            return Refusal(served, "SecretNotFound", ("tls",), f"{error}; the server is left out")
        except MissingWorkloadCertificateError as error:
            listener.left_out.append(chain)
            return Refusal(served, "NoWorkloadCertificate", ("tls", "mode"), f"{error}; it is left out")
    if chain.tls is None and listener.chains:
        listener.chains[0].servers.append(served)
    else:
        listener.chains.append(chain)
    return None


def _unsupported(served: Served) -> Refusal | None:
    server = served.server
    if server.bind.startswith("unix://"):
        return Refusal(served, "Unsupported", ("bind",), "Unix domain sockets are not supported")
    if not (server.port.is_http or server.port.is_https):
        text = f"protocol {server.port.protocol} is not supported, only HTTP and HTTPS are"
        return Refusal(served, "Unsupported", ("port", "protocol"), text)
    if server.port.is_https and server.tls is not None and server.tls.is_passthrough:
        text = f"{server.tls.mode} is not supported: LLM traffic is looked into, so TLS must end here"
        return Refusal(served, "Unsupported", ("tls", "mode"), text)
    return None


def _conflict(served: Served, port: int, listener: GatewayListener | None) -> Refusal | None:
    server = served.server
    if port in OWN_PORTS:
        text = f"port {port} is the proxy's own, for {OWN_PORTS[port]}"
        return Refusal(served, "Conflicted", ("port", "number"), text)
    if listener is None:
        return None
    first = listener.claims[0].servers[0]
    if first.server.port.is_https != server.port.is_https:
        text = (
            f"port {port} is already taken by {first.gateway.key} for {first.server.port.protocol}, "
            f"which {server.port.protocol} cannot share"
        )
        return Refusal(served, "Conflicted", ("port", "protocol"), text)
    if server.port.is_https:
        for chain in listener.claims:
            same = sorted(set(server.names) & set(chain.servers[0].server.names))
            if same:
                text = f"{', '.join(same)} at port {port} is already taken by {chain.servers[0].gateway.key}"
                return Refusal(served, "Conflicted", ("hosts",), text)
    return None


def _route_name(served: Served, port: int) -> str:
    """Return Istio's name of a server's route configuration (gatewayRDSRouteName)."""
    server, gateway = served.server, served.gateway
    bind = f".{server.bind}" if server.bind else ""
    if server.port.is_http:
        return f"http.{port}{bind}"
    return f"https.{server.port.number}.{server.port.name}.{gateway.name}.{gateway.namespace}{bind}"


def _target_ports(world: World, proxy: Proxy) -> dict[int, int]:
    """Map the ports of the Services in front of a gateway to its own; the first Service by name counts."""
    found: dict[int, int] = {}
    for key in sorted(key for key in world.services if key.namespace == proxy.namespace):
        service = world.services[key]
        if service.spec.selector and proxy.has_labels(service.spec.selector):
            for port in service.spec.ports:
                if port.protocol == "TCP":
                    found.setdefault(port.port, port.target)
    return found


def typical_proxies(world: World, gateway: Gateway) -> Iterator[Proxy]:
    """Guess the gateway proxies that a Gateway is for, to tell of conflicts before there are any.

    They are those behind the Services whose pods the Gateway selects or, without any, one of the Gateway's
    own namespace with just the labels that it asks for.
    """
    certificate = WorkloadCertificate("/", "/", "/")
    labels = gateway.spec.selector.items()
    behind = [
        (service.namespace, service.spec.selector)
        for service in world.services.values()
        if labels and labels <= service.spec.selector.items()
    ]
    for namespace, selector in behind or [(gateway.namespace, gateway.spec.selector)]:
        found = frozenset(selector.items())
        yield Proxy(ProxyType.ROUTER, namespace, "", found, certificate=certificate)


def is_mutual(world: World, service: Service, port: int) -> bool:
    """Whether gateways behind a port of a Service take the mesh's mutual TLS there (Istio's auto mTLS)."""
    selector = service.spec.selector.items()
    return any(
        server.port.number == port and server.tls is not None and server.tls.mode == "ISTIO_MUTUAL"
        for of in world.gateways.values()
        for gateway in of
        if selector and gateway.spec.selector.items() <= selector
        for server in gateway.spec.servers
    )


def intersection(one: Iterable[str], other: Iterable[str]) -> list[str]:
    """Return the hosts that both cover (Istio's host.Names.Intersection)."""
    found: dict[str, None] = {}
    for a in one:
        for b in other:
            if _covers(b, a):
                found[a] = None
            elif _covers(a, b):
                found[b] = None
    return list(found)


def _covers(wider: str, host: str) -> bool:
    """Whether all names of ``host`` are names of ``wider``."""
    return wider in {host, "*"} or (wider.startswith("*") and host.endswith(wider[1:]))
