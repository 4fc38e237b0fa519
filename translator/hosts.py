"""Host names as Kubernetes' DNS knows them."""

SERVICE_PART = ".svc"
"""What follows a Service's name and namespace in the longer forms of its DNS name."""


def is_bare(host: str) -> bool:
    """Whether a host is a Service's bare name, which is another Service in each namespace."""
    return "." not in host and ":" not in host and host != "*"


def service_name(host: str, namespace: str, domain: str) -> tuple[str, str] | None:
    """Read ``host`` as a Service: (name, namespace), or None where it is an external host or a wildcard.

    A name without a dot is a Service of ``namespace``, as in Istio's VirtualService; the longer forms are
    recognised by their ``svc`` part.
    """
    if "." not in host:
        return (host, namespace) if is_bare(host) else None
    for ending in (f"{SERVICE_PART}.{domain}", SERVICE_PART):
        if host.endswith(ending):
            name, _, of = host.removesuffix(ending).partition(".")
            return (name, of) if name != "*" and of and "." not in of else None
    return None


def short_name(host: str, namespace: str, domain: str) -> str:
    """Return what all names of a Service have in common, NAME.NAMESPACE; any other host is left as it is.

    A name without a dot is a Service of ``namespace``. `plain_providers.cluster_name_script` does the same.
    """
    service = service_name(host, namespace, domain)
    return host if service is None else ".".join(service)


def names_of(short: str, namespace: str, domain: str) -> list[str]:
    """Return all hosts with this short name for a client in ``namespace``."""
    is_service = short.count(".") == 1 and ":" not in short
    return domains(f"{short}{SERVICE_PART}" if is_service else short, "", namespace, domain)


def authority(host: str) -> str:
    """Return a host as it stands in a Host header: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host else host


def domains(host: str, namespace: str, client_namespace: str, domain: str) -> list[str]:
    """All names by which a client in ``client_namespace`` may call ``host``.

    A Service has its DNS forms (the bare name only inside its own namespace); anything else has one.
    Ports need no entries: the connection manager strips them.
    """
    service = service_name(host, namespace, domain)
    if service is None:
        return [authority(host)]
    name, of = service
    full = f"{name}.{of}"
    forms = [full, f"{full}{SERVICE_PART}", f"{full}{SERVICE_PART}.{domain}"]
    return [name, *forms] if of == client_namespace else forms


def scope_key(name: str) -> str:
    """Return what the names of a Service have in common but for the bare one: NAME.NAMESPACE.

    It is what Envoy finds in the host (translator.listeners), so it is the same of all other hosts.
    """
    return name.partition(SERVICE_PART)[0]


def stat_name(cluster_name: str) -> str:
    """Return a cluster's name for statistics: Envoy's label ``envoy_cluster_name`` ends at the first dot."""
    return cluster_name.replace(".", "_")
