#!/bin/sh
# Builds the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of their own and runs their tests on
# that build. Usage: run_sanitized.sh PYTHON [pytest arguments]. Needs g++ with its sanitizer libraries.
set -eu
python=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(cd "$root" && tar cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml kernels tests/__init__.py tests/kernels) |
    tar xf - -C "$folder"
cd "$folder"
AWQ_SANITIZE=1 "$python" setup.py -q build_ext --inplace
# Python itself is not instrumented: the runtime has to be there first, and its leaks are not ours.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
    OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider -p no:xdist -o addopts= tests/kernels/test_cpu_ops.py \
    tests/kernels/test_cpu_program.py tests/kernels/test_cpu_linear.py tests/kernels/test_cpu_moe.py "$@"
