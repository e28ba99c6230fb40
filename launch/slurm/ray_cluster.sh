#!/usr/bin/env bash
# The job's Ray cluster: one head, one member a node, a token of its own.
#
# The batch script sources this file for its functions. Run by srun, one task a node, it is that
# node's part of the cluster and lives until its step is ended (`node`), or a command of the run
# beside it (`beside`). srun may do that in a container, which has no command of Slurm.

RAY_FOLDER=/tmp/sfpo-ray-$SLURM_JOB_ID  # of a node: logs, and the sockets by which a driver joins

# The address that other nodes reach a node by. NodeAddr may be a name, and a node may know its own
# name as 127.0.1.1. Nothing where that does not tell.
address_of() {  # NODE
  local address
  address=$(scontrol -o show node "$1" | grep -o 'NodeAddr=[^ ]*')
  address=${address#NodeAddr=}
  if [[ ! $address =~ ^[0-9.]+$ ]]; then
    address=$(getent ahostsv4 "$address" | awk '$1 !~ /^127\./ {print $1; exit}')
  fi
  echo "$address"
}

own_address() {  # the first that is configured
  hostname -I | awk '{print $1}'
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

# One node's part. In: RAY_PORT, HEAD_ADDRESS, NODE_ADDRESSES, LOGS, SFPO_PYTHON, SLURM_NODEID and
# Ray's token; where there is a trainer TRAIN_NODES, RANKS_PER_NODE and GPUS_PER_NODE.
ray_node() {
  # shellcheck disable=SC2153  # from the batch script
  local log=$LOGS/ray-$SLURM_NODEID.log address pid addresses devices
  # shellcheck disable=SC2153
  read -ra addresses <<< "$NODE_ADDRESSES"
  address=${addresses[SLURM_NODEID]}
  [[ $address != - ]] || address=$(own_address)
  local command=(
    "$SFPO_PYTHON" -m ray.scripts.scripts start --block --node-ip-address="$address"
    --num-cpus=1  # also how many idle workers Ray starts ahead; our actors ask for none
    --object-store-memory="$SFPO_RAY_OBJECT_STORE_BYTES" --disable-usage-stats
    --min-worker-port=0 --max-worker-port=0  # any: two jobs may share a node
  )
  if ((SLURM_NODEID == 0)); then
    # A machine whose cores are all taken answers late; a process that is gone shows at once.
    command+=(
      --head --port="$RAY_PORT" --include-dashboard=false --temp-dir="$RAY_FOLDER"
      --system-config='{"health_check_timeout_ms": 30000, "health_check_failure_threshold": 4}'
    )
  else
    until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$RAY_PORT") 2>/dev/null; do sleep 0.2; done
    command+=(--address="$HEAD_ADDRESS:$RAY_PORT")
  fi
  # Ray hands out what no trainer rank has. Colocated engines ask it for nothing: they are told the
  # devices of their ranks. Names as Slurm has them: numbers of the node where it does not hide the
  # others, or UUIDs.
  if ((SLURM_NODEID < ${TRAIN_NODES:-0})); then
    devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 "$((GPUS_PER_NODE - 1))")}
    CUDA_VISIBLE_DEVICES=$(cut -sd, -f"$((RANKS_PER_NODE + 1))-" <<< "$devices")
    export CUDA_VISIBLE_DEVICES
  fi
  # Its engines are ended by who started them: nothing is left to wait for.
  RAY_worker_niceness=${RAY_worker_niceness:-0} \
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 "${command[@]}" > "$log" 2>&1 &
  pid=$!
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM
  wait "$pid" || true  # ended by itself, or our own TERM came
  wait "$pid" || true
  [[ ! -d $RAY_FOLDER ]] || rm -rf "$RAY_FOLDER"
  return 1  # a member that ends takes the others along (--kill-on-bad-exit)
}

# A container with a /tmp of its own, as enroot makes it, has none of Ray's sockets: Ray would abort.
beside_ray() {  # COMMAND...
  if [[ $SLURM_NODEID == 0 && ! -d $RAY_FOLDER ]]; then
    echo "error: $SLURMD_NODENAME: found no $RAY_FOLDER, in which Ray has its sockets, expected the" \
      "node's own /tmp in every container; in env.sh add /tmp to --container-mounts (pyxis) or" \
      "--bind /tmp (apptainer)" >&2
    touch "$LOGS/no-ray-folder"
    exit 1
  fi
  exec "$@"
}

case ${1:-} in
  node) set -euo pipefail; ray_node ;;
  beside) set -euo pipefail; beside_ray "${@:2}" ;;
esac
