#!/usr/bin/env bash
# Wheels for a GPU machine without a network (GDFQ_WHEELS of gpu_session.sh): what gdfq and its benchmarks need besides
# torch, for Python 3.12 on x86-64 Linux.
#
#     benchmarks/collect_wheels.sh FOLDER [MORE_PACKAGES...]
set -euo pipefail

folder=${1:?usage: $0 FOLDER [MORE_PACKAGES...]}
shift
download=("${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --dest "$folder"
    --only-binary=:all: --python-version 3.12 --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)

"${download[@]}" pydantic tomli-w typer rich tqdm safetensors
# pytorchcv would bring numpy, Brevitas and torchao would bring torch: the machine has its own.
"${download[@]}" --no-deps pytorchcv==0.0.67 brevitas dependencies==2.0.1 unfoldNd torchao "$@"
du -sh "$folder"
