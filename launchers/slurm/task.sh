#!/usr/bin/env bash
# What srun starts once per device: SLURM's numbers under torch's names, then the command given as arguments.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
