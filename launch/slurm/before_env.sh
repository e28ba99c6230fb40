# shellcheck shell=bash
# What every job script does first: forgets where it was submitted from, and reads env.sh.
#
#   source before_env.sh; forget_the_submitter; read_env_begin FILE; source FILE; read_env_end $?
#
# env.sh is sourced by the job script itself: in a function its `declare`s would be the function's.

# sbatch hands on the environment that it was called in, and what an allocation there has set is
# input of every srun, squeue and scancel here: its memory beside this job's is a fatal error, its
# binding and its number of tasks are this job's. What the job itself asks for stands in the script.
forget_the_submitter() {
  unset "${!SRUN_@}" "${!SBATCH_@}" "${!SALLOC_@}" "${!SQUEUE_@}" "${!SCANCEL_@}" \
    "${!SCONTROL_@}" "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}" \
    "${!SLURM_NTASKS@}" "${!SLURM_GPU_@}" "${!SLURM_STEP@}" "${!SLURM_TRES_@}" "${!SLURM_STD@}" \
    "${!SLURM_THREADS@}" "${!SLURM_WAIT@}" "${!SLURM_OVER@}" "${!SLURM_EX@}" \
    SLURM_ACCOUNT SLURM_CONSTRAINT SLURM_CORE_SPEC SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK \
    SLURM_CPU_FREQ_REQ SLURM_DEPENDENCY SLURM_DIST_PLANESIZE SLURM_DISTRIBUTION SLURM_EPILOG \
    SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_GRES \
    SLURM_HINT SLURM_HOSTFILE SLURM_IMMEDIATE SLURM_KILL_BAD_EXIT SLURM_LABELIO SLURM_MULTI_PROG SLURM_NETWORK \
    SLURM_NO_KILL SLURM_NPROCS SLURM_OPEN_MODE SLURM_PARTITION SLURM_PROLOG SLURM_QOS \
    SLURM_REQ_SWITCH SLURM_RESERVATION SLURM_RESV_PORTS SLURM_SPREAD_JOB SLURM_TASK_EPILOG \
    SLURM_TASK_PROLOG SLURM_TIMELIMIT SLURM_TIME_FORMAT SLURM_UNBUFFEREDIO SLURM_WCKEY \
    SLURM_WHOLE SLURM_WORKING_DIR
}

# Without the strictness that conda's and modules' own scripts do not bear; and yet the job ends, with
# the line, where a command of env.sh itself fails.
read_env_begin() {  # FILE
  SFPO_ENV_FILE=$1 SFPO_ENV_DIR=$PWD
  trap 'read_env_failed "$?" "$LINENO" "${BASH_SOURCE[0]}"' ERR
  trap 'read_env_left "$?"' EXIT
  set +euo pipefail
}

# What fails inside a script that env.sh sources, or inside a function, is that script's business.
read_env_failed() {  # STATUS LINE FILE
  local text
  [[ $3 == "$SFPO_ENV_FILE" ]] || return 0
  trap - EXIT
  text=$(sed -n "$2{s/^[[:space:]]*//;p}" "$3")  # BASH_COMMAND is what failed last inside of it
  echo "error: $3:$2: \`$text\` ended with $1, expected 0; correct it, or write \`|| true\`" \
    "behind what may fail" >&2
  exit 1
}

read_env_left() {  # STATUS
  trap - EXIT
  echo "error: $SFPO_ENV_FILE: it ended the job (exit code $1), expected that the script goes on" \
    "behind it; remove \`exit\`, and see above for an error in it" >&2
  exit 1
}

# Leaves IN_CONTAINER, which stands in front of every command of a step.
#
# A last line like `[[ -e FILE ]] && source FILE` leaves 1 behind and is no failure; what the
# interpreter could not read is, and a `return` with a code.
read_env_end() {  # STATUS
  local line
  trap - ERR EXIT
  if (($1 != 0)); then
    bash -n "$SFPO_ENV_FILE" || exit 1  # its message has file and line
    if line=$(grep -nm1 -E '(^|[;&|{(]|then|else)[[:space:]]*return([[:space:];]|$)' \
      "$SFPO_ENV_FILE"); then
      echo "error: $SFPO_ENV_FILE:${line%%:*}: it returned $1, expected 0; see above" >&2
      exit 1
    fi
  fi
  unset IFS
  cd "$SFPO_ENV_DIR" || exit 1
  IN_CONTAINER=()
  [[ ! -v CONTAINER_SRUN ]] || IN_CONTAINER+=("${CONTAINER_SRUN[@]}")
  [[ ! -v CONTAINER_EXEC ]] || IN_CONTAINER+=("${CONTAINER_EXEC[@]}")
  # pyxis begins in the image's directory, where a config's relative paths lead nowhere. Where this
  # one is not mounted bash says so, and goes on: a config may have none.
  # shellcheck disable=SC2016  # the container expands it
  ((${#IN_CONTAINER[@]} == 0)) || IN_CONTAINER+=(bash -c 'cd "$0"; exec "$@"' "$PWD")
  set -euo pipefail
}
