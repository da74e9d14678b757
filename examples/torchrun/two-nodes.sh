#!/bin/bash
# A run on two machines that reach each other. On the first, then on the second:
#   two-nodes.sh 0 FIRST_HOST run.yaml runs/first
#   two-nodes.sh 1 FIRST_HOST run.yaml runs/first
# GPUS ranks on each (8), which meet at PORT of the first (29500).
set -euo pipefail

exec torchrun --nnodes=2 --node-rank="${1:?0 or 1}" --nproc-per-node="${GPUS:-8}" \
    --master-addr="${2:?name or address of the first machine}" --master-port="${PORT:-29500}" \
    --max-restarts=3 -m unicl_fast.tools.pretrain \
    --config "${3:?settings, such as run.yaml}" --out "${4:?run folder}" --resume auto
