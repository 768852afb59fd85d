"""Run one command, its output to a log file, and print as JSON what that one process used.

    python launcher.py LOG COMMAND [ARGUMENT...]

On Linux a process's peak memory starts at the peak of the process that started it: a command started from a Python that
holds 800 MB is said to have used 800 MB. This launcher imports nothing large, so that the floor is some 10 MB.
"""

from __future__ import annotations

import json
import os
import sys
import time

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    log, *command = sys.argv[1:]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    actions = [(os.POSIX_SPAWN_DUP2, descriptor, 1), (os.POSIX_SPAWN_DUP2, descriptor, 2)]
    begin = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - begin
    found = {
        "status": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * _MAXRSS_UNIT,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
