#!/usr/bin/env bash
# A training on several nodes under SLURM: one task a node, and that task starts the node's processes.
#   sbatch --nodes 2 --gpus-per-node 8 configs/accelerate/slurm.sh --config configs/digits/plain.yaml --set data.device=cuda
#SBATCH --job-name=fastdcd
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# A process for each GPU; PROCESSES_PER_NODE says how many where there are none.
export per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs here: set PROCESSES_PER_NODE for a run on CPUs}}
export nodes=${SLURM_JOB_NUM_NODES:?to be started by sbatch}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export address port=$((20000 + SLURM_JOB_ID % 20000))

# Between SIGTERM and the time limit (--signal above) torchrun lets its processes save; without this, for 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

# A job that is requeued, or started again by hand, resumes from its newest checkpoint.
# kill-on-bad-exit: when one node fails the others stop at once instead of waiting for it.
srun --kill-on-bad-exit=1 bash -c '
    exec torchrun --nnodes "$nodes" --nproc_per_node "$per_node" --node_rank "$SLURM_NODEID" \
        --master_addr "$address" --master_port "$port" \
        fastdcd/train.py "$@" --resume auto' train "$@"
