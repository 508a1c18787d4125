"""Runs `vidjoint.main` in several processes: python tests/forked.py FILE, with one process per line: {"argv": [...], "devices": N, "log": PATH}.

All of them are forked from this one after the imports, which take longer than a tiny run. Prints process ids at the start and statuses at the end.
"""

import json
import os
import signal
import sys

from vidjoint.main import main


def child(argv: list[str], devices: int, log: str) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    status = 1
    try:
        status = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    children = []
    with open(sys.argv[1], encoding="utf-8") as file:
        for line in file:
            pid = os.fork()
            if pid == 0:
                child(**json.loads(line))
            children.append(pid)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in children])
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
