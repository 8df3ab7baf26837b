#!/usr/bin/env bash
# Fills the folder that a visit to a GPU machine carries (GDFQ_VISIT of gpu_session.sh), where there is a network.
#
#     benchmarks/gpu_prepare.sh FOLDER [--images TEST_NPZ --weights SAFETENSORS]
#
#   wheels/      what such a machine lacks besides torch, for Python 3.12 on x86-64 Linux
#   gdfq_ext/    the library, compiled for the GPU beforehand; built there only where it does not fit
#   cifar10/     CIFAR-10's test images as a JPEG archive (gdfq.data) and weights of examples/custom_resnet20.py
#   commit       what the tree was made of, for it is copied without its history
#
# PYTHON builds the library (python3): best with the Python and torch of that machine. TORCH_CUDA_ARCH_LIST is what GPU
# it has (9.0). nvcc is needed, a GPU is not. Prepare anew when csrc/ has changed: a library of other sources does not load.
set -euo pipefail

usage="usage: $0 FOLDER [--images TEST_NPZ --weights SAFETENSORS]"
folder=${1:?$usage}
shift
images='' weights=''
while (($#)); do
    case $1 in
        --images) images=${2:?$usage} ;;
        --weights) weights=${2:?$usage} ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    shift 2
done
PYTHON=${PYTHON:-python3}
LIMIT=64 # megabytes, the tree included

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder"/{wheels,gdfq_ext,cifar10,commit}
if [[ -n $images && -n $weights ]]; then
    mkdir "$folder/cifar10"
    cp --no-preserve=mode "$images" "$folder/cifar10/test.npz"
    cp --no-preserve=mode "$weights" "$folder/cifar10/resnet20.safetensors"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
git describe --always --dirty --abbrev=40 --exclude='*' > "$folder/commit"

download=("$PYTHON" -m pip download --quiet --disable-pip-version-check --dest "$folder/wheels"
    --only-binary=:all: --python-version 3.12 --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
"${download[@]}" pydantic tomli-w
"${download[@]}" --no-deps pytorchcv==0.0.67 # it would bring torch

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export GDFQ_BUILD=require GDFQ_CUDA=require TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
"$PYTHON" setup.py --quiet build_ext --build-temp "$scratch/temp" --build-lib "$scratch/lib" > "$scratch/log" 2>&1 || {
    tail -n 30 "$scratch/log"
    echo "the library cannot be built with $PYTHON" >&2
    exit 1
}
mkdir "$folder/gdfq_ext"
cp "$scratch"/lib/gdfq_ext/*.so "$folder/gdfq_ext/"

tree=$({ git ls-files --cached --others --exclude-standard -z | du -cb --files0-from=- 2> /dev/null || true; } | tail -n 1)
megabytes=$(((${tree%%[^0-9]*} + $(du -sb "$folder" | cut -f 1)) / 2**20 + 1))
du -sh "$folder"/*
echo "$megabytes MB with the tree, of $LIMIT that can be carried"
((megabytes <= LIMIT))
