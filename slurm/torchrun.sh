#!/bin/bash
# Stands for PYTHON in a launcher: `-m MODULE FLAGS` is run by torchrun as this node's ranks of a job
# (slurm/supervised_torchrun.sbatch sets TORCHRUN_*), anything else by Python itself.
set -euo pipefail
if [ "${1:-}" != -m ]; then exec "$TORCHRUN_PYTHON" "$@"; fi
# shellcheck disable=SC2086 # several options
exec "$TORCHRUN_PYTHON" -m torch.distributed.run ${TORCHRUN_OPTIONS:?} --node-rank "$TORCHRUN_NODE_RANK" "$@"
