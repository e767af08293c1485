#!/bin/bash
# One machine's share of a run: start it on every machine, with the same settings and arguments.
#
#   NODES=2 PROCESSES=8 HEAD=node0 OUT=runs/a bash launch/torchrun.sh tune model=path/to/llama data=corpus.txt
#
#   NODES         machines (1)
#   PROCESSES     ranks on each: its GPUs (what SLURM gave, or 1)
#   HEAD, PORT    where they meet: the first machine's name and a free port of it (29500); for NODES > 1
#   RUN_ID        what they call the meeting (ee_scale); two runs that meet at one place need two
#   MAX_RESTARTS  times that all ranks start again after one died (0)
#   OUT           output folder of the run (the config's)
#   PYTHON        the Python that has ee_scale (python)
#
# The arguments are those of `ee-scale`. `ee-scale launch ... launcher=torchrun` fills all of this in from one config.
set -euo pipefail

meeting=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    : "${HEAD:?is not set: name the first machine, the same on all of them}"
    meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN_ID:-ee_scale}")
    if [ -n "${SLURM_NODEID:-}" ]; then
        # SLURM knows who is first and how nodes are called; torchrun would guess both from host names.
        first=false
        if [ "$SLURM_NODEID" -eq 0 ]; then first=true; fi
        meeting+=(--rdzv-conf "is_host=$first" --local-addr "${SLURMD_NODENAME:-$(hostname)}")
    fi
fi

# A signal that comes while Python starts must not kill it; after that it passes TERM and USR1 on to the ranks.
trap '' TERM USR1
exec "${PYTHON:-python}" -m ee_scale.launching.ranks "${meeting[@]}" \
    --nproc-per-node "${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" --max-restarts "${MAX_RESTARTS:-0}" \
    -m ee_scale "$@" ${OUT:+"out=$OUT"}
