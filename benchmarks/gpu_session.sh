#!/usr/bin/env bash
# A visit to a GPU machine, in two calls.
#
#     benchmarks/gpu_session.sh first OUT [--dry-run]     does it build, is it right, how fast is it?
#     benchmarks/gpu_session.sh second OUT [--dry-run]    what does training reach, does a killed run go on?
#
# OUT gets one file, first.tar.gz or second.tar.gz: logs and results of every stage, also of one that was cut off. The
# tables go to standard output, the most important last, at most 12,000 characters with all else that is printed. Every
# stage has a limit; one that fails stops none that follow, only without compiled kernels the visit ends at once.
# The exit code is 0 if all is well, 143 after SIGTERM, which leaves and prints what there is.
#
#   GDFQ_VISIT    the folder that gpu_prepare.sh has filled, carried here
#   GDFQ_SECONDS  for everything (first: 395, second: 280)
#   PYTHON        the interpreter (python3); its torch is used as it is, and nothing is installed into it
#
# All happens in a copy of the tree under TMPDIR. --dry-run goes through the same stages at the smallest size on a CPU.
set -uo pipefail

call=${1:-} out=${2:-} dry=0
[[ ${3:-} == --dry-run ]] && dry=1
if [[ ! $call =~ ^(first|second)$ || -z $out || $# -gt $((2 + dry)) ]]; then
    echo "usage: $0 first|second OUT [--dry-run]" >&2
    exit 2
fi
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
visit=/nothing-was-carried
if [[ -n ${GDFQ_VISIT:-} ]]; then visit=$(cd "$GDFQ_VISIT" && pwd) || exit 2; fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
scratch=$(mktemp -d) && mkdir "$scratch/tree" "$scratch/results" "$scratch/runs" || exit 2
trap 'rm -rf "$scratch"' EXIT

# --- stages ---

# A dry run shows that all stages work, and has time for it on a machine that does other things, too.
slack=$((dry ? 5 : 1))
total=${GDFQ_SECONDS:-$((slack * $([[ $call == first ]] && echo 395 || echo 280)))}
failed=0 running=
results=$scratch/results runs=$scratch/runs

say() { echo "$*" | tee -a "$results/summary.txt"; }
left() { echo $((total - SECONDS)); }

# stage NAME LIMIT COMMAND...: at most LIMIT seconds, the output in NAME.log. Returns the command's exit code.
stage() {
    local name=$1 limit=$((slack * $2)) begun=$SECONDS code=0
    shift 2
    ((limit > $(left))) && limit=$(left)
    if ((limit < 5)); then
        say "$name: skipped, the time is up"
        return 1
    fi
    timeout --kill-after=5 "$limit" "$@" > "$results/$name.log" 2>&1 &
    running=$!
    wait "$running" || code=$?
    running=
    case $code in
        0) say "$name: ok, $((SECONDS - begun)) s" ;;
        124 | 137) say "$name: cut off after $((SECONDS - begun)) s" ;;
        *) say "$name: failed with code $code after $((SECONDS - begun)) s" ;;
    esac
    pack
    return "$code"
}

try() { stage "$@" || failed=1; }

# Everything so far as one file, which is there whole or not at all. Checkpoints and models stay behind.
pack() {
    (cd "$scratch" && find results runs -type f -size -4096k \
        \( -path 'results/*' -o -name log.jsonl -o -name config.toml -o -name report.json \) -print0 \
        | tar -czf "$out/.$call" --null --files-from=-) && mv "$out/.$call" "$out/$call.tar.gz"
}

# show head|tail CHARACTERS FILE: its beginning or its end.
show() {
    [[ -s $results/$3 ]] && printf '\n== %s\n%s\n' "$3" "$("$1" -c "$2" "$results/$3")"
}

finish() {
    trap '' TERM INT
    say "$SECONDS s in all"
    pack
    tables
    exit "${1:-$failed}"
}

stop() {
    if [[ -n $running ]]; then
        kill -TERM "$running"
        wait "$running"
    fi
    say "stopped by a signal"
    finish 143
}
trap stop TERM INT

