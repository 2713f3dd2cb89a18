# Shell functions that the scripts share. Sourced, never run.

say() { echo "[$(basename "$0" .sh)] $*" >&2; }
die() { say "error: $*"; exit 2; }

# retry N COMMAND...: up to N times, with growing pauses: a package server may be busy.
retry() {
    local left=$1 pause=2
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        say "failed, again in $pause s: $*"
        sleep "$pause"
        pause=$((pause * 2))
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -n "$@" 2>/dev/null || sudo "$@"
    else
        die "needs root for: $* (no sudo here)"
    fi
}

# apt_install PACKAGE...: those that dpkg does not have; nothing when all are there. Waits for other apt runs.
apt_install() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "install these first (no apt-get here): ${missing[*]}"
    say "installing ${missing[*]}"
    local options=(-q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
    # A list of another source that cannot be had must not stop this: the install below decides.
    retry 3 as_root env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" update >/dev/null || true
    retry 3 as_root env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install --no-install-recommends "${missing[@]}" >/dev/null \
        || die "apt-get could not install ${missing[*]}"
}
