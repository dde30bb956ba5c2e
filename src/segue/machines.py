"""Run directories: what a machine is to everyone but its supervisor.

    RUN_ROOT/NAME/          mode 0700; /run/segue for root, else $XDG_RUNTIME_DIR/segue
        lock                flock'ed by the supervisor for its whole life; holds "PID START\\n"
        machine.json        what a supervisor needs that takes the machine up (keeper.py)
        clients             of the QMP server (keeper.py)
        status.json         what `segue-query` answers, as of the last change (atomic rename)
        qmp.sock            the supervisor's QMP server
        qmp.log             who connected to it (and qmp.log.1)
        console.sock        the first serial console, if the machine has one
        journal             of the upgrade under way
        receipts.jsonl      one receipt a line, oldest first
        qemu.log            what the instances wrote to stderr

START is field 22 of /proc/PID/stat (clock ticks since boot), so that a process id which was given
to another process in the meantime is not mistaken for the supervisor. Readers look at it and not
at the flock: a reader that takes the lock, if only for a moment, makes a `segue run` of the same
name fail.

`segue ls` imports this and not much else; that is why nothing here needs asyncio.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.errors import NoSuchMachine, NotRunning, Refused, SegueError, UsageError, advice

NAME_LIMIT = 64
# sun_path holds 108 bytes, of which QEMU and Python want one for the final NUL.
SOCKET_PATH_LIMIT = 107
# What the supervisor may name a socket of its own in a run directory, at most.
SOCKET_NAME_LIMIT = 20

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def run_root() -> Path:
    """Where this user's machines are. It need not exist yet.

    Raises UsageError where the system has given the user no such place.
    """
    if chosen := os.environ.get("SEGUE_RUN_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/run/segue")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "segue"
    raise UsageError(
        "there is no directory for run-time files: XDG_RUNTIME_DIR is not set",
        hint="log in through systemd-logind, or set SEGUE_RUN_DIR to a directory of your own",
    )


def check_name(name: str) -> str:
    """Return `name`, or raise UsageError for one that cannot name a machine."""
    if not _NAME.fullmatch(name) or len(name) > NAME_LIMIT:
        raise UsageError(
            f"{name!r} cannot be a machine's name",
            hint=f"at most {NAME_LIMIT} of the characters A-Z a-z 0-9 _ . -, "
            "the first neither '.' nor '-'",
        )
    return name


def default_name(argv: Sequence[str]) -> str:
    """The guest's name from QEMU's own -name, made fit; else `qemu-PID`, not yet in use."""
    guest = ""
    for option, value in itertools.pairwise(argv):
        if option in ("-name", "--name"):
            guest = _guest_name(value) or guest
    fit = re.sub(r"[^A-Za-z0-9_.-]+", "-", guest).lstrip(".-")[:NAME_LIMIT]
    if fit:
        return fit
    name, number = f"qemu-{os.getpid()}", 1
    while (run_root() / name).exists():
        number += 1
        name = f"qemu-{os.getpid()}-{number}"
    return name


def _guest_name(value: str) -> str:
    # `-name NAME,key=...` and `-name guest=NAME`; a comma inside a value is doubled.
    for position, part in enumerate(re.split(r"(?<!,),(?!,)", value)):
        key, equals, rest = part.partition("=")
        if not equals and position == 0:
            return part.replace(",,", ",")
        if key == "guest":
            return rest.replace(",,", ",")
    return ""


def process_start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, in clock ticks since boot; None for a dead process.

    A zombie counts as dead: it runs no code and owns no descriptor any more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(pid: object, start_time: object) -> bool:
    """Whether the process that had `pid` when it was recorded with `start_time` still lives."""
    return isinstance(pid, int) and pid > 0 and process_start_time(pid) == start_time


def _whose() -> bytes:
    """What an owner writes into `lock`."""
    return b"%d %d\n" % (os.getpid(), process_start_time(os.getpid()) or 0)


@dataclass
class MachineDirectory:
    """One machine's run directory. Only one that came from create() owns the machine."""

    path: Path
    _lock: int | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def qmp(self) -> Path:
        return self.path / "qmp.sock"

    @property
    def console(self) -> Path:
        return self.path / "console.sock"

    @property
    def machine(self) -> Path:
        return self.path / "machine.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def receipts(self) -> Path:
        return self.path / "receipts.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "qemu.log"

    @property
    def lock_descriptor(self) -> int | None:
        """The flock'ed descriptor of an owner (close-on-exec)."""
        return self._lock

    @classmethod
    def take_over(cls, name: str) -> MachineDirectory:
        """Own a machine whose supervisor has died; all that it left stays.

        Raises NoSuchMachine, Refused where it has a supervisor.
        """
        machine = find_any(name)
        if machine.running:
            raise Refused(
                f"machine {name} has a supervisor (pid {machine.supervisor_pid})",
                hint="there is nothing to recover",
                guest=machine.state,
            )
        directory = cls(run_root() / name)
        directory._acquire(clear=False)
        return directory

    @classmethod
    def create(cls, name: str) -> MachineDirectory:
        """Make the directory, take its lock, and say in it that this process owns the machine.

        What a dead supervisor left behind is cleared away. Raises UsageError for a bad name,
        Refused for one that is in use, SegueError where the system does not let us.
        """
        directory = cls(run_root() / check_name(name))
        longest = len(os.fsencode(directory.path)) + 1 + SOCKET_NAME_LIMIT
        if longest > SOCKET_PATH_LIMIT:
            raise UsageError(
                f"the path {directory.path} is too long by {longest - SOCKET_PATH_LIMIT} bytes "
                "to hold Unix sockets",
                hint="choose a shorter --name, or set SEGUE_RUN_DIR to a shorter directory",
            )
        try:
            directory._acquire()
        except OSError as error:
            raise SegueError(
                f"cannot use {directory.path}: {error.strerror}",
                hint="set SEGUE_RUN_DIR to a directory of your own",
            ) from error
        return directory

    @classmethod
    def owned(cls, name: str, lock: int) -> MachineDirectory:
        """That of a machine whose lock this process has already, from before it executed itself."""
        return cls(run_root() / name, lock)

    def _acquire(self, clear: bool = True) -> None:
        while self._lock is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self.path.mkdir(mode=0o700, exist_ok=True)
                found = self.path.lstat()
                lock = os.open(
                    self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
            except FileNotFoundError:
                continue  # whoever had the name has just removed it
            try:
                if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                    raise Refused(
                        f"{self.path} is not only yours",
                        hint="whoever can write there owns the guest; remove it or chmod it 0700",
                    )
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and flock the last owner may have removed what we have opened.
                if os.fstat(lock).st_nlink:
                    if clear:
                        self._clear_leftovers()
                        self._say_whose(lock)
                    else:
                        with contextlib.suppress(OSError):  # a full disk
                            os.ftruncate(lock, os.pwrite(lock, _whose(), 0))
                    self._lock, lock = lock, -1
            except BlockingIOError:
                pid = self.owner()[0]
                raise Refused(
                    f"a machine named {self.name} is already running (supervisor pid {pid})",
                    hint=f"choose another --name, or end it with: segue stop {self.name}",
                ) from None
            finally:
                if lock >= 0:
                    os.close(lock)

    def _say_whose(self, lock: int) -> None:
        try:
            os.ftruncate(lock, 0)
            os.write(lock, _whose())
        except OSError:  # the file system is full
            self.lock.unlink()
            self.path.rmdir()
            raise

    def _clear_leftovers(self) -> None:
        pid = self.left_running()
        if pid is not None:
            raise Refused(
                f"the QEMU of machine {self.name} (pid {pid}) still runs, "
                "though its supervisor has died",
                hint=f"take it up again with: segue recover {self.name}",
            )
        self._clear()

    def left_running(self) -> int | None:
        """The pid of a QEMU of this machine that lives, whoever of the last upgrade's it is."""
        left = self.read_status()
        known = [(left.get("qemu_pid"), left.get("qemu_start_time"))]
        try:
            journal = json.loads(self.journal.read_bytes())
            known += [
                (each["pid"], each["start_time"])
                for each in (journal["incumbent"], journal["successor"])
                if each
            ]
        except (OSError, ValueError, LookupError, TypeError):
            pass
        for pid, start_time in known:
            if isinstance(pid, int) and is_alive(pid, start_time):
                return pid
        return None

    def owner(self) -> tuple[int | None, int | None]:
        """(pid, start time) of the supervisor, as it wrote them."""
        status = self.read_status()
        if "supervisor_pid" in status:
            return status["supervisor_pid"], status.get("supervisor_start_time")
        try:
            pid, start_time = self.lock.read_text().split()
            return int(pid), int(start_time)
        except (OSError, ValueError):
            return None, None

    def write_status(self, status: Mapping[str, Any]) -> bool:
        """Replace status.json as a whole; False where the disk is full or the directory gone.

        On a full disk it is overwritten in place if it has room for that. Nobody may lose a guest
        because a status could not be written.
        """
        new = self.path / "status.json.new"
        text = json.dumps(status)
        try:
            try:
                new.write_text(text)
                new.replace(self.status)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                new.unlink(missing_ok=True)
                with self.status.open("r+") as file:
                    file.write(text)
                    file.truncate()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EMFILE):
                raise
            return False
        return True

    def read_status(self) -> dict[str, Any]:
        """What was last written; empty where there is nothing (yet)."""
        try:
            status = json.loads(self.status.read_bytes())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def read_receipts(self) -> list[dict[str, Any]]:
        """The receipts, oldest first; a line that a crash cut short is left out."""
        receipts = []
        try:
            lines = self.receipts.read_bytes().splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                receipts.append(json.loads(line))
            except ValueError:
                continue
        return receipts

    def let_go(self) -> None:
        """Own the machine no more; all stays as it is."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the directory with all that is in it, then let go of the name."""
        self._clear()
        self.lock.unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            # Somebody has put a file there meanwhile; that does not keep the name taken.
            if error.errno != errno.ENOTEMPTY:
                raise
        self.let_go()

    def _clear(self) -> None:
        for folder, folders, files in os.walk(self.path, topdown=False):
            for name in files:
                if (folder, name) != (str(self.path), "lock"):
                    Path(folder, name).unlink(missing_ok=True)
            for name in folders:
                inner = Path(folder, name)
                if inner.is_symlink():
                    inner.unlink()
                else:
                    inner.rmdir()


