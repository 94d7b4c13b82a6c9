"""A real SLURM on one node for the tests that need one: the machine's own, or one started here."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey")
CONFIGURATION = """
ClusterName=vlgpttest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def call(*command, timeout_s=30, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)


def is_idle():
    return call("sinfo", "-h", "-o", "%T").stdout.strip().startswith(("idle", "mixed"))


@pytest.fixture(scope="session")
def slurm():
    """A running controller: the machine's own, or one started here (as root, no systemd) and stopped at the end."""
    missing = [
        name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None
    ]
    if missing or os.getuid() != 0:
        why = f"missing: {', '.join(missing)}" if missing else "not root"
        pytest.skip(f"no SLURM here ({why}): apt-get install slurmctld slurmd slurm-client munge")
    if is_idle():
        yield
        return
    # not pytest's own folders: it prunes them while the daemons live
    with tempfile.TemporaryDirectory(prefix="vlgpt-slurm-") as folder:
        try:
            start(Path(folder))
            yield
        finally:
            stop(Path(folder))


def start(folder):
    """Configure and start the three daemons; skips when the node does not become idle."""
    host = call("hostname", "-s").stdout.strip()
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    if not Path("/etc/munge/munge.key").is_file():
        call("mungekey", "-c")
    shutil.chown("/etc/munge/munge.key", "munge", "munge")
    Path("/etc/slurm").mkdir(exist_ok=True)
    text = CONFIGURATION.format(host=host, folder=folder, cpus=os.cpu_count())
    Path("/etc/slurm/slurm.conf").write_text(text)
    for command in (["runuser", "-u", "munge", "--", "/usr/sbin/munged"], ["slurmctld"], ["slurmd"]):
        subprocess.run(
            command, timeout=600, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    deadline_s = time.monotonic() + 30
    while not is_idle():
        if time.monotonic() > deadline_s:
            log = folder / "slurmctld.log"
            said = log.read_text(errors="replace")[-300:] if log.is_file() else "no log"
            pytest.skip(f"SLURM does not start here: {said}")
        time.sleep(0.5)


def stop(folder):
    """End the controller and the node; munged stays, it keeps nothing."""
    for name in ("slurmd.pid", "slurmctld.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int((folder / name).read_text())
            os.kill(pid, signal.SIGTERM)
            deadline_s = time.monotonic() + 20
            while Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < deadline_s:
                time.sleep(0.2)
