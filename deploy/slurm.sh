#!/usr/bin/env bash
# A Ray cluster for as long as a Slurm job, and a recipe on it:  sbatch deploy/slurm.sh RECIPE [mtpd command, default run]
# The environment ($MTPD_VENV), the data, the cache and the work_dir lie on storage that every node sees.
#SBATCH --job-name=mtpd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

recipe=${1:?usage: sbatch deploy/slurm.sh RECIPE [COMMAND]}
command=${2:-run}
# shellcheck disable=SC1091
[[ -z "${MTPD_VENV:-}" ]] || source "$MTPD_VENV/bin/activate"

# this job's own token and port: on nodes that are shared nobody else's process may join or use the cluster. Only the
# environment carries the token, no file and no command line
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
port=$((20000 + SLURM_JOB_ID % 10000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address)
head=${head%% *}
if [[ $head == 127.* ]]; then
    echo "${nodes[0]}: its name stands for $head, which the other nodes cannot reach. Correct /etc/hosts there." >&2
    exit 1
fi
export RAY_ADDRESS=$head:$port
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}

children=()
stop() {
    if ((${#children[@]})); then kill "${children[@]}" 2>/dev/null || true; fi
    wait || true
}
# USR1, two minutes before the time limit: stop, and go on in the next run of the same job
again() {
    trap '' USR1 TERM # the requeue ends this run by TERM; no other answer to it
    echo "stopped before the end; the job goes back to the queue and resumes from what is committed"
    stop
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
# TERM, by scancel, or by Slurm when it requeues the job itself: stop and no more, or no job could be cancelled
ended() {
    trap '' USR1 TERM
    echo "stopped by Slurm; what is committed stays"
    exit 143 # through `stop`
}
trap stop EXIT
trap again USR1
trap ended TERM

# no dashboard: nothing is submitted to this cluster, the job's own process drives it
srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false \
    --num-cpus="$cpus" --num-gpus="$gpus" --block &
children+=($!)
# a head that does not come up ends the job here; mtpd would go on trying to reach it for minutes
for _ in $(seq 60); do
    ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 && break
    kill -0 "${children[0]}" || exit 1
    sleep 2
done
ray health-check --address "$RAY_ADDRESS"

others=$((${#nodes[@]} - 1))
if ((others)); then
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" \
        ray start --address="$RAY_ADDRESS" --num-cpus="$cpus" --num-gpus="$gpus" --block &
    children+=($!)
fi

# in the background, for a trap runs only while the shell waits
mtpd "$command" "$recipe" &
children+=($!)
wait "${children[-1]}"
