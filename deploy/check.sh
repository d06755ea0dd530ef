#!/usr/bin/env bash
# Whether a server can start here: a port that is free and a certificate that holds.
#
#   deploy/check.sh PORT CERTIFICATE [CA]
#
# Flower itself tries, and says what it met in a traceback. The units call this before.
set -euo pipefail

if [ $# -lt 2 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
port=$1 certificate=$2 ca=${3:-}
fail() { echo "error: $*" >&2; exit 1; }

if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    fail "port $port: expected it to be free, found a program that listens there; stop it, or" \
        "choose another port"
fi
[ -r "$certificate" ] ||
    fail "$certificate: expected a certificate, found none that can be read; run" \
        "deploy/certificates.sh"
openssl x509 -in "$certificate" -noout -checkend 0 >/dev/null 2>&1 ||
    fail "$certificate: expected a certificate that holds, found" \
        "$(openssl x509 -in "$certificate" -noout -enddate 2>/dev/null ||
            echo none) (it has expired, or is none); remove it and run deploy/certificates.sh"
if [ -n "$ca" ]; then
    openssl verify -CAfile "$ca" "$certificate" >/dev/null 2>&1 ||
        fail "$certificate: expected a certificate signed by $ca, found another; remove it and" \
            "run deploy/certificates.sh with the folder of that authority"
fi
if ! openssl x509 -in "$certificate" -noout -checkend 1209600 >/dev/null; then
    echo "warning: $certificate expires within two weeks:" \
        "$(openssl x509 -in "$certificate" -noout -enddate)" >&2
fi
