"""A small daemon that is replaced in place; the tests talk to it over a socket that it keeps.

    {"restart": {"argv", "env", "asked", "back", "timeout"}}   answered only if it fails
    {"facts": null}                                            what a restart must not change
    {"wait": null}                                             the exit status of its child

FAULT in the environment makes newer code fail, at `asked`, at `arrived`, or at both.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Self

from segue.cpr import CprError, Descriptor, State, restart, resumed, section


@section("daemon", version=1)
@dataclass(frozen=True)
class Daemon:
    control: Descriptor
    child: int
    child_pidfd: Descriptor
    generation: int

    def post_load(self, version: int) -> Self:
        if fault("hook"):
            raise ValueError("the hook does not like it")
        return replace(self, generation=self.generation + 1)


# resumed() takes it out of the environment.
STAGE = "asked" if os.environ.get("SEGUE_CPR", "").startswith("ask ") else "arrived"


def fault(name: str) -> bool:
    wanted = os.environ.get("FAULT", "")
    return wanted in (f"{name} {STAGE}", f"{name} both")


def main() -> None:
    how = reason = None
    with resumed() as arrival:
        if fault("die"):
            os._exit(3)
        if fault("odd"):
            raise RuntimeError("\0 \ud800 " + "x" * 200_000)
        if fault("hang"):
            time.sleep(3600)
        if fault("import"):
            import no_such_module  # type: ignore[import-not-found]  # noqa: F401
        if fault("exit"):
            sys.exit(3)
        if arrival is None:
            child = subprocess.Popen(["sleep", "600"])
            daemon = Daemon(
                Descriptor.of("control", int(sys.argv[1])),
                child.pid,
                Descriptor.of("child", os.pidfd_open(child.pid)),
                0,
            )
            child.returncode = 0  # the daemon waits for it by its pid
        elif fault("unloaded"):
            pass
        else:
            daemon = arrival.load(Daemon).get(Daemon)
            how, reason = arrival.how.value, arrival.reason
            if fault("late"):
                raise RuntimeError("not ready after all")
            if fault("stuck"):
                time.sleep(3600)
        if fault("hangup"):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGHUP, lambda *_: hangups.append(1))
    with socket.socket(fileno=os.dup(daemon.control.fd)) as control, control.makefile() as lines:
        if arrival is not None:
            answer(control, resumed=how, reason=reason, generation=daemon.generation)
        while line := lines.readline():
            answer(control, **obey(daemon, json.loads(line)))


hangups: list[int] = []


def obey(daemon: Daemon, command: dict[str, Any]) -> dict[str, Any]:
    if "restart" in command:
        order = command["restart"]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if order.pop("full", False):
            resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), limit[1]))
        try:
            restart(State(daemon), **order)
        except CprError as error:
            return {"error": type(error).__name__, "what": str(error)}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    if "wait" in command:
        os.kill(daemon.child, signal.SIGTERM)
        return {"status": os.waitpid(daemon.child, 0)[1]}
    return facts(daemon)


def facts(daemon: Daemon) -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = [
                os.readlink(f"/proc/self/fd/{name}"),
                os.get_inheritable(int(name)),
            ]
        except OSError:
            pass
    with open("/proc/self/status") as status:
        lines = dict(line.rstrip("\n").split(":\t", 1) for line in status)
    return {
        "pid": os.getpid(),
        "child": daemon.child,
        "generation": daemon.generation,
        "hangups": len(hangups),
        "argv": sys.argv,
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "kept": {
            "umask": umask,
            "cwd": os.getcwd(),
            "limits": [resource.getrlimit(n) for n in range(16)],
            "nice": os.nice(0),
            "affinity": sorted(os.sched_getaffinity(0)),
            "session": os.getsid(0),
            "group": os.getpgrp(),
            "blocked": lines["SigBlk"],
            "ignored": lines["SigIgn"],
            "caught": lines["SigCgt"],
            "parent": os.getppid(),
        },
    }


def answer(control: socket.socket, **message: Any) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
