#!/usr/bin/env bash
# Builds the CPU image without a Docker engine, from a Debian base made here, and runs it with 1 GB and one processor. As root.
#   apt-get install buildah debootstrap runc
# Everything made is under build/image-test (or IMAGE_TEST_DIR) and used again the next time.
#   image_test.sh PYTHON MODEL_FOLDER [TORCH]     TORCH: a requirement, default the one the Makefile has
set -euo pipefail
python=$1 model=$2 torch=${3:-torch>=2.11,<2.14}
cd "$(dirname "$0")/../.."
for tool in buildah debootstrap runc; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah debootstrap runc"; exit 1; }
done
folder=${IMAGE_TEST_DIR:-$PWD/build/image-test}
mkdir -p "$folder/tmp" "$folder/wheels"
export TMPDIR=$folder/tmp
buildah() { command buildah --root "$folder/storage" --runroot "$folder/runroot" "$@"; }

# The same packages as docker.io's debian:bookworm-slim has, and a little more.
if ! buildah inspect --type image base >/dev/null 2>&1; then
    [ -e "$folder/base/etc/debian_version" ] || debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/base"
    container=$(buildah from scratch)
    buildah copy -q "$container" "$folder/base" /
    buildah commit -q "$container" base
    buildah rm "$container" >/dev/null
fi

# torch by this machine's own pip; its settings go along for the rest.
ls "$folder"/wheels/torch-*.whl >/dev/null 2>&1 || "$python" -m pip download -q --no-deps -d "$folder/wheels" "$torch"
mounts=(-v "$folder/wheels:/wheels:ro")
for path in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /etc/xdg/pip; do
    if [ -e "$path" ]; then mounts+=(-v "$path:$path:ro"); fi
done
wheel=$(basename "$folder"/wheels/torch-*.whl)
buildah bud --layers --pull-never --format docker --network host --isolation chroot -f docker/Dockerfile.cpu "${mounts[@]}" \
    --build-arg BASE=localhost/base --build-arg "TORCH=/wheels/$wheel" -t awq-serve:cpu . >"$folder/build.log" 2>&1 \
    || { tail -30 "$folder/build.log"; exit 1; }
buildah images awq-serve:cpu

container=$(buildah from --pull-never awq-serve:cpu)
trap 'buildah rm "$container" >/dev/null' EXIT
"$python" -m tests.docker.run_image "$(buildah mount "$container")" "$model" --memory 1000000000 --processors 1
