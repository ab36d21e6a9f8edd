#!/usr/bin/env bash
# R1-Zero on Cloud TPU VMs by a queued resource; the same command again goes on.
#   ZONE=us-east5-b IMAGE=REGISTRY/r1jax:tpu NFS=10.0.0.2:/share \
#     bash experiments/pods/queued_resources.sh
# NFS is a share (Filestore) that all hosts mount. SPOT=1 takes spot VMs. devices: 16
set -euo pipefail
: "${ZONE:?of the TPUs}" "${IMAGE:?of experiments/pods/Dockerfile}"
: "${NFS:?HOST:/SHARE}"
NAME="${NAME:-r1-zero}" TPU_TYPE="${TPU_TYPE:-v6e-16}"
# cloud.google.com/tpu/docs/runtimes: v5p has v2-alpha-tpuv5, v5e v2-alpha-tpuv5-lite
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format="value(state.state)" 2> /dev/null || echo NONE
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

if [ "$(state)" = NONE ]; then
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TPU_TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
fi
while now="$(state)" && [ "$now" != ACTIVE ]; do
  case "$now" in FAILED | SUSPENDED)
    echo "$NAME is $now: delete it (gcloud compute tpus queued-resources delete $NAME" \
      "--zone=$ZONE --force) and call this again" >&2
    exit 42
    ;;
  esac
  sleep 30
done

on_all_hosts "sudo mkdir -p /shared && { mountpoint -q /shared ||
  sudo mount -t nfs $NFS /shared; }"
# Host network and devices: JAX asks the metadata server who its peers are.
on_all_hosts "sudo docker rm -f r1jax > /dev/null 2>&1 || true
  sudo docker run --detach --name r1jax --privileged --network=host \
  --volume /shared:/shared --env R1JAX_XLA_FLAGS=tpu-moe $IMAGE bash -c \
  'exec python -u -m experiments.r1_zero --workdir=/shared/$NAME \
  --config=experiments/configs/r1_zero.py:tiny \
  --config.compilation_cache=/shared/xla --config.mesh.data=-1 --config.mesh.fsdp=1 \
  --config.grpo.micro_batches=1 --config.pretrain.micro_batches=1'"
echo "follow it: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0" \
  "--command='sudo docker logs --follow r1jax'"
echo "its exit code: the same with 'sudo docker wait r1jax'; 42 and above: call again"
