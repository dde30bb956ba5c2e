"""Import this before asyncio in a process that is to stay small: it keeps TLS out.

asyncio imports `ssl` where there is one, and with it comes OpenSSL: 4 MiB that a supervisor would
hold for as long as its machine runs, and never use. asyncio does without it as well. Where asyncio
is there already this does nothing.
"""

from __future__ import annotations

import sys

if "asyncio" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]
