"""Runs `vidjoint.main` in several processes. Reads lines [{"argv": [...], "devices": N, "log": PATH}, ...], answers each by ids, then statuses.

Besides, "environment" may hold more variables, and "hidden" names of modules that cannot be imported (those of JAX that have no public name).
All of them are forked from this one after the imports, which take longer than a tiny run.
"""

import json
import os
import sys

from vidjoint.main import main


def child(argv: list[str], devices: int, log: str, environment: dict[str, str] | None = None, hidden: list[str] = ()) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ.update(environment or {})
    sys.modules.update(dict.fromkeys(hidden))
    status = 1
    try:
        status = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            children.append(os.fork())
            if children[-1] == 0:
                child(**job)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
