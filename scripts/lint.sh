#!/bin/bash
# ruff, mypy --strict and the layers of the package. Run by `make lint`.
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

failed=0
check() {
    say "$*"
    "$@" || { failed=1; say "FAILED: $*"; }
}
check .venv/bin/ruff check .
check .venv/bin/ruff format --check .
check .venv/bin/mypy --strict
check .venv/bin/lint-imports --no-cache
exit "$failed"
