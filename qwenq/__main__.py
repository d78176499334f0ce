"""The `qwenq` command and `python -m qwenq`: quick to begin, and quiet when it is interrupted while it begins."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any


def end_at_once(*signalled: Any) -> None:
    """Handler of an interrupt where nothing is under way: no traceback of an import that was cut off."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def main() -> None:
    """Console entry: run the command line."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    if interruptible:
        signal.signal(signal.SIGINT, end_at_once)
    gc.disable()  # until a command's modules are there: what they define stays, and looking through it costs a plan
    from qwenq.cli.main import main as run

    try:
        run()
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, end_at_once)


if __name__ == "__main__":
    main()
