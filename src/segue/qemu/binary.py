"""What a QEMU binary is and can do, found by starting it and asking.

Nothing is concluded from a path or a file's contents alone: what the user names may be a script
that executes QEMU, or QEMU behind a dynamic loader of its own. It is started with no machine, and
what its monitor answers counts.

Not asked, on purpose:
- `query-qmp-schema`: its reply stays in the supervisor's memory (2.5-4.3 MiB).
- `qom-list-types`: it loads every module that it finds, and where those of another release lie in
  QEMU's compiled-in folder, QEMU 10.0 and 11.1 abort (`module_load_dso: Assertion failed`). The
  few device types that matter are asked for by name: see `missing_devices`.

The cache, format 1: `DIR/BUILD_ID.json`, DIR being $XDG_CACHE_HOME/segue/probe, or else
/var/cache/segue/probe for root and ~/.cache/segue/probe for others; one object,

    {"format": 1, "version": "10.0.2 (Debian ...)", "target": "x86_64", "deferred_irqfd": true,
     "machines": [{a MachineType}, ...], "capabilities": [...], "commands": [...],
     "cpu_models": [...], "displays": [...]}

A file of another format, of another version, or damaged is as good as none, and a cache that
cannot be written is no error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from segue.errors import CommandFailed, MonitorClosed, Refused, advice
from segue.qemu.mapped import MainObject, main_object
from segue.qemu.monitor import Monitor

_FORMAT = 1
_NO_MACHINE = ("-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S")
_LISTING = re.compile(r"^[a-z][a-z0-9-]*$", re.MULTILINE)
_CHUNK = 256 << 10


@dataclass(frozen=True)
class MachineType:
    """One entry of query-machines. `default_ram_id` is None where RAM cannot be a backend."""

    name: str
    alias: str | None
    is_default: bool
    deprecated: bool
    default_ram_id: str | None
    default_cpu: str | None
    cpu_max: int
    numa: bool
    hotpluggable_cpus: bool

    @classmethod
    def from_qmp(cls, answer: Mapping[str, Any]) -> MachineType:
        return cls(
            name=answer["name"],
            alias=answer.get("alias"),
            is_default=answer.get("is-default", False),
            deprecated=answer.get("deprecated", False),
            default_ram_id=answer.get("default-ram-id"),
            default_cpu=answer.get("default-cpu-type"),
            cpu_max=answer["cpu-max"],
            numa=answer.get("numa-mem-supported", False),
            hotpluggable_cpus=answer["hotpluggable-cpus"],
        )


@dataclass(frozen=True)
class Binary:
    """A QEMU that answered.

    `path` is absolute, with symbolic links as the user gave them: they are what a package manager
    switches. `build_id` is the GNU build id of QEMU itself, behind wrappers and loaders; the
    file's SHA-256 if it has none. `deferred_irqfd`: virtio-blk in an iothread may lose an
    interrupt when the guest is stopped (the notification is queued and then goes nowhere).
    """

    path: Path
    version: tuple[int, int, int]
    version_text: str
    target: str
    build_id: str
    machines: Mapping[str, MachineType]
    capabilities: frozenset[str]
    commands: frozenset[str]
    cpu_models: frozenset[str]
    displays: frozenset[str]
    deferred_irqfd: bool

    @cached_property
    def plain(self) -> dict[str, Any]:
        """As JSON knows it. Made once: it is asked for at whatever happens (keeper.py)."""
        plain = asdict(self)
        plain["path"], plain["version"] = str(self.path), list(self.version)
        plain["machines"] = dict(plain["machines"])
        for name in ("capabilities", "commands", "cpu_models", "displays"):
            plain[name] = sorted(plain[name])
        return plain

    def machine(self, name: str | None) -> MachineType | None:
        """By name or alias, the default one for None; None if this QEMU knows no such type."""
        if name is None:
            return next((m for m in self.machines.values() if m.is_default), None)
        if name in self.machines:
            return self.machines[name]
        return next((m for m in self.machines.values() if m.alias == name), None)

    def default_machine(self) -> MachineType | None:
        return self.machine(None)

    @property
    def has_ignore_shared(self) -> bool:
        """Device state can be moved without RAM (QEMU 4.0)."""
        return "x-ignore-shared" in self.capabilities

    @property
    def has_pause_before_switchover(self) -> bool:
        return "pause-before-switchover" in self.capabilities

    @property
    def has_late_block_activate(self) -> bool:
        return "late-block-activate" in self.capabilities

    @property
    def has_display_update(self) -> bool:
        """VNC's address can be changed while the machine runs (QEMU 7.1)."""
        return "display-update" in self.commands


