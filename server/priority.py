"""Work that may take its time: threads and processes that leave the processor to the engine."""

from __future__ import annotations

import os
import threading


def step_back(niceness: int = 5) -> None:
    """Lower the calling thread's priority (on Linux, where threads have their own); a process's, from its main thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
