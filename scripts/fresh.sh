#!/bin/bash
# Set-up and demo in a bare Debian root file system, so that a missing install step shows. Run by `make test-fresh`.
#
# Needs root (mounts, /dev/fuse). The new system gets this machine's package configuration (apt, pip, certificates,
# resolver), so that its package servers are reached as here; nothing of this machine's installed packages.
#   SUITE=bookworm, TARGETS="setup demo"
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

SUITE=${SUITE:-bookworm}
TARGETS=${TARGETS:-setup demo}
[ "$(id -u)" = 0 ] || die "needs root: sudo make test-fresh"
[ -c /dev/fuse ] || die "this machine has no /dev/fuse"
apt_install mmdebstrap

# What happens below is in a mount and process namespace of its own: whatever ends it, no mount and no process stays.
if [ "${CACHEFS_TEST_FRESH:-}" != inside ]; then
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/cachefs-fresh-XXXXXX")
    # Only what lies in that file system itself: --one-file-system, should a mount have stayed after all.
    trap 'rm -rf --one-file-system "$work"' EXIT
    CACHEFS_TEST_FRESH=inside unshare --mount --propagation private --pid --fork --kill-child "$0" "$work/root" </dev/null
    exit
fi
root=$1

say "making a bare $SUITE"
retry 3 mmdebstrap --quiet --variant=minbase --include=make,ca-certificates "$SUITE" "$root"

copy() {
    local path
    for path in "$@"; do
        if [ -e "$path" ]; then
            mkdir -p "$root$(dirname "$path")"
            cp -a --remove-destination "$path" "$root$(dirname "$path")/"
        fi
    done
}
rm -f "$root/etc/resolv.conf"
cp -L /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || true
copy /etc/hosts /etc/pip.conf /usr/local/share/ca-certificates /etc/ssl/certs
# This machine's settings for apt (proxies), not its lists of sources: mmdebstrap has made those.
for file in /etc/apt/apt.conf.d/*proxy* /etc/apt/auth.conf.d /etc/apt/auth.conf; do copy "$file"; done

say "copying the repository as it is committed"
mkdir -p "$root/root/cachefs"
git -c safe.directory="$PWD" archive HEAD | tar x -C "$root/root/cachefs"

mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty fuse; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -p "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"

for target in $TARGETS; do
    say "make $target, in there"
    # shellcheck disable=SC2016
    chroot "$root" /usr/bin/env -u PIP_FIND_LINKS -u PYTHONPATH -u VIRTUAL_ENV -u PYTHON HOME=/root USER=root LC_ALL=C.UTF-8 \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/tmp \
        /bin/bash -c 'cd /root/cachefs && exec make "$1"' - "$target"
done
say "works on a bare $SUITE"
