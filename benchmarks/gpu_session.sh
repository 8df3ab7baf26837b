#!/usr/bin/env bash
# A whole visit to a GPU machine in under nine minutes: does it build, is it right, how fast is it?
#
#     benchmarks/gpu_session.sh OUT_DIR [--dry-run]
#
# Every stage has a time limit and writes its files as it ends; one that fails stops none that follow, and what no longer
# fits into the total is skipped. OUT_DIR/summary.txt has a line for each. The exit code is 0 if all that ran succeeded.
#
#   PYTHON        the interpreter (python3); its torch is used as it is
#   GDFQ_WHEELS   a folder of wheels that it lacks (benchmarks/collect_wheels.sh fills one): put on its path for this
#                 session only; nothing is installed into the interpreter
#   STAGES        an extended regular expression: only the stages whose names it matches run, for a second visit
#   GDFQ_COMMIT   names the commit where the tree is a copy without its history
#
# --dry-run goes through the same stages at the smallest size on a CPU, so that no visit is lost to a typo. It builds
# outside the tree.
set -uo pipefail

usage="usage: $0 OUT_DIR [--dry-run]"
out=${1:?$usage}
case "${2:-}" in
    "") dry=0 ;;
    --dry-run) dry=1 ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

export PYTHON=${PYTHON:-python3}
TOTAL=525          # seconds for everything
SHORTEST=15        # a stage is not begun with less than this left
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export site="$scratch/site"
export PYTHONPATH="$site:$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
: > "$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# stage NAME LIMIT COMMAND...: the command's output goes to NAME.log.
stage() {
    local name=$1 limit=$2 left=$((TOTAL - SECONDS)) begun=$SECONDS code=0
    shift 2
    [[ $name =~ ^(${STAGES:-.*})$ ]] || return 0
    if ((left < SHORTEST)); then
        say "$name: skipped, $left s are left"
        return
    fi
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" > "$out/$name.log" 2>&1 || code=$?
    case $code in
        0) say "$name: ok, $((SECONDS - begun)) s" ;;
        124 | 137) say "$name: timed out after $((SECONDS - begun)) s"; failed=1 ;;
        *) say "$name: failed with code $code after $((SECONDS - begun)) s, see $name.log"; failed=1 ;;
    esac
}

has_module() { "$PYTHON" -c "import $1" > /dev/null 2>&1; }

environment() {
    nvidia-smi || echo "no nvidia-smi"
    nvcc --version || echo "no nvcc"
    "$PYTHON" - << 'END'
import json, torch
from importlib.metadata import distributions
from gdfq.bench.provenance import provenance
print(json.dumps(provenance(torch.get_num_threads()), indent=1))
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
print("\n".join(sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions())))
END
}

# All at once, or, where one of them does not fit this Python, one by one without it.
wheels() {
    local install=("$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site")
    "${install[@]}" "$GDFQ_WHEELS"/*.whl && return
    for wheel in "$GDFQ_WHEELS"/*.whl; do "${install[@]}" --upgrade "$wheel"; done
    true
}
export -f environment wheels

bench=("$PYTHON" -m gdfq.cli bench)
step=("$PYTHON" -m benchmarks.step)
suite=("$PYTHON" -m benchmarks.step_suite --out "$out/suite")
once=("$PYTHON" -m benchmarks.every_op_once)
build=("$PYTHON" setup.py build_ext)
if ((dry)); then
    export OMP_NUM_THREADS=1
    build+=(--build-temp "$scratch/build" --build-lib "$scratch/lib")
    tiny=(--mb 0.02 --rounds 1 --device cpu --provider released --provider ours)
    main_bench=("${tiny[@]}" --op fake_quantize) more_bench=("${tiny[@]}" --minutes 1)
    cifar=(--batch 4) imagenet=(--batch 2 --image-size 32)
    more_cells=(--networks resnet18 "${imagenet[@]}")
    rounds=(--iterations 1 --repeat 1 --warmup 1 --threads 1 --student-tolerance 1)
    providers=(ours) with_compile=(ours)
else
    build+=(--inplace)
    # torch.compile takes seconds for each case: all providers at one size, then the other sizes without it.
    main_bench=(--layer resnet18-64x56 --mb 64 --dtype fp32 --layout nchw --minutes 1.3)
    more_bench=(--provider released --provider eager --provider ours --minutes 1)
    cifar=(--batch 200) imagenet=(--batch 16)
    more_cells=()
    rounds=(--iterations 8)
    providers=(released eager ours ours-eager floor) with_compile=(compile ours)
fi

if [[ -n ${GDFQ_WHEELS:-} ]]; then
    GDFQ_WHEELS=$(cd "$GDFQ_WHEELS" && pwd) || exit 2
    export GDFQ_WHEELS
    stage wheels 60 bash -c wheels
fi
stage environment 30 bash -c environment
stage build 150 env GDFQ_WERROR=1 "${build[@]}"
if [[ -d tests/gpu ]]; then
    stage gpu-tests 140 "$PYTHON" -m pytest -q -m gpu tests/gpu
else
    say "gpu-tests: skipped, there is no tests/gpu"
fi
stage bench 110 "${bench[@]}" "${main_bench[@]}" --out "$out/bench"
stage bench-more 90 "${bench[@]}" "${more_bench[@]}" --out "$out/bench-more"
if has_module pytorchcv.model_provider; then
    stage step-resnet18 75 "${suite[@]}" --networks resnet18 "${imagenet[@]}" "${rounds[@]}" \
        --providers "${providers[@]}"
    stage step-resnet20 65 "${suite[@]}" --networks resnet20 "${cifar[@]}" "${rounds[@]}" --providers "${providers[@]}"
else
    say "step benchmarks: skipped, $PYTHON has no pytorchcv"
fi
# Every operation once on small, odd shapes: sanitizers slow everything down, tests of large tensors would not end. The
# caching allocator would hide what is written behind a tensor's end.
if ((dry)); then
    stage every-op-once 30 "${once[@]}" cpu
elif command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "${once[@]}" cuda
    done
else
    say "sanitizers: skipped, no compute-sanitizer"
fi
if has_module pytorchcv.model_provider; then
    stage step-resnet20-compile 120 "${step[@]}" --model pytorchcv:resnet20_cifar10 "${cifar[@]}" "${rounds[@]}" \
        --providers "${with_compile[@]}" --out "$out/step-resnet20-compile.json"
fi
if ((!dry)); then # what each precision does to the accuracy; on a CPU each evaluation takes half a minute
    for precision in float32 tf32 bfloat16; do
        stage "demo-$precision" 60 "$PYTHON" -m gdfq.demo --seeds 0 1 2 --set run.precision=$precision \
            --out "$out/demo-$precision"
    done
fi
if has_module pytorchcv.model_provider; then
    # What was measured above is kept; no cell is begun that could not end.
    stage step-suite "$TOTAL" "${suite[@]}" --resume --minutes $(((TOTAL - SECONDS) / 60 - 1)) "${more_cells[@]}" \
        "${rounds[@]}" --providers "${providers[@]}"
fi
say "$SECONDS s in all"
exit $failed
