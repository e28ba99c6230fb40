"""A real Slurm on this machine: munge, slurmctld and several slurmd on loopback, with fake GPUs.

Node i is 127.0.0.(i+1), so that programs which tell nodes apart by address can. No accounting and
no cgroups: processes are tracked by their parents, so what leaves its family is not found.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from made.waiting import wait_for

PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
KILL_WAIT_S = 5
GRACE_S = 60
_PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
# No cgroup of our own and no cores to bind to.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
RequeueExit=85
KillWait={kill_wait}
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=30
# A job in `high` requeues jobs in `low`, after their own --signal and a time of grace.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr={addresses} Port={ports} CPUs=16 RealMemory=16000 \
Gres=gpu:h100:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that the lab needs and this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


class SlurmLab:
    """Started by `start`; `run` is any Slurm command against it."""

    def __init__(self, root: Path, *, num_nodes: int) -> None:
        self._root = root
        self._num_nodes = num_nodes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Returns when every node is idle."""
        root, n = self._root, self._num_nodes
        root.chmod(0o755)  # munge wants to be reachable
        for folder in ("state", *(f"spool.node{i}" for i in range(1, n + 1)), "devices"):
            (root / folder).mkdir()
        for i in range(8):
            (root / f"devices/gpu{i}").touch()
        first = _free_ports(n + 1)
        conf = CONF.format(
            root=root,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            controller_port=first,
            nodes=f"node[1-{n}]",
            addresses=f"127.0.0.[2-{n + 1}]",
            ports=f"[{first + 1}-{first + n}]",
            kill_wait=KILL_WAIT_S,
            grace=GRACE_S,
        )
        (root / "slurm.conf").write_text(conf)
        (root / "gres.conf").write_text(
            f"NodeName=node[1-{n}] Name=gpu Type=h100 File={root}/devices/gpu[0-7]\n"
        )
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={root}/munge.sock", f"--pid-file={root}/munged.pid",
            f"--log-file={root}/munged.log", f"--seed-file={root}/munge.seed",
        )  # fmt: skip
        wait_for((root / "munge.sock").exists, timeout_s=10, what="munged")
        self._daemon("slurmctld", "-D", "-i", "-f", str(root / "slurm.conf"))
        for i in range(1, n + 1):
            self._daemon("slurmd", "-D", "-f", str(root / "slurm.conf"), "-N", f"node{i}")
        wait_for(self._all_idle, timeout_s=30, what=f"idle nodes (logs: {root})")

    def requeue_by_exit_code(self, on: bool) -> None:
        """Whether jobs that exit with 85 are requeued, as from now."""
        file = self._root / "slurm.conf"
        lines = [x for x in file.read_text().splitlines() if not x.startswith("RequeueExit=")]
        file.write_text("\n".join([*lines, *(["RequeueExit=85"] if on else [])]) + "\n")
        self.run("scontrol", "reconfigure")

        def done() -> bool:
            config = self.run("scontrol", "show", "config").stdout
            return ("RequeueExit             = 85" in config) == on

        wait_for(done, timeout_s=10, what="the new slurm.conf")

    def _daemon(self, *command: str) -> None:
        log = (self._root / f"{command[0]}.out").open("ab")
        prctl = ctypes.CDLL(None).prctl

        def end_with_us() -> None:  # a test session that is killed leaves no daemon
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_us,
            )
        )
        log.close()

    def _all_idle(self) -> bool:
        done = self.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D", check=False)
        return done.stdout.strip() == str(self._num_nodes)

    def stop(self) -> None:
        """Cancel what runs, then end the daemons: slurmd last of Slurm, munged last of all."""
        self.run("scancel", f"--user={getpass.getuser()}", check=False)
        wait_for(
            lambda: not self.run("squeue", "-h", check=False).stdout.strip(),
            timeout_s=KILL_WAIT_S + 20,
            what="the queue to empty",
        )
        munged, *slurm = self._daemons
        for daemon in (*slurm, munged):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(
        self, *command: str, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A Slurm command, or anything else that should find this Slurm."""
        done = subprocess.run(
            command,
            **({"env": self.env, "capture_output": True, "text": True, "timeout": 120} | options),
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    # --- jobs -----------------------------------------------------------------------------------

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, ..."""
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        text = self.run("scontrol", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def release(self, job: str) -> None:
        """Let a requeued job start now: Slurm would hold it back for two minutes."""
        time.sleep(3)  # slurmctld refuses while the job's last processes are being collected
        wait_for(
            lambda: (
                self.run(
                    "scontrol", "update", f"JobId={job}", "StartTime=now", check=False
                ).returncode
                == 0
            ),
            timeout_s=30,
            what=f"job {job} to be released",
        )

    def wait_for_state(self, job: str, *states: str, timeout_s: float) -> str:
        """Poll until the job is in one of `states`."""

        def reached() -> str | None:
            state = self.state(job)
            return state if state in states else None

        return wait_for(reached, timeout_s=timeout_s, what=f"job {job} to be {' or '.join(states)}")


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, below where the kernel and our jobs take
    theirs."""
    for _ in range(100):
        first = random.randrange(10_000, 19_000)
        try:
            sockets = [socket.create_server(("", first + i)) for i in range(count)]
        except OSError:
            continue
        for one in sockets:
            one.close()
        return first
    raise AssertionError("found no free ports")