# --- the library ---

# With GDFQ_EXT=require the import alone fails where there is no library. On a GPU every operation must have a kernel.
check_library='
import sys, gdfq_ext
report = gdfq_ext.backend_report()
print(report)
missing = [name for name, backends in report.ops.items() if backends["cuda"].backend != "native"]
sys.exit(f"no CUDA kernel: {missing}" if missing and sys.argv[1] == "cuda" else 0)
'

fits() { stage "$1" 15 "$PYTHON" -c "$check_library" "$device"; }

build() {
    stage build 60 "$PYTHON" setup.py build_ext --inplace && fits build-check && say "library: built here"
}

prebuilt() {
    if [[ ! -d $visit/gdfq_ext ]]; then
        say "library: none was carried"
        return 1
    fi
    rm -f gdfq_ext/*.so
    cp "$visit"/gdfq_ext/*.so gdfq_ext/ && fits prebuilt-check && say "library: the prebuilt one, from gpu_prepare.sh"
}

without_library() {
    say "stopped: there are no compiled kernels that fit, and without them nothing here would say anything"
    grep -i -m 12 error "$results/build.log" > "$results/build-errors.txt"
    tables() {
        show tail 1500 prebuilt-check.log
        show tail 1500 build-check.log
        show head 3000 build-errors.txt
        show tail 3500 build.log
    }
    finish 1
}

# --- surroundings ---

say "gdfq, $call call, $total s$( ((dry)) && echo ", dry run")"
cd "$tree" && tar --exclude='*.so' --exclude=__pycache__ --exclude=benchmarks/results -cf - benchmarks csrc examples \
    gdfq_ext python tests setup.py pyproject.toml README.md LICENSE | tar -xf - -C "$scratch/tree" || exit 2
# Copies have no history, or that of another commit.
revision=$({ cat "$visit/commit" || git describe --always --dirty --abbrev=40 --exclude='*'; } 2> /dev/null)
cd "$scratch/tree" || exit 2
export GDFQ_COMMIT=${GDFQ_COMMIT:-$revision}
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$scratch/site:$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
# ninja lies beside the interpreter, which may be called by another path.
PATH=$PATH:$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
unset GDFQ_WERROR # a warning is no reason to go home
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sort -u | paste -sd ' ')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${capability:-9.0}} MAX_JOBS=${MAX_JOBS:-$(nproc)}
export GDFQ_BUILD=require
if ((dry)); then
    device=cpu
    export GDFQ_CUDA=${GDFQ_CUDA:-off} OMP_NUM_THREADS=1
else
    device=cuda
    export GDFQ_CUDA=require
fi

environment() {
    nvidia-smi || echo "no nvidia-smi"
    nvcc --version || echo "no nvcc"
    "$PYTHON" -c 'import json, torch; from gdfq.provenance import provenance
print(json.dumps(provenance(torch.get_num_threads()), indent=1))'
    "$PYTHON" -m pip list --format=freeze
}
export -f environment

if compgen -G "$visit/wheels/*.whl" > /dev/null; then
    # What this interpreter has stays visible behind it. Wheels for another one would hide it, so all or none.
    stage wheels 15 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" \
        "$visit"/wheels/*.whl || rm -rf "$scratch/site"
fi
try environment 30 env GDFQ_EXT=reference bash -c environment
export GDFQ_EXT=require

# --- the two calls ---

pytest=("$PYTHON" -m pytest -q --tb=short -p no:cacheprovider -m gpu)
suite=("$PYTHON" -m benchmarks.step_suite --together)

first() {
    tables() {
        show head 3300 ops/results.txt
        show tail 1300 zero-numerators.log
        show head 2400 resnet18/suite.txt
        show head 1900 resnet20/suite.txt
        show tail 1300 gpu-tests.log
    }
    local workers=8 zero=() ops=() rows20 rows18
    local resnet20=(--batch 200 --patience 50) resnet18=(--batch 16 --patience 65)
    ops=(--layer resnet18-64x56 --mb 64 --dtype fp32 --dtype bf16 --minutes 1.1
        --provider eager --provider compile --provider ours)
    rows20=(released compile compile-reduce-overhead ours floor)
    rows18=("${rows20[@]}" ours@contiguous ours@tf32 ours@bfloat16
        compile-reduce-overhead@tf32 compile-reduce-overhead@bfloat16)
    if ((dry)); then
        local rounds=(--iterations 1 --repeat 1 --warmup 1 --threads 1)
        workers=0 zero=(--mb 0.1 --rounds 1)
        ops=(--op fake_quantize --mb 0.02 --rounds 1 --provider eager --provider ours)
        resnet20=(--batch 4 "${rounds[@]}") rows20=(ours floor)
        resnet18=(--batch 2 --image-size 32 "${rounds[@]}") rows18=(ours@contiguous)
    fi
    prebuilt || build || without_library
    # One test at a time to a worker: those of training take long and come first.
    try gpu-tests 55 env OMP_NUM_THREADS=2 "${pytest[@]}" -n "$workers" --maxschedchunk 1 \
        tests/gpu/test_training.py tests/gpu/test_gpu.py
    try zero-numerators 20 "$PYTHON" -m benchmarks.zero_numerators "${zero[@]}" --out "$results/zero-numerators.json"
    try ops 75 "$PYTHON" -m benchmarks.ops --layout channels_last "${ops[@]}" --out "$results/ops"
    try resnet20 80 "${suite[@]}" --networks resnet20 "${resnet20[@]}" --providers "${rows20[@]}" \
        --out "$results/resnet20"
    try resnet18 100 "${suite[@]}" --networks resnet18 "${resnet18[@]}" --providers "${rows18[@]}" \
        --out "$results/resnet18"
}

second() {
    tables() {
        show tail 1500 memcheck.log
        show tail 1500 ranks.log
        show tail 1500 huge.log
        show tail 2500 killed-run.log
        show tail 2000 accuracy.log
        show tail 1500 reconstruction.log
    }
    local cifar=() sanitizer=() training shape=() small=() short=()
    prebuilt || build || without_library
    # GDFQ's training takes what others leave, and the sanitizer what is left then.
    training=$(($(left) - 60 - 75 - 45))
    ((training > 100)) && training=100
    [[ -d $visit/cifar10 ]] && cifar=(--cifar "$visit/cifar10")
    if ((dry)); then
        training=1 shape=(--batch 4 --images 32)
        small=(--model gdfq.demo:teacher --image-size 28 --batch 2 --iterations 8)
        short=(--test-images 32 --set inversion.images=8)
        for setting in inversion.iterations reconstruction.iterations reconstruction.finetune_iterations; do
            short+=(--set "$setting=1")
        done
    fi
    try reconstruction 60 "$PYTHON" -m benchmarks.accuracy "${cifar[@]}" --preset cifar --target paper "${short[@]}" \
        --out "$results/reconstruction.json"
    try accuracy $((training + 30)) "$PYTHON" -m benchmarks.accuracy_in_time --seconds "$training" "${cifar[@]}" \
        "${shape[@]}" --run "$runs/accuracy" --out "$results/accuracy.json"
    try killed-run 75 "$PYTHON" -m benchmarks.killed_run "${small[@]}" --runs "$runs" --out "$results/killed-run.json"
    try ranks 40 "${pytest[@]}" tests/gpu/test_several_gpus.py
    try huge 40 "${pytest[@]}" tests/gpu/test_huge.py
    # Every operation once on small, odd shapes: a sanitizer slows everything down. The caching allocator would hide
    # what is written behind a tensor's end.
    if ((!dry)) && ! command -v compute-sanitizer > /dev/null; then
        say "memcheck: skipped, no compute-sanitizer"
    elif (($(left) < (dry ? 5 : 60))); then
        say "memcheck: skipped, $(left) s are left"
    else
        ((dry)) || sanitizer=(compute-sanitizer --tool memcheck --error-exitcode 9)
        try memcheck 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" \
            "$PYTHON" -m benchmarks.every_op_once "$device"
    fi
}

if [[ $call == first ]]; then first; else second; fi
finish
