"""Starts background processes and ends them by recorded identity, never another one that got the same pid."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster.addresses import LOOPBACK, POD_SUBNET, SERVICE_SUBNET
from devcluster.errors import ClusterError

# In the environment of every process we start; `leftovers` finds processes without a record by it.
MARKER = "QLORA_DEVCLUSTER"
# The child records itself before it becomes the program: whatever is killed, no program runs unrecorded.
_RECORD_THEN_EXEC = (
    "read -r boot < /proc/sys/kernel/random/boot_id; read -r stat < /proc/$$/stat; "
    'printf "%s\\n%s\\n" "$boot" "$stat" > "$0.new"; mv "$0.new" "$0"; exec "$@"'
)
_POLL_SECONDS = 0.05
Condition = Callable[[], bool]


@dataclass(frozen=True)
class Record:
    """Identity of a process: boot and start time (clock ticks), as pids are reused."""

    name: str
    pid: int
    boot: str
    started: int


def parse_record(name: str, text: str) -> Record:
    """Read a record: the boot id and the line of /proc/PID/stat (proc_pid_stat(5): field 22 is the start time).

    Raises ClusterError when the text is not such a record.
    """
    lines = text.splitlines()
    try:
        boot, stat = lines
        # The second field, the command in parentheses, may itself hold spaces and parentheses.
        fields = stat.rpartition(")")[2].split()
        return Record(name, int(stat.split(" ", 1)[0]), boot, int(fields[19]))
    except (ValueError, IndexError):
        raise ClusterError(f"process record {name}: expected a boot id and a /proc stat line, found {text!r}") from None


def records(directory: Path) -> Iterator[Record]:
    """All records in a folder, oldest process first."""
    found = [parse_record(path.name, path.read_text()) for path in directory.glob("*") if path.suffix != ".new"]
    yield from sorted(found, key=lambda record: (record.started, record.pid))


def alive(record: Record) -> bool:
    """Whether this very process still runs, no zombie and no other of its pid."""
    try:
        stat = Path(f"/proc/{record.pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(")")[2].split()
    return boot == record.boot and int(fields[19]) == record.started and fields[0] not in "ZX"


def identify(pid: int, name: str) -> Record | None:
    """The record of a process that runs now, or None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse_record(name, Path("/proc/sys/kernel/random/boot_id").read_text() + stat)


def start(
    name: str,
    argv: Sequence[str | Path],
    *,
    directory: Path,
    log: Path,
    with_parent: bool = False,
) -> Record:
    """Start a program in its own session, its output in `log`, its record in `directory`.

    `with_parent` ends the program when the calling process dies, however that happens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.unlink(missing_ok=True)
    prefix = ["setpriv", "--pdeathsig", "KILL"] if with_parent else []
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*prefix, "sh", "-c", _RECORD_THEN_EXEC, path, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**environment(), MARKER: str(directory)},
            start_new_session=True,
        )
    until(lambda: path.exists() or child.poll() is not None, 10, f"{name} to record itself", log)
    if not path.exists():
        raise ClusterError(f"{name} did not start:\n{tail(log)}")
    return parse_record(name, path.read_text())


def stop(record: Record, grace: float = 10.0) -> None:
    """End one recorded process: SIGTERM, and SIGKILL after `grace` seconds."""
    try:
        # The descriptor names the process itself: the checked process gets the signal.
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            if not alive(record):
                return
            try:
                signal.pidfd_send_signal(handle, number)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + patience
            while alive(record) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
    finally:
        os.close(handle)
    if alive(record):
        raise ClusterError(f"{record.name} (pid {record.pid}) is still there 10 s after SIGKILL")


def until(
    condition: Condition,
    seconds: float,
    what: str,
    log: Path,
    needs: Sequence[Record] = (),
    logs: Callable[[str], Path] | None = None,
) -> None:
    """Wait for a condition; give up when it takes too long or a process in `needs` has died.

    Raises ClusterError with the last lines of the log that shows the reason.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        for record in needs:
            if not alive(record):
                where = logs(record.name) if logs else log
                raise ClusterError(
                    f"{record.name} died while waiting for {what}; last lines of {where}:\n{tail(where)}"
                )
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s for {what}; last lines of {log}:\n{tail(log)}")
        time.sleep(_POLL_SECONDS)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file, or a note that there is none."""
    if not log.exists():
        return f"(no log at {log})"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Add the folders of `ip` and `iptables`, and exclude the cluster from proxies."""
    folders = [base.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    direct = [base.get("NO_PROXY", base.get("no_proxy", "")), LOOPBACK, POD_SUBNET, SERVICE_SUBNET]
    return {**base, "PATH": os.pathsep.join(filter(None, folders)), "NO_PROXY": ",".join(filter(None, direct))}


def run(argv: Sequence[str | Path], *, input_text: str | None = None, seconds: float = 600) -> str:
    """Run a short command to its end and return its standard output.

    Raises ClusterError with the command and its output.
    """
    try:
        # A command that outlives a killed caller would keep changing the machine during `down`.
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "TERM", *argv],
            input=input_text,
            stdin=None if input_text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(map(str, argv))}: not done after {seconds:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-4000:]
        raise ClusterError(f"{' '.join(map(str, argv))}: exit status {done.returncode}\n{said}")
    return done.stdout
