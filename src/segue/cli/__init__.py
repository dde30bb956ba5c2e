"""The command line: one module a command; nothing else in Segue prints.

Exit codes: 0 done or already current; 1 failed, the guest runs on the incumbent; 2 usage; 3 not
running; 4 no such machine; 5 refused, nothing touched; 6 timed out, the guest runs on the
incumbent; 7 some of several machines failed; 8 the guest is lost, or nobody can tell; 130
interrupted. `segue run` ends as its QEMU does.

Importing this is kept cheap on purpose (no asyncio): it is paid for at every `segue ls`. Code that
takes a supervisor's place has no use for the parser, and somebody waits for its answer meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from segue.cli import output
from segue.errors import SegueError

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line; returns the exit status. A mistake ends in what and hint."""
    output.prepare_streams()
    try:
        if "SEGUE_CPR" in os.environ:
            from segue import reexec

            return reexec.main()
        from segue.cli import parser

        arguments = parser.parse(sys.argv[1:] if argv is None else argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except SegueError as error:
        output.fail(error)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        output.fail(_from_system(error))
        return 1
    except Exception as error:
        if os.environ.get("SEGUE_TRACEBACK"):
            raise
        output.fail(
            SegueError(
                f"a mistake in Segue itself: {type(error).__name__}: {error}",
                hint="SEGUE_TRACEBACK=1 shows where; please report it",
            )
        )
        return 1
    return status


def _from_system(error: OSError) -> SegueError:
    what = error.strerror or str(error)
    if error.filename is not None:
        what = f"{os.fsdecode(error.filename)}: {what}"
    hint = None
    if isinstance(error, PermissionError):
        hint = "machines belong to the user who started them; try as that user"
    return SegueError(what, hint=hint)
