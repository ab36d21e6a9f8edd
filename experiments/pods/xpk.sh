#!/usr/bin/env bash
# R1-Zero on a TPU slice of a GKE cluster by xpk (github.com/AI-Hypercomputer/xpk).
#   CLUSTER=NAME IMAGE=REGISTRY/r1jax:tpu SHARED=/shared bash experiments/pods/xpk.sh
# SHARED is a folder that `xpk storage attach` mounts in every pod. devices: 16
set -euo pipefail
: "${CLUSTER:?the name of the GKE cluster}" "${IMAGE:?of experiments/pods/Dockerfile}"
: "${SHARED:?a folder that all hosts mount}"
NAME="${NAME:-r1-zero}" TPU_TYPE="${TPU_TYPE:-v6e-16}" SLICES="${SLICES:-1}"

# xpk runs the command in a shell that waits for it: only what is exec'ed gets signals.
# It restarts a workload that ended with 42 or 127 to 255, --max-restarts times.
exec xpk workload create --cluster "$CLUSTER" --workload "$NAME" \
  --tpu-type "$TPU_TYPE" --num-slices "$SLICES" --docker-image "$IMAGE" \
  --max-restarts 50 --termination-grace-period-seconds 120 \
  --env R1JAX_XLA_FLAGS=tpu-moe \
  --command "exec python -u -m experiments.r1_zero --workdir=$SHARED/$NAME \
--config=experiments/configs/r1_zero.py:tiny \
--config.compilation_cache=$SHARED/xla --config.mesh.data=-1 --config.mesh.fsdp=1 \
--config.grpo.micro_batches=1 --config.pretrain.micro_batches=1"
