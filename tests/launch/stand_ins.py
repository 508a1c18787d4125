"""Commands that the scripts of launch/ call, replaced by ones that record how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECORD = (
    f"#!{sys.executable} -IS"
    + """
import json, os, sys
record = {"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]]}
if "-" in sys.argv or "--filename=-" in sys.argv:
    record["input"] = sys.stdin.buffer.read().decode("latin-1")
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(record) + "\\n")
"""
)


class StandIns:
    """A folder of commands; the environment of `call` finds them before any others."""

    def __init__(self, folder: Path, *names: str):
        self.folder, self.record = folder, folder / "calls.jsonl"
        for name in names:
            self.add(name)

    def add(self, name: str, code: str = "") -> None:
        """A command that is recorded and then runs a few lines of Python (`record` is its call); its exit status is theirs."""
        file = self.folder / name
        file.write_text(RECORD + code)
        file.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "CALLS": str(self.record)} | more

    def call(self, script: str, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/ in the folder."""
        command = [LAUNCH / script, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(**environment), cwd=self.folder, timeout=timeout, stdin=subprocess.DEVNULL
        )

    @property
    def calls(self) -> list[list[str]]:
        """The recorded calls: name and arguments."""
        return [record["argv"] for record in self.records]

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []
