#!/bin/bash
# Trains on two nodes of eight GPUs, one task a GPU, without torchrun:
#     sbatch clusters/slurm.sh flow.json --models /shared/models --run flux-1
# All words go to `dancegrpo run`. Runs are written to $RUNS: a folder that all nodes see, or an address such as s3://bucket/runs.
# Five minutes before its time is over, and when it is preempted, the job saves after its micro-batch, leaves with status 143 and is queued again.
#SBATCH --job-name=dancegrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

RUNS=${RUNS:-$SLURM_SUBMIT_DIR/output}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# srun would kill its tasks if it were told itself; this tells the tasks, and not this script
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# the first process saves while the others have left already: none is killed for another's status, but after ten minutes
train() {
    srun --kill-on-bad-exit=0 --wait=600 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec dancegrpo run "$@"' dancegrpo \
        "$@" --output "$RUNS" --processes "$SLURM_NTASKS" --resume &
    local step=$!
    while :; do
        wait "$step"; status=$?
        kill -0 "$step" 2>/dev/null || break  # else `wait` has returned for the signal, not for the step
    done
}

train "$@"
while [ "$status" -eq 75 ]; do  # out of memory, where Loop Start says "halve": the same again, with half the micro-batch
    train "$@"
done
[ "$status" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
