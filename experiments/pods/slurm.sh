#!/usr/bin/env bash
# R1-Zero on 2 nodes of 8 GPUs, one process a GPU, as JAX expects it. devices: 16
#   sbatch experiments/pods/slurm.sh        from the root of the repository
# The root is on a file system that all nodes share, with the environment .venv in it.
#SBATCH --job-name=r1-zero
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this by sbatch}" || exit 2
. .venv/bin/activate
export R1JAX_XLA_FLAGS="${R1JAX_XLA_FLAGS:-gpu}"

newest() { ls runs/r1-zero/checkpoints/* 2> /dev/null; }
before="$(newest)"

# Every task sees all GPUs of its node; JAX takes the one of its SLURM_LOCALID.
srun --kill-on-bad-exit=1 --gpu-bind=none bash -c 'exec python -u \
  -m experiments.r1_zero --workdir=runs/r1-zero \
  --config=experiments/configs/r1_zero.py:tiny \
  --config.compilation_cache=runs/xla --config.mesh.data=-1 --config.mesh.fsdp=1 \
  --config.grpo.micro_batches=1 --config.pretrain.micro_batches=1'
code=$?

# Again, and on from the last checkpoint. srun says the highest code, and a task that
# ends with 2 has the others killed (137): those count only where there was progress.
[ "$code" -ge 127 ] && [ "$before" != "$(newest)" ] && code=42
if [ "$code" -eq 42 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
