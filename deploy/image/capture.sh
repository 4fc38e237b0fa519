#!/bin/sh
# Redirects what the applications of this network namespace send to Envoy's capture listeners: run once, as
# root, before they start. Connections go to PROXY_ADDRESS:15001, DNS queries for addresses to :15053.
#
#   capture.sh             put the rules in place, or replace those of an earlier run
#   capture.sh --print     print them, in the form of iptables-restore
#   capture.sh --remove    take them away
#
# Settings are environment variables; lists have commas. docs/capture.md explains them.
set -euf

PROXY_UID=${PROXY_UID:-1337}                                       # Envoy's own connections stay as they are
PROXY_GID=${PROXY_GID:-1337}
PROXY_ADDRESS=${PROXY_ADDRESS:-127.0.0.1}
INCLUDE_OUTBOUND_IP_RANGES=${INCLUDE_OUTBOUND_IP_RANGES-*}         # set but empty: none
EXCLUDE_OUTBOUND_IP_RANGES=${EXCLUDE_OUTBOUND_IP_RANGES:-}
INCLUDE_OUTBOUND_PORTS=${INCLUDE_OUTBOUND_PORTS:-}                 # captured whatever the address
EXCLUDE_OUTBOUND_PORTS=${EXCLUDE_OUTBOUND_PORTS:-}
INCLUDE_OUTBOUND_UIDS=${INCLUDE_OUTBOUND_UIDS:-}                   # empty: all users
EXCLUDE_OUTBOUND_UIDS=${EXCLUDE_OUTBOUND_UIDS:-}
DNS_CAPTURE=${DNS_CAPTURE:-false}

fail() {
  echo "capture.sh: $*" >&2
  exit 2
}

# check NAME VALUE REGEX: a list in which each item matches.
check() {
  for item in $(items "$2"); do
    echo "$item" | grep -Eqx "$3" || fail "$1: '$item' is not valid"
  done
}

items() {
  echo "$1" | tr ',' ' '
}

