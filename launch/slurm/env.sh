# shellcheck shell=bash disable=SC2034
# What differs between clusters, and nothing else: every job script reads this file.
# `sfpo-megatron slurm CONFIG --env MY_ENV.sh ...` takes a copy of yours into RUN/slurm.

# --- software ------------------------------------------------------------------------------------
# module load cuda
# source /shared/venv/bin/activate
# The Python that has sfpo-megatron, on every node (in the container, if there is one). Unset: the
# one that `sfpo-megatron slurm` ran under.
# SFPO_PYTHON=/shared/venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1

# --- network -------------------------------------------------------------------------------------
# The interface that the nodes reach one another by (`ip -br addr`), for NCCL's and gloo's sockets.
# Unset: they choose for themselves.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# --- container (optional) ------------------------------------------------------------------------
# Flags of srun for pyxis/enroot, the node's /tmp among them, where Ray and the run meet:
# CONTAINER_SRUN=(--container-image=/shared/sfpo.sqsh --container-mounts=/shared,/tmp --no-container-mount-home)
# or a command in front of every command, for apptainer (which has /tmp by default):
# CONTAINER_EXEC=(apptainer exec --nv --bind /shared /shared/sfpo.sif)
CONTAINER_SRUN=()
CONTAINER_EXEC=()

# --- preflight -----------------------------------------------------------------------------------
# GPUs that every node must show; 0 on CPU nodes. Unset: what the job asks for.
# SFPO_EXPECT_GPUS=8
# Ranks a node that measure an all-reduce before the run; 0: none. Unset: one a GPU.
# SFPO_PREFLIGHT_RANKS=0
# The least bus bandwidth that is accepted, in GB/s: inside a node, and between two nodes.
SFPO_MIN_GB_S_IN_NODE=${SFPO_MIN_GB_S_IN_NODE:-200}
SFPO_MIN_GB_S_BETWEEN_NODES=${SFPO_MIN_GB_S_BETWEEN_NODES:-20}

# --- Ray -----------------------------------------------------------------------------------------
# Rollout batches are small; Ray's own default is a third of the memory.
SFPO_RAY_OBJECT_STORE_BYTES=${SFPO_RAY_OBJECT_STORE_BYTES:-2000000000}
