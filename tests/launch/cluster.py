"""A Slurm cluster of one node on this machine: Debian's slurm-wlm and munge, as root, without systemd and cgroups."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONF = """ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=16817
SlurmdPort=16818
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
KillWait=60
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""  # noqa: E501
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the cluster; yields the environment of its commands."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"{missing[0]} is missing: make test-slurm installs it"
    for name in ("state", "spool", "log"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, cpus=os.cpu_count()))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=False)  # it may run already
    daemons = [
        subprocess.Popen(["slurmctld", "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ]
    try:
        time.sleep(2)
        daemons.append(
            subprocess.Popen(["slurmd", "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        wait_for(lambda: "idle" in ask(environment, "sinfo", "-h", "-o", "%T"), 60)
        yield environment
    finally:
        ask(environment, "scancel", "--full", "--user", "root")
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def submit(environment: dict[str, str], *command: str, cwd: Path) -> str:
    """Submits a job; returns its number."""
    done = subprocess.run(["sbatch", "--parsable", *command], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(environment: dict[str, str], job: str) -> str:
    """The states of a job's tasks, such as "RUNNING" or "COMPLETED,PENDING"."""
    shown = ask(environment, "scontrol", "--oneliner", "show", "job", job)
    states = {word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState=")}
    return ",".join(sorted(states))


def start_now(environment: dict[str, str], job: str) -> None:
    """A requeued job waits two minutes by default."""
    ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


def wait_for(is_true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.3)
