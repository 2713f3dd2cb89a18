#!/bin/bash
# All tests; with --soak only their long forms. Run by `make test` and `make soak`. Further arguments go to pytest.
#
# With CI=true a missing /dev/fuse or tool is a failure: a green run that has mounted nothing must not be.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

if [ "${CI:-}" = true ]; then
    if [ "$(id -u)" = 0 ] && [ ! -e /dev/fuse ]; then
        mknod -m 0666 /dev/fuse c 10 229 || true
    fi
    [ -c /dev/fuse ] || die "CI without /dev/fuse: the mount tests would be skipped"
    (exec 3<>/dev/fuse) 2>/dev/null || die "CI cannot open /dev/fuse: the mount tests would be skipped"
    command -v fusermount3 >/dev/null || die "CI without fusermount3"
    .venv/bin/python -c 'import cachefs._fuseshim' || die "CI without the extension module: no passthrough, no safe receive"
fi

# fio checks what it reads while servers are killed. Without it that test skips, and fails with CI=true.
(apt_install fio) || true

mkdir -p .setup
# Tests talk to loopback only: no credentials and no metadata address of the machine's own.
unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL AWS_WEB_IDENTITY_TOKEN_FILE
export AWS_EC2_METADATA_DISABLED=true AWS_METADATA_ENDPOINT=http://127.0.0.1:9
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}" NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"

arguments=(-p no:cacheprovider --junitxml .setup/junit.xml --durations 15)
if [ "${1:-}" = --soak ]; then
    shift
    export CACHEFS_TEST_SOAK=1
    arguments+=(-m soak --timeout 3600)
else
    arguments+=(-m "not soak" --timeout 180)
    # The driver's tests need tools of their own: `make test-csi` brings them and runs these.
    [ "$#" -gt 0 ] || arguments+=(--ignore tests/csi --ignore tests/manifests)
fi
exec .venv/bin/python -m pytest "${arguments[@]}" "$@"