@dataclass(frozen=True)
class MachineStatus:
    """A machine as its run directory shows it.

    `state` is the supervisor's word, but `starting` before it has said any, `orphaned` where
    only its QEMU lives, and `dead` where nothing does. `report` is status.json.
    """

    directory: MachineDirectory
    state: str
    supervisor_pid: int | None
    supervisor_start_time: int | None
    report: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def running(self) -> bool:
        """Whether there is a supervisor to talk to."""
        return self.state not in ("dead", "orphaned")


def status_of(directory: MachineDirectory) -> MachineStatus:
    report = directory.read_status()
    pid, start_time = directory.owner()
    if is_alive(pid, start_time):
        state = str(report.get("state", "starting"))
    elif directory.left_running() is not None:
        state = "orphaned"
    else:
        state = "dead"
    return MachineStatus(directory, state, pid, start_time, report)


def list_machines() -> list[MachineStatus]:
    """Every machine of this user, by name; asks no process anything.

    Those of others are left out, where a run directory is shared.
    """
    root = run_root()
    try:
        names = sorted(entry.name for entry in os.scandir(root) if _is_ours(entry.path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SegueError(f"cannot read {root}: {error.strerror}", advice(error)) from error
    return [status_of(MachineDirectory(root / name)) for name in names if _NAME.fullmatch(name)]


def _is_ours(path: os.PathLike[str] | str) -> bool:
    """Whether it is a directory that we may look into; root may everywhere."""
    return os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)


def find(name: str) -> MachineStatus:
    """The machine of that name, supervised at this moment.

    Raises NoSuchMachine, or NotRunning where only its remains are there.
    """
    machine = find_any(name)
    if machine.running:
        return machine
    if machine.state == "orphaned":
        raise NotRunning(
            f"the supervisor of machine {name} has died",
            hint=f"its guest runs on; take it up again with: segue recover {name}",
            guest="running without a supervisor",
        )
    raise NotRunning(
        f"machine {name} is not running",
        hint=f"start it again: segue run --name {name} -- QEMU ARGS...; "
        f"or forget it: rm -r {machine.directory.path}",
        guest="dead",
    )


def find_any(name: str) -> MachineStatus:
    """The machine of that name, dead or alive. Raises NoSuchMachine."""
    directory = MachineDirectory(run_root() / check_name(name))
    if directory.path.is_dir():
        if not _is_ours(directory.path):
            raise SegueError(
                f"machine {name} is not yours: {directory.path}: Permission denied",
                hint="machines belong to the user who started them; try as that user",
            )
        return status_of(directory)
    from difflib import get_close_matches  # 5 ms that only a typing error has to pay

    names = [machine.name for machine in list_machines()]
    close = get_close_matches(name, names, n=1)
    raise NoSuchMachine(
        f"there is no machine named {name}",
        hint=f"did you mean {close[0]}?" if close else "segue ls shows the machines",
    )


def wait_until_gone(machine: MachineStatus, timeout: float) -> bool:
    """Wait, at most `timeout` seconds, until the machine's supervisor has ended."""
    import select

    # As it was found: a supervisor removes its directory, and lives on for some milliseconds.
    pid = machine.supervisor_pid
    if pid is None:
        return True
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if not is_alive(pid, machine.supervisor_start_time):
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0, round(timeout * 1000))))
    finally:
        os.close(pidfd)