# ranges LIST: those of the IP version that rules are made for.
ranges() {
  for range in $(items "$1"); do
    case $version/$range in
      4/*:*) ;;
      4/* | 6/*:*) echo "$range" ;;
    esac
  done
}

rules() {
  version=$1 proxy=$2 headers=$3
  echo '*nat'
  echo ':LLMPLANE_OUTPUT - [0:0]' # whose connections
  echo ':LLMPLANE_CAPTURE - [0:0]' # which of them
  for id in $(items "$PROXY_UID"); do echo "-A LLMPLANE_OUTPUT -m owner --uid-owner $id -j RETURN"; done
  for id in $(items "$PROXY_GID"); do echo "-A LLMPLANE_OUTPUT -m owner --gid-owner $id -j RETURN"; done
  for id in $(items "$EXCLUDE_OUTBOUND_UIDS"); do echo "-A LLMPLANE_OUTPUT -m owner --uid-owner $id -j RETURN"; done
  if [ -n "$INCLUDE_OUTBOUND_UIDS" ]; then
    for id in $(items "$INCLUDE_OUTBOUND_UIDS"); do
      echo "-A LLMPLANE_OUTPUT -m owner --uid-owner $id -j LLMPLANE_CAPTURE"
    done
  else
    echo '-A LLMPLANE_OUTPUT -j LLMPLANE_CAPTURE'
  fi
  if [ "$DNS_CAPTURE" = true ]; then
    # Before loopback is left alone: resolvers often are at 127.0.0.53 or 127.0.0.11.
    echo "-A LLMPLANE_CAPTURE -p udp --dport 53 $(query "$headers") -j DNAT --to-destination $proxy:15053"
  fi
  echo '-A LLMPLANE_CAPTURE -o lo -j RETURN'
  for port in $(items "$EXCLUDE_OUTBOUND_PORTS"); do echo "-A LLMPLANE_CAPTURE -p tcp --dport $port -j RETURN"; done
  for range in $(ranges "$EXCLUDE_OUTBOUND_IP_RANGES"); do echo "-A LLMPLANE_CAPTURE -d $range -j RETURN"; done
  to="-j DNAT --to-destination $proxy:15001"
  for port in $(items "$INCLUDE_OUTBOUND_PORTS"); do echo "-A LLMPLANE_CAPTURE -p tcp --dport $port $to"; done
  if [ "$INCLUDE_OUTBOUND_IP_RANGES" = '*' ]; then
    echo "-A LLMPLANE_CAPTURE -p tcp $to"
  else
    for range in $(ranges "$INCLUDE_OUTBOUND_IP_RANGES"); do echo "-A LLMPLANE_CAPTURE -p tcp -d $range $to"; done
  fi
  echo COMMIT
}

# query HEADERS [!]: match queries of the type that Envoy answers, or all others, by the end of the question (name,
# type, class), behind so many bytes of headers. Envoy says of a name that has only IPv4 addresses that it does
# not exist, when it is asked for IPv6 ones, and knows no other types: those stay with the name server.
query() {
  type=0001                                                        # A
  if [ "$(wc -l </proc/net/route)" -le 1 ]; then type=001c; fi     # AAAA, where there is no IPv4
  echo "-m string --algo bm --from $1 ${2:-} --hex-string |00${type}0001|"
}

# What is not for Envoy's listener gets a conntrack zone of its own: an application sends queries of all types
# from one port, which for conntrack are one connection; and a query of Envoy's from a port that an application
# had used would be sent back to Envoy.
zones() {
  echo '*raw'
  echo ':LLMPLANE_QUERIES - [0:0]'
  echo ':LLMPLANE_ANSWERS - [0:0]'
  for id in $(items "$PROXY_UID"); do
    echo "-A LLMPLANE_QUERIES -p udp --dport 53 -m owner --uid-owner $id -j CT --zone 1"
  done
  echo "-A LLMPLANE_QUERIES -p udp --dport 53 $(query "$1" !) -j CT --zone 1"
  echo '-A LLMPLANE_ANSWERS -p udp --sport 53 -j CT --zone 1'
  echo COMMIT
}

# The first argument of the next functions is iptables or ip6tables, perhaps the -legacy one.
print() {
  echo "# $1-restore --noflush"
  rules "$2" "$3" "$4"
  if [ "$DNS_CAPTURE" = true ]; then zones "$4"; fi
}

apply() {
  print "$@" | $1-restore --wait --noflush
  jump "$1" nat OUTPUT LLMPLANE_OUTPUT
  if [ "$DNS_CAPTURE" = true ]; then
    jump "$1" raw OUTPUT LLMPLANE_QUERIES
    jump "$1" raw PREROUTING LLMPLANE_ANSWERS
  fi
}

jump() {
  $1 --wait -t "$2" -C "$3" -j "$4" 2>/dev/null || $1 --wait -t "$2" -A "$3" -j "$4"
}

remove() {
  while read -r table from chains; do
    for chain in $chains; do
      $1 --wait -t "$table" -D "$from" -j "$chain" 2>/dev/null || true
      $1 --wait -t "$table" -F "$chain" 2>/dev/null || true
    done
    for chain in $chains; do $1 --wait -t "$table" -X "$chain" 2>/dev/null || true; done
  done <<END
nat OUTPUT LLMPLANE_OUTPUT LLMPLANE_CAPTURE
raw OUTPUT LLMPLANE_QUERIES
raw PREROUTING LLMPLANE_ANSWERS
END
}

# with FUNCTION: for IPv4 and, where the kernel has it, IPv6 (also where Envoy does not listen on it: what is
# refused there is tried over IPv4, and nothing gets out unseen).
with() {
  kind=
  [ "$1" = print ] || iptables -t nat -S OUTPUT >/dev/null 2>&1 || kind=-legacy # an old kernel
  "$1" iptables$kind 4 "$PROXY_ADDRESS" 40
  if [ -e /proc/net/if_inet6 ]; then "$1" ip6tables$kind 6 '[::1]' 60; fi
}

number='[0-9]{1,10}'
range='[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,2})?|[0-9a-fA-F:]*:[0-9a-fA-F:.]*(/[0-9]{1,3})?'
check PROXY_UID "$PROXY_UID" "$number"
check PROXY_GID "$PROXY_GID" "$number"
check PROXY_ADDRESS "$PROXY_ADDRESS" '127(\.[0-9]{1,3}){3}'
if [ "$INCLUDE_OUTBOUND_IP_RANGES" != '*' ]; then
  check INCLUDE_OUTBOUND_IP_RANGES "$INCLUDE_OUTBOUND_IP_RANGES" "$range"
fi
check EXCLUDE_OUTBOUND_IP_RANGES "$EXCLUDE_OUTBOUND_IP_RANGES" "$range"
check INCLUDE_OUTBOUND_PORTS "$INCLUDE_OUTBOUND_PORTS" '[0-9]{1,5}'
check EXCLUDE_OUTBOUND_PORTS "$EXCLUDE_OUTBOUND_PORTS" '[0-9]{1,5}'
check INCLUDE_OUTBOUND_UIDS "$INCLUDE_OUTBOUND_UIDS" "$number"
check EXCLUDE_OUTBOUND_UIDS "$EXCLUDE_OUTBOUND_UIDS" "$number"
check DNS_CAPTURE "$DNS_CAPTURE" 'true|false'

[ $# -le 1 ] || fail "one argument at most"
case ${1:-} in
  '') with apply ;;
  --print) with print ;;
  --remove) with remove ;;
  *) fail "unknown argument '$1'" ;;
esac
