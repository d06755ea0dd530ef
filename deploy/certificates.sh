#!/usr/bin/env bash
# The certificates of a deployment: an authority of its own, and one certificate for the server.
#
#   deploy/certificates.sh FOLDER NAME [ADDRESS] [DAYS]
#
#   FOLDER/ca.crt      give it to every department; it is no secret
#   FOLDER/ca.key      signs certificates: keep it off the server once this is done
#   FOLDER/server.crt  what the server shows
#   FOLDER/server.key  the server's alone
#
# NAME is how departments reach the server (federation.example.org), ADDRESS its IP address where
# there is no name for it (127.0.0.1 if left out). Certificates that are there stay; remove
# server.crt to have a new one from the same authority, as you will before it expires.
set -euo pipefail

if [ $# -lt 2 ]; then sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
folder=$1 name=$2 address=${3:-127.0.0.1} days=${4:-365}
mkdir -p "$folder"
umask 077

if [ ! -e "$folder/ca.crt" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -noenc -days 3650 \
        -subj "/CN=fedgraft federation" -keyout "$folder/ca.key" -out "$folder/ca.crt" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign" \
        2>/dev/null
fi
if [ ! -e "$folder/server.crt" ]; then
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -noenc -subj "/CN=$name" \
        -keyout "$folder/server.key" -out "$folder/server.csr" 2>/dev/null
    openssl x509 -req -in "$folder/server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
        -CAcreateserial -days "$days" -out "$folder/server.crt" 2>/dev/null \
        -extfile <(printf 'subjectAltName=DNS:%s,IP:%s\nextendedKeyUsage=serverAuth\n' \
            "$name" "$address")
    rm "$folder/server.csr"
fi
chmod 644 "$folder/ca.crt" "$folder/server.crt"
