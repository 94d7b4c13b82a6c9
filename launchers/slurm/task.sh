#!/usr/bin/env bash
# What srun starts once per device: SLURM's numbers under torch's names, then the command given as arguments.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# LOCAL_RANK is the number of a device among those that the task sees: under --gpus-per-task=1 it sees one, number 0.
IFS=, read -ra VISIBLE <<< "${CUDA_VISIBLE_DEVICES:-}"
if [ ${#VISIBLE[@]} -gt 0 ]; then LOCAL_RANK=$((SLURM_LOCALID % ${#VISIBLE[@]})); fi
trap '' USR1 TERM  # the command answers them; this shell stays to see how it ends
"$@"
CODE=$?
# How training ended, as it said itself: srun would report the signal that it sends to the tasks that end last.
if [ "$CODE" -gt 0 ] && [ "$CODE" -lt 128 ] && [ -n "${EXIT_FILE:-}" ]; then echo "$CODE" > "$EXIT_FILE"; fi
# 75 (committed, wants to go on) is no failure: with another code srun would kill the tasks that end a moment later.
if [ "$CODE" -eq 75 ]; then exit 0; fi
exit "$CODE"
