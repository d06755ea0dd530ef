#!/usr/bin/env bash
# The key of a SuperNode: made in the department, and only its public half leaves it.
#
#   deploy/node-key.sh FILE
#
#   FILE      the private key, for `flower-supernode --auth-supernode-private-key`
#   FILE.pub  send it to the server's operator, over a way on which nobody can change it.
#             There: flwr supernode register FILE.pub SUPERLINK --name CLIENT
#
# The name that the operator gives there is the client's name in the plan. No node can choose it.
set -euo pipefail

if [ $# -ne 1 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
mkdir -p "$(dirname "$1")"
ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "$1"
