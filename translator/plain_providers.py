"""Plain providers: the cluster of a provider that no LLMRoute names is found by the request's host alone.

Clusters are named after hosts, so that to add a provider is to add a cluster and changes no route. A Service
has several names, of which all lead to the cluster of the short one.
"""

import re

from translator.hosts import SERVICE_PART
from translator.lua import literal

PLAIN = "outbound|443||"
"""What stands before the host in the name of a plain provider's cluster. The port is that of Istio's name for
the service, the same for all; where Envoy connects to is in the cluster."""

PLAIN_CLUSTER = f"{PLAIN}%REQ(:authority)%"
"""That name in Envoy's substitution format, for a host that is written as clusters are."""

HAS_UPPER_CASE = ".*[A-Z].*"


def is_written_otherwise(domain: str) -> str:
    """Return a regex of hosts that are not written as clusters are: upper case, Services by other names."""
    return rf"{HAS_UPPER_CASE}|[^.:]*|.*{re.escape(SERVICE_PART)}({re.escape(f'.{domain}')})?"


def cluster_name_script(namespace: str, domain: str) -> str:
    """Return a Lua function that names the cluster of a host in lower case, as `hosts.short_name` does."""
    return f"""
local function short_name(host)
  if not host:find("[.:]") then return host .. {literal(f".{namespace}")} end
  for _, ending in ipairs({literal([f"{SERVICE_PART}.{domain}", SERVICE_PART])}) do
    if host:sub(-#ending) == ending then
      local short = host:sub(1, -#ending - 1)
      return short:find("^[^.]*%.[^.]+$") and short or host
    end
  end
  return host
end
local function cluster_name(host) return {literal(PLAIN)} .. short_name(host) end
"""
