# shellcheck shell=bash
# What every job script begins with, and how it ends. Sourced; in: RUN, CONFIG, GPUS_PER_NODE,
# SFPO_PYTHON, MAX_FAILURES, IN_CONTAINER and what env.sh sets.

# An env.sh of an older release, or a short one of the user's own, need not set all there is.
: "${SFPO_MIN_GB_S_IN_NODE:=200}" "${SFPO_MIN_GB_S_BETWEEN_NODES:=20}"
: "${SFPO_RAY_OBJECT_STORE_BYTES:=2000000000}"

# The job's output may be on a full disk: what it cannot say is no reason to end it.
say() { printf '%(%F %T)T %s\n' -1 "$*" || true; }
fail() { say "error: $*" >&2; exit 1; }

# The steps of a job share its devices: without --overlap, --gres and --mem=0 a second one would wait
# for the first for ever. One task a node is not bound to one core.
SHARED=(--ntasks-per-node=1 --overlap --gres="gpu:$GPUS_PER_NODE" --mem=0 --cpu-bind=none)

begin() {
  local end node addresses=()
  ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  LOGS=$RUN/slurm/logs/$ATTEMPT
  mkdir -p "$LOGS" || fail_for_now "$LOGS cannot be made"
  mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  ((${#NODES[@]})) || fail_for_now "scontrol does not name the nodes"
  for node in "${NODES[@]}"; do  # here, as no container has scontrol; `-`: the node asks itself
    addresses+=("$(address_of "$node" || true)")
    [[ -n ${addresses[-1]} ]] || addresses[-1]=-
  done
  [[ ${addresses[0]} != - ]] || addresses[0]=$(own_address) || true
  HEAD_ADDRESS=${addresses[0]} NODE_ADDRESSES=${addresses[*]}
  [[ -n $HEAD_ADDRESS ]] || fail_for_now "${NODES[0]} has no address"
  RAY_PORT=$((20000 + SLURM_JOB_ID % 5000 * 2))  # below the ports that the kernel gives out
  MASTER_PORT=$((RAY_PORT + 1))
  SFPO_EXPECT_GPUS=${SFPO_EXPECT_GPUS:-$GPUS_PER_NODE}
  SFPO_PREFLIGHT_RANKS=${SFPO_PREFLIGHT_RANKS:-$SFPO_EXPECT_GPUS}
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then  # not every release of Slurm sets it
    end=$(squeue -h -j "$SLURM_JOB_ID" -o %e) || true
    # Nothing instead of a time would be midnight to date.
    SLURM_JOB_END_TIME=$(date -d "${end:-unknown}" +%s 2>/dev/null) || true
  fi
  export SFPO_PYTHON LOGS HEAD_ADDRESS NODE_ADDRESSES RAY_PORT SFPO_RAY_OBJECT_STORE_BYTES
  export SLURM_JOB_END_TIME
  trap 'rm -f "$LOGS/ray-token" || true' EXIT  # the exit code stays the script's
  say "job $ATTEMPT on ${NODES[*]}; logs: $LOGS"
}

# Ends the job if the config is wrong, with check's message; a requeue would not help. Whatever else
# kept it from reading, such as a file system that is away, may be over by the next start.
check_config() {  # OPTIONS OF CHECK...
  local status=0
  say "check"
  srun --job-name=check --nodes=1 --ntasks=1 "${SHARED[@]}" "${IN_CONTAINER[@]}" \
    "$SFPO_PYTHON" -m sfpo_megatron check "$@" "$CONFIG" > /dev/null || status=$?
  ((status)) || return 0
  ((status != 2)) || exit 2
  fail_for_now "check ended with $status"
}

# Ends the job if a node is not as it should be, and names it.
preflight() {
  say "preflight"
  srun --job-name=preflight --nodes="${#NODES[@]}" "${SHARED[@]}" "${IN_CONTAINER[@]}" \
    "$SFPO_PYTHON" -m sfpo_megatron.slurm.preflight \
    --dir "$LOGS" --gpus "$SFPO_EXPECT_GPUS" "${NODES[@]}" || fail "preflight: see above"
  [[ $SFPO_PREFLIGHT_RANKS != 0 ]] || return 0
  # shellcheck disable=SC2016  # the node expands it
  srun --job-name=bandwidth --nodes="${#NODES[@]}" --kill-on-bad-exit=1 "${SHARED[@]}" \
    "${IN_CONTAINER[@]}" bash -c 'PET_NODE_RANK=$SLURM_NODEID exec "$@"' bash \
    "$SFPO_PYTHON" -m torch.distributed.run --nnodes="${#NODES[@]}" \
    --nproc-per-node="$SFPO_PREFLIGHT_RANKS" --rdzv-backend=static --master-addr="$HEAD_ADDRESS" \
    --master-port="$MASTER_PORT" -m sfpo_megatron.slurm.bandwidth \
    --in-node "$SFPO_MIN_GB_S_IN_NODE" --between-nodes "$SFPO_MIN_GB_S_BETWEEN_NODES" \
    "${NODES[@]}" || fail "preflight: see above"
}

# The running step of that name, as scancel names it.
step_id() {  # NAME
  squeue --steps -h -j "$SLURM_JOB_ID" -o '%i %j' | awk -v name="$1" '$2 == name {print $1}' || true
}

# Quicker than Slurm's own end of the job, which waits KillWait; that follows in any case.
stop_ray() {
  local step
  step=$(step_id ray)
  [[ -z $step ]] || scancel --signal=TERM "$step" || true
  for _ in {1..15}; do
    kill -0 "$RAY" 2>/dev/null || break
    sleep 1 &
    wait $! || true
  done
}

# Asks the run to save: rank 0 polls the file. One that exists is enough, whatever it says.
stop() {  # WHY
  say "$1: asking the run to save and stop"
  STOPPING=1
  echo "$1" > "$STOP_FILE" || [[ -e $STOP_FILE ]] || say "$STOP_FILE cannot be written"
}

checkpoint() { cat "$RUN/checkpoints/latest" 2>/dev/null || echo none; }

# Where the cluster requeues by exit code that is enough; elsewhere the job asks for it.
requeue() {  # WHY
  say "$1: back into the queue, to continue from checkpoint $(checkpoint)"
  local codes
  codes=$(scontrol show config | awk '$1 == "RequeueExit" {print $3}') || codes=''
  if [[ ,$codes, != *,85,* && $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # until Slurm ends this script
  fi
  exit 85
}

# A run that has stopped. Where it has saved nothing the next attempt would most likely do the same:
# a failure, unless another job took the nodes, which is how a stop far from the job's end is read.
requeue_stopped() {
  [[ $(checkpoint) == "$FIRST" ]] || requeue "the run has saved and stopped"
  ((STOPPING)) || requeue_after_failure "the run stopped itself, and has saved nothing"
  [[ -z $OWN_STOP ]] || requeue_after_failure "$OWN_STOP, and the run has saved nothing"
  if ends_soon; then
    requeue_after_failure "the time was over before a checkpoint: use a longer --time or a smaller \
checkpoint.every"
  fi
  requeue "stopped, with nothing new to save"
}

# Slurm sends USR1 a minute and SAVE_BUDGET_S before the end, or up to a minute earlier.
ends_soon() {
  [[ -n ${SLURM_JOB_END_TIME:-} ]] &&
    (($(date +%s) >= SLURM_JOB_END_TIME - SAVE_BUDGET_S - 120))
}

# What the next start may not meet, as a file system that is away for a moment. A job that does not
# continue ends by it.
fail_for_now() {  # WHY
  [[ -v MAX_FAILURES ]] || fail "$1"
  requeue_after_failure "$1"
}

# Anything but a saved stop: requeued as well, but not for ever.
requeue_after_failure() {  # WHY
  local file=$RUN/slurm/failures.$SLURM_JOB_ID last='' count=0
  # A node that went down while it was written has left it empty, or anything.
  [[ ! -f $file ]] || read -r count last < "$file" || true
  [[ $count =~ ^[0-9]+$ && $last == "$(checkpoint)" ]] || count=0
  count=$((count + 1))
  # Aside first: a full disk would leave nothing of the count before.
  if ! { echo "$count $(checkpoint)" > "$file.new" && mv -fT "$file.new" "$file"; }; then
    say "$file cannot be written: all restarts of this job count as failures"
    count=$((${SLURM_RESTART_COUNT:-0} + 1))
  fi
  ((count < MAX_FAILURES)) || fail "$1; $count failures in a row without a new checkpoint"
  requeue "$1 (failure $count of $MAX_FAILURES)"
}