def find(name: str | Path) -> Path:
    """The absolute path of a program that was named as in a shell; Refused if there is none."""
    text = os.fspath(name)
    if "/" not in text:
        found = _in_path(text)
        if found is None:
            raise Refused(
                f"there is no {text} in PATH", hint="install QEMU, or give the binary's path"
            )
        text = found
    path = Path(os.path.abspath(text))
    try:
        path.stat()
    except PermissionError:
        raise Refused(
            f"{path} cannot be reached: you may not look into a folder on the way there",
            hint="give the path of a QEMU that its user may execute",
        ) from None
    except OSError:
        raise Refused(
            f"{path} does not exist", hint="give the path of a QEMU system emulator"
        ) from None
    if not path.is_file():
        raise Refused(f"{path} is not a file", hint="give the path of a QEMU system emulator")
    if not os.access(path, os.X_OK):
        raise Refused(f"{path} is not executable", hint="give the path of a QEMU system emulator")
    return path


def _in_path(name: str) -> str | None:
    """As shutil.which; that module and tempfile would cost each supervisor 0.7 MiB."""
    for folder in os.get_exec_path():
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


async def probe(path: str | Path, *, limit: float = 10, cache_dir: Path | None = None) -> Binary:
    """Start the binary, ask it, and end it; all within `limit` seconds.

    Refused if there is none, or if it does not answer as a QEMU does, with its first words.
    """
    path = find(path)
    cache = _Cache(cache_dir or _cache_directory())
    async with _answering(path, limit) as (monitor, main):
        qemu = monitor.greeting["QMP"]["version"]
        version = (qemu["qemu"]["major"], qemu["qemu"]["minor"], qemu["qemu"]["micro"])
        package = str(qemu.get("package", "")).strip()
        text = ".".join(map(str, version)) + (f" ({package})" if package else "")
        facts = cache.load(main.build_id, text)
        if facts is None:
            facts = await _ask(monitor, path, main, version)
            cache.store(main.build_id, {"format": _FORMAT, "version": text, **facts})
    return Binary(
        path=path,
        version=version,
        version_text=text,
        target=facts["target"],
        build_id=main.build_id,
        machines={m["name"]: MachineType(**m) for m in facts["machines"]},
        capabilities=frozenset(facts["capabilities"]),
        commands=frozenset(facts["commands"]),
        cpu_models=frozenset(facts["cpu_models"]),
        displays=frozenset(facts["displays"]),
        deferred_irqfd=facts["deferred_irqfd"],
    )


async def missing_devices(path: Path, types: Collection[str], *, limit: float = 10) -> list[str]:
    """Those of `types` (QOM types, not -device's aliases) that the binary cannot make.

    Asked anew each time: which types there are hangs on the modules installed, not on the build.
    """
    async with _answering(path, limit) as (monitor, _):
        return [name for name in sorted(set(types)) if not await _knows(monitor, name)]


async def _knows(monitor: Monitor, name: str) -> bool:
    try:
        await monitor.execute("device-list-properties", {"typename": name})
    except CommandFailed as error:
        # Other errors speak of a type that is there (an abstract one, say).
        return error.error_class != "DeviceNotFound"
    return True


async def _ask(
    monitor: Monitor, path: Path, main: MainObject, version: tuple[int, int, int]
) -> dict[str, Any]:
    """What the cache holds. Plain sorted lists, as they go to JSON."""
    target = (await monitor.execute("query-target"))["arch"]
    found = await _find_in(
        main.path, (b"query-machines\0", b"virtio_notify_irqfd\0", b"virtio_notify_irqfd_deferred_")
    )
    if b"query-machines\0" not in found:
        raise Refused(
            f"{path} does not become QEMU: {main.path} still runs, with QEMU as its child",
            hint="let the script end with: exec qemu-system-...",
        )
    machines = await monitor.execute("query-machines")
    capabilities = await monitor.execute("query-migrate-capabilities")
    commands = await monitor.execute("query-commands")
    try:
        models = await monitor.execute("query-cpu-definitions")
    except CommandFailed:  # some targets have none
        models = []
    # The deferral has a trace point, whose name stands in the program. Where there are no trace
    # points at all, the release that brought it (8.2) decides.
    deferred = b"virtio_notify_irqfd_deferred_" in found or (
        b"virtio_notify_irqfd\0" not in found and version >= (8, 2, 0)
    )
    return {
        "target": target,
        "machines": [asdict(MachineType.from_qmp(m)) for m in machines if m["name"] != "none"],
        "capabilities": sorted(c["capability"] for c in capabilities),
        "commands": sorted(c["name"] for c in commands),
        "cpu_models": sorted(m["name"] for m in models),
        "displays": await _displays(path),
        "deferred_irqfd": deferred,
    }


