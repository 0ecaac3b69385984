#!/bin/sh
# Build cpp/tests/check.cpp and run it:  run.sh [SANITIZERS] [ROUNDS]
#
#   run.sh address,undefined
#   run.sh thread 80
#   CXX=aarch64-linux-gnu-g++ RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" run.sh "" 100    NEON, without such a processor
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sanitize=${1:+-fsanitize=$1 -fno-sanitize-recover=all}
pids=
for source in "$here"/../kernels_*.cpp "$here"/../layout.cpp "$here"/../move.cpp "$here"/../pool.cpp "$here"/check.cpp; do
    # shellcheck disable=SC2086  # several options
    ${CXX:-c++} -std=c++17 -O1 -g -ffp-contract=off -Wall -Wno-psabi -Wno-uninitialized $sanitize \
        -c "$source" -o "$work/$(basename "$source").o" &
    pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
# shellcheck disable=SC2086
${CXX:-c++} $sanitize "$work"/*.o -pthread -o "$work/check"
# shellcheck disable=SC2086
${RUN:-} "$work/check" "${2:-400}"
