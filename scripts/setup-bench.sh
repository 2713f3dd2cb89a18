#!/bin/bash
# The peers of the benchmarks, on top of `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

apt_install s3fs
stamp=.venv/.stamp-bench
wanted=$(cat benchmarks/requirements.txt constraints.txt .venv/.stamp-setup | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0
PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
    retry 3 .venv/bin/python -m pip install -q -r benchmarks/requirements.txt
echo "$wanted" >"$stamp"
