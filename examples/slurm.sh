#!/bin/bash
# One run on all GPUs of a node, or of several. Preempted and requeued, it goes on from its last checkpoint.
#
#     sbatch examples/slurm.sh
#     sbatch --nodes=4 examples/slurm.sh
#
#SBATCH --job-name=gdfq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

out=${OUT:-runs/resnet50}
if [[ -f $out/config.toml ]]; then
    run=(--resume "$out")
else
    run=(--model pytorchcv:resnet50 --model-arg pretrained=True --method gdfq --out "$out")
fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first_node:29500" \
    -m gdfq quantize "${run[@]}"