async def _displays(path: Path) -> list[str]:
    """QMP does not tell them; `-display help` prints one a line."""
    async with _running(path, ["-display", "help"], stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        text = b""
        # It may come in pieces, and what is no QEMU may never end.
        while len(text) < 65536 and (piece := await process.stdout.read(65536)):
            text += piece
    return sorted(set(_LISTING.findall(text.decode(errors="replace"))))


async def _find_in(path: str, wanted: tuple[bytes, ...]) -> set[bytes]:
    """Those of `wanted` that stand in a file. In chunks: 30 MB would hold up the event loop."""
    found: set[bytes] = set()
    overlap = max(map(len, wanted))
    with open(path, "rb") as file:  # noqa: ASYNC230
        rest = b""
        while chunk := file.read(_CHUNK):
            data = rest + chunk
            found.update(text for text in wanted if text in data)
            rest = data[-overlap:]
            await asyncio.sleep(0)
    return found


@contextlib.asynccontextmanager
async def _answering(path: Path, limit: float) -> AsyncIterator[tuple[Monitor, MainObject]]:
    """A QEMU without a machine whose monitor has answered; it is gone when the block is left."""
    words = _LastWords()
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        words.close()
        raise Refused(f"{path} cannot be run: {error.strerror}", advice(error)) from None
    hint = f"what is there must behave as qemu-system-* does; try: {path} --version"
    try:
        with ours, theirs, words:
            fd = theirs.fileno()
            chardev = ["-chardev", f"socket,id=probe,fd={fd}", "-qmp", "chardev:probe"]
            async with (
                asyncio.timeout(limit),
                _running(path, [*_NO_MACHINE, *chardev], fds=(fd,), stderr=words.fd) as process,
            ):
                theirs.close()
                monitor = await Monitor.connect(ours, limit)
                try:
                    main = main_object(process.pid)
                    if main is None:
                        raise Refused(f"{path} answers, but runs no program that can be read")
                    yield monitor, main
                finally:
                    monitor.close()
    except TimeoutError:
        said = words.first_line()
        raise Refused(
            f"{path} did not answer within {limit:g} s" + (f": {said}" if said else ""), hint
        ) from None
    except (MonitorClosed, KeyError, TypeError) as error:
        # A KeyError or a TypeError: it speaks JSON, and is no QEMU.
        said = words.first_line()
        raise Refused(f"{path} is no usable QEMU: {said or 'it ended without a word'}", hint) from (
            None if isinstance(error, MonitorClosed) else error
        )
    except CommandFailed as error:
        raise Refused(f"{path} is no usable QEMU: {error.what}", hint) from None
    except OSError as error:
        raise Refused(f"{path} cannot be run: {error.strerror}", advice(error) or hint) from None


class _LastWords:
    """A pipe for a process's stderr, read once, without waiting, when the process is dead."""

    def __init__(self) -> None:
        self._read, self.fd = os.pipe()
        os.set_blocking(self._read, False)
        self._text = b""

    def __enter__(self) -> _LastWords:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._text = os.read(self._read, 4096)
        os.close(self._read)
        os.close(self.fd)

    def first_line(self) -> str:
        text = self._text.decode(errors="replace").strip()
        return text.partition("\n")[0].strip()[:300]


@contextlib.asynccontextmanager
async def _running(
    path: Path,
    arguments: list[str],
    *,
    fds: tuple[int, ...] = (),
    stdout: int = asyncio.subprocess.DEVNULL,
    stderr: int = asyncio.subprocess.DEVNULL,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process, killed with all that it started, and reaped, when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *ends_with_us(),
        path,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=fds,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The group, even if the process itself has ended: a script may have left others.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def ends_with_us() -> list[str]:
    """What to put before a command that is to end when this process is killed.

    QEMU does not end when its monitor's other side does: hence setpriv (util-linux) where there is
    one. Its parent may have been killed before it asks to be told, so the parent is looked at
    after. A `preexec_fn` could do the same, but runs Python between fork and exec.
    """
    setpriv = _in_path("setpriv")
    if setpriv is None:
        return []
    check = '[ "$PPID" = "$0" ] && exec "$@"'
    told = [setpriv, "--pdeathsig", "KILL"]
    # In the end setpriv again: of a program that cannot be run it says why, a shell "not found".
    return [*told, "sh", "-c", check, str(os.getpid()), *told]


def _cache_directory() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "segue/probe"
    if os.geteuid() == 0:
        return Path("/var/cache/segue/probe")
    return Path.home() / ".cache/segue/probe"


class _Cache:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, build_id: str, version: str) -> dict[str, Any] | None:
        try:
            facts = json.loads((self._directory / f"{build_id}.json").read_bytes())
            if facts["format"] != _FORMAT or facts["version"] != version:
                return None
            # What is damaged in a way that is still JSON shows here.
            [MachineType(**m) for m in facts["machines"]]
            lists = [facts[k] for k in ("capabilities", "commands", "cpu_models", "displays")]
            if not all(isinstance(text, str) for values in lists for text in values):
                return None
            if not isinstance(facts["deferred_irqfd"], bool) or not facts["target"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        loaded: dict[str, Any] = facts
        return loaded

    def store(self, build_id: str, facts: dict[str, Any]) -> None:
        """At once or not at all: a reader never sees half a file."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch = self._directory / f".{build_id}.{os.getpid()}"
            try:
                scratch.write_text(json.dumps(facts))
                scratch.replace(self._directory / f"{build_id}.json")
            except OSError:
                scratch.unlink(missing_ok=True)
                raise
