#!/bin/bash
# Generates csi/spec from its committed protos. UPDATE=1: first takes the protos from their Go modules.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

CSI=github.com/container-storage-interface/spec@v1.12.0
KUBELET=k8s.io/kubelet@v0.37.2
TOOLS=grpcio-tools==1.85.1

module() { (cd "$(mktemp -d)" && go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'); }
if [ "${UPDATE:-}" = 1 ]; then
    install -m 644 "$(module "$CSI")/csi.proto" csi/spec/csi.proto
    install -m 644 "$(module "$KUBELET")/pkg/apis/pluginregistration/v1/api.proto" csi/spec/registration.proto
fi
.venv/bin/python -m pip install -q "$TOOLS"
.venv/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
    csi/spec/csi.proto csi/spec/registration.proto
say "done: csi/spec"
