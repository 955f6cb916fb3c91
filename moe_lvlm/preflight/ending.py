"""How a process of a check says what is wrong and ends, whatever it hangs in. Imports nothing heavy."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

from moe_lvlm.preflight.host import node_name

FAILED = 3  # exit status: the fabric failed, or a node is bad


def complain(sentence: str) -> None:
    """To stderr, in one write, as ranks share it."""
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"preflight: rank {rank} on {node_name()}: {sentence}\n")
    sys.stderr.flush()


def end_after(seconds: float) -> None:
    """End this process with status 3 after so many seconds; 10 s later, where Python itself does not get to run (a
    library loaded from a dead file system), with all stacks and status 1.
    """

    def end() -> None:
        complain(f"no end within {seconds:g} s")
        os._exit(FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 10.0, exit=True)
