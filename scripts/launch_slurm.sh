#!/usr/bin/env bash
# Runs one dsjax command on the nodes of a SLURM job, one process a node, each with all cards of its node.
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh generate --model DIR --mesh ep=16 --prompt "Why?" ...
# Submit it from the root of this repository after ./scripts/quickstart has made .venv there, on a file system that all
# nodes see; or set DSJAX to the command that the nodes have. DIR must be there on all nodes too: every process reads
# its own part of it. What the model prints is in dsjax-JOB.out, errors and notes of all processes are in dsjax-JOB.err.
#
# What sbatch's own flags can change:
#SBATCH --job-name=dsjax
#SBATCH --output=dsjax-%j.out
#SBATCH --error=dsjax-%j.err
#SBATCH --nodes=2
#SBATCH --exclusive
# One process a node. For one a card: --ntasks-per-node=8 --gpus-per-task=1, by which SLURM shows each its own card.
#SBATCH --ntasks-per-node=1
# All memory of a node: checkpoints are read through the page cache.
#SBATCH --mem=0
set -euo pipefail

dsjax="${DSJAX:-${SLURM_SUBMIT_DIR:?run it with sbatch}/.venv/bin/dsjax}"
if ! command -v "$dsjax" >/dev/null; then
    echo "launch_slurm.sh: $dsjax: not found; run ./scripts/quickstart where you submit from, or set DSJAX" >&2
    exit 2
fi
# srun does not take this over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# dsjax finds its place in the variables that srun sets: process 0 is on the first node, on a port that follows from the
# job's number. When a process dies the others end by themselves within seconds, with a line that says which; SLURM
# kills what is left half a minute later.
exec srun --kill-on-bad-exit=0 --wait=30 "$dsjax" "$@"
