#!/bin/sh
# Before a gateway ends (preStop): clients are told to go elsewhere, and answers under way come to their end.
# Whoever still comes is served; the pod's terminationGracePeriodSeconds is the limit.
#
#   drain.sh [SOCKET of Envoy's admin interface]
set -u
socket=${1:-/etc/istio/proxy/admin.sock}

admin() {
  curl --silent --max-time 5 --unix-socket "$socket" "$@"
}

is_busy() {
  admin 'http://envoy/stats?filter=^http\..*downstream_rq_active$' |
    grep -Ev '^http\.(admin|stats|health)\.' | grep -qv ': 0$'
}

admin --output /dev/null --request POST 'http://envoy/drain_listeners?graceful&skip_exit'
sleep "${SECONDS_AT_LEAST:-5}" # until no load balancer has this pod any more
while is_busy; do
  sleep 1
done
