#!/bin/bash
# A table of the paper, its cells spread over eight tasks that write to one folder. Tasks that were stopped are submitted
# again by number; finished cells stay, and the table has them all when the last task is over.
#
#     sbatch examples/slurm_array.sh
#     sbatch --array=3,5 examples/slurm_array.sh
#
#SBATCH --job-name=gdfq-table1
#SBATCH --array=1-8
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

srun gdfq reproduce table1 --shard "$SLURM_ARRAY_TASK_ID/8" --resume --out results \
    --data cifar10=data/cifar10 --data cifar100=data/cifar100 --data imagenet=data/imagenet
