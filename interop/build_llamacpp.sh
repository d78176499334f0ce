#!/usr/bin/env bash
# `make interop-llamacpp`: llama.cpp's own tools, from the source archive of llama-cpp-python, which carries llama.cpp.
#
#   VENV           the environment whose pip fetches the archive (.venv)
#   INTEROP_ENVS   where it is unpacked and built (.interop)
#   JOBS           compilers at once (2)
# A C++ compiler and cmake are needed; 137 steps for the quantizer, 80 for the rest, an hour on two busy cores. The
# binaries are in $INTEROP_ENVS/llama.cpp/bin, which the checks below look into:
#
#   PATH=$PWD/.interop/llama.cpp/bin:$PATH python -m pytest -m llamacpp
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
here=${INTEROP_ENVS:-.interop}/llama.cpp
pip=${VENV:-.venv}/bin/pip
targets=(llama-quantize llama-imatrix llama-perplexity llama-fit-params llama-server llama-gguf-split llama-bench
    ggml-rpc-server)

mkdir -p "$here/src" "$here/bin"
if [ ! -e "$here/src/CMakeLists.txt" ]; then
    "$pip" download --quiet --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version" -d "$here"
    tar -xzf "$here/llama_cpp_python-$version.tar.gz" -C "$here/src" --strip-components=1
fi
cmake -S "$here/src/vendor/llama.cpp" -B "$here/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DGGML_RPC=ON -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON >"$here/configure.log"
for target in "${targets[@]}"; do
    cmake --build "$here/build" -j"${JOBS:-2}" --target "$target" >"$here/build.log"
    cp "$here/build/bin/$target" "$here/bin/"
    echo "$here/bin/$target"
done
