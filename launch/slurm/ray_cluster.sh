#!/usr/bin/env bash
# The job's Ray cluster: one head, one member a node, a token of its own.
#
# The batch script sources this file for its functions. Run by srun, one task a node, it is that
# node's part of the cluster and lives until its step is ended.

# The address that other nodes reach a node by. NodeAddr may be a name, and a node may know its own
# name as 127.0.1.1: then its first configured address.
address_of() {  # NODE
  local address
  address=$(scontrol -o show node "$1" | grep -o 'NodeAddr=[^ ]*')
  address=${address#NodeAddr=}
  if [[ ! $address =~ ^[0-9.]+$ ]]; then
    address=$(getent ahostsv4 "$address" | awk '$1 !~ /^127\./ {print $1; exit}')
    [[ -n $address ]] || address=$(hostname -I | awk '{print $1}')
  fi
  echo "$address"
}

# A token that only this user can read; Ray's own variables name it. Ray refuses who has another.
make_ray_token() {  # FILE
  (umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$1") || return 1
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$1
}

# Wait until every node has joined; names those that have not.
wait_for_ray() {  # LOGS PID_OF_THE_RAY_STEP LIMIT_S NODE...
  local logs=$1 step=$2 end=$((SECONDS + $3)) number waiting node
  shift 3
  while true; do
    waiting=() number=0
    for node in "$@"; do
      # Said by `ray start` once the node is registered.
      grep -qs 'Ray runtime started' "$logs/ray-$number.log" || waiting+=("$node")
      number=$((number + 1))
    done
    ((${#waiting[@]})) || return 0
    if ! kill -0 "$step" 2>/dev/null || ((SECONDS > end)); then
      echo "error: Ray did not start on ${waiting[*]}; the ends of $logs/ray-*.log:" >&2
      tail -n 5 "$logs"/ray-*.log >&2 || true
      return 1
    fi
    sleep 0.3
  done
}

# One node's part. In: RAY_PORT, HEAD_ADDRESS, LOGS, SFPO_PYTHON, SLURM_NODEID and Ray's token; where
# there is a trainer TRAIN_NODES, RANKS_PER_NODE and GPUS_PER_NODE.
ray_node() {
  # shellcheck disable=SC2153  # from the batch script
  local log=$LOGS/ray-$SLURM_NODEID.log temp=/tmp/sfpo-ray-$SLURM_JOB_ID address pid
  address=$(address_of "$SLURMD_NODENAME")
  local command=(
    "$SFPO_PYTHON" -m ray.scripts.scripts start --block --node-ip-address="$address"
    --num-cpus=1  # also how many idle workers Ray starts ahead; our actors ask for none
    --object-store-memory="$SFPO_RAY_OBJECT_STORE_BYTES" --disable-usage-stats
    --min-worker-port=0 --max-worker-port=0  # any: two jobs may share a node
  )
  if ((SLURM_NODEID == 0)); then
    # A machine whose cores are all taken answers late; a process that is gone shows at once.
    command+=(
      --head --port="$RAY_PORT" --include-dashboard=false --temp-dir="$temp"
      --system-config='{"health_check_timeout_ms": 30000, "health_check_failure_threshold": 4}'
    )
  else
    until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$RAY_PORT") 2>/dev/null; do sleep 0.2; done
    command+=(--address="$HEAD_ADDRESS:$RAY_PORT")
  fi
  # Ray hands out what no trainer rank has. Colocated engines ask it for nothing: they are told the
  # devices of their ranks.
  if ((SLURM_NODEID < ${TRAIN_NODES:-0})); then
    CUDA_VISIBLE_DEVICES=$(seq -s, "$RANKS_PER_NODE" "$((GPUS_PER_NODE - 1))")
    export CUDA_VISIBLE_DEVICES
  fi
  # Its engines are ended by who started them: nothing is left to wait for.
  RAY_worker_niceness=${RAY_worker_niceness:-0} \
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 "${command[@]}" > "$log" 2>&1 &
  pid=$!
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
  wait "$pid" || true  # ended by itself, or our own TERM came
  wait "$pid" || true
  [[ ! -d $temp ]] || rm -rf "$temp"
  return 1  # a member that ends takes the others along (--kill-on-bad-exit)
}

if [[ ${1:-} == node ]]; then
  set -euo pipefail
  ray_node
fi
