#!/bin/bash
#SBATCH --job-name=de-ray
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
# sbatch docker/slurm.sh problem=yolov3 ...: Ray on every node of the allocation, the run on the first. Submit it from a
# folder that the nodes share, in an environment (module load, source .../activate) that has de-ray on all of them.
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --overlap -w "$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # other people's jobs on the same node have others
export RAY_ADDRESS="$ip:$port" RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))') # for this job alone; srun hands it on
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
common=(--num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="$RAY_TMPDIR" --disable-usage-stats --block)

srun --nodes=1 --ntasks=1 --overlap -w "$head" \
    ray start --head --node-ip-address="$ip" --port="$port" --include-dashboard=false "${common[@]}" &
started=$!
until ray status --address="$RAY_ADDRESS" >/dev/null 2>&1; do
    if ! kill -0 "$started" 2>/dev/null; then
        echo "error: Ray did not start on $head; what it said is above" >&2
        exit 1
    fi
    sleep 2
done
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --overlap -w "$others" \
        ray start --address="$RAY_ADDRESS" "${common[@]}" &
fi
# The pool takes up nodes as they come.
export DE_RAY_STORAGE="${DE_RAY_STORAGE:-$SLURM_SUBMIT_DIR/outputs/storage}"
python -m de_ray.launch +cluster=slurm "$@"
