# Source this in an sbatch script: the names torch and deepspeed want, from those SLURM sets. No ssh, no hostfile.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# another port after every requeue: the old one may still be held
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1000 * ${SLURM_RESTART_COUNT:-0}) % 20000))
LOCAL_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions_$SLURM_JOB_ID}
export MASTER_ADDR MASTER_PORT LOCAL_SIZE TORCH_EXTENSIONS_DIR
# Since SLURM 22.05 srun takes --cpus-per-task from this name only; without it every task gets one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
