#!/bin/bash
# Assembles in a directory what the Dockerfile builds, with Debian tools, where no container engine is. Run by
# `make test-image`, which then runs it under runc. Needs root.
#   scripts/image-rootfs.sh DIRECTORY [SUITE]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

out=${1:?usage: scripts/image-rootfs.sh DIRECTORY}
SUITE=${2:-bookworm}
[ "$(id -u)" = 0 ] || die "needs root: sudo make test-image"
apt_install mmdebstrap

# In a mount and process namespace of its own, so that no mount and no process stays whatever ends it.
if [ "${CACHEFS_TEST_IMAGE:-}" != inside ]; then
    build=$(mktemp -d "${TMPDIR:-/var/tmp}/cachefs-image-XXXXXX")
    trap 'rm -rf --one-file-system "$build"' EXIT
    CACHEFS_TEST_IMAGE=inside BUILD=$build/root unshare --mount --propagation private --pid --fork --kill-child "$0" "$@" </dev/null
    exit
fi
build=$BUILD

# The stages and their packages are the Dockerfile's; a test holds the two against each other.
packages() { sed -n 's/.*--no-install-recommends \(.*\) \\$/\1/p' Dockerfile | sed -n "$1p" | tr ' ' ','; }
say "build stage"
retry 3 mmdebstrap --quiet --variant=minbase --include="python3,python3-venv,python3-dev,$(packages 1),ca-certificates" "$SUITE" "$build"
for path in /etc/pip.conf /usr/local/share/ca-certificates /etc/ssl/certs /etc/hosts; do
    if [ -e "$path" ]; then
        mkdir -p "$build$(dirname "$path")"
        cp -a --remove-destination "$path" "$build$(dirname "$path")/"
    fi
done
rm -f "$build/etc/resolv.conf"
cp -L /etc/resolv.conf "$build/etc/resolv.conf" 2>/dev/null || true
mkdir -p "$build/src"
git -c safe.directory="$PWD" archive HEAD constraints.txt pyproject.toml README.md LICENSE cachefs csi | tar x -C "$build/src"
mount -t proc proc "$build/proc"
mount --rbind /dev "$build/dev"
# shellcheck disable=SC2016
chroot "$build" /usr/bin/env -u PIP_FIND_LINKS -u PYTHONPATH -u VIRTUAL_ENV HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    TMPDIR=/tmp PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 /bin/sh -ec '
        cd /src
        python3 -m venv /opt/cachefs
        /opt/cachefs/bin/pip install -q ".[csi]"
        /opt/cachefs/bin/pip uninstall -q --yes pip
        /opt/cachefs/bin/python -m compileall -q /opt/cachefs >/dev/null'

say "image"
rm -rf --one-file-system "$out"
retry 3 mmdebstrap --quiet --variant=minbase --include="python3,$(packages 2 | sed 's/^,//')" "$SUITE" "$out"
mkdir -p "$out/opt"
cp -a "$build/opt/cachefs" "$out/opt/"
say "done: $out"
