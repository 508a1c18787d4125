"""Errors of the user's become lines, and commands end with the status that says how they ended."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidjoint.errors import UserError, command, printable

ROOT = Path(__file__).parents[1]


def raises(error):
    def main(argv):
        raise error

    return command(main)


def test_user_errors_keep_their_lines():
    error = UserError("a is wrong: mend it", "b is missing")
    assert error.lines == ("a is wrong: mend it", "b is missing") and str(error) == "a is wrong: mend it\nb is missing"


def test_user_errors_are_shown_without_a_traceback(capsys):
    assert raises(UserError("a is wrong:", "  in line 3", "b is missing"))([]) == 2
    assert capsys.readouterr() == ("", "error: a is wrong:\n  in line 3\nerror: b is missing\n")


def test_interrupt(capsys):
    assert raises(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_status_and_arguments(monkeypatch, returned, status):
    seen = []

    @command
    def main(argv):
        """What it does."""
        seen.append(argv)
        return returned

    monkeypatch.setattr(sys, "argv", ["program", "--x"])
    assert (main([]), main(["--y"]), main()) == (status,) * 3
    assert seen == [[], ["--y"], ["--x"]] and (main.__name__, main.__doc__) == ("main", "What it does.")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), BrokenPipeError("a worker died"), SystemExit(2)])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught:
        raises(error)([])
    assert caught.value is error


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 100_000])  # fewer and more than a pipe and its buffer hold
def test_a_reader_that_goes_ends_a_command_quietly(flags, lines):
    program = f"""
import sys
from vidjoint.errors import command

@command
def main(argv):
    print("first", flush=True)
    sys.stdin.readline()  # until the reader has gone
    for i in range({lines}):
        print("line", i)

sys.exit(main())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, *flags, "-c", program], cwd=ROOT, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.close()
        assert process.stderr.read() == "" and process.wait(60) == 141


def test_what_may_be_printed():
    assert printable("é 漢字\u3000x\u00a0y.mp4") == "é 漢字\u3000x\u00a0y.mp4"
    assert printable("a\nb\tc\x1b[2J\u202e\udce9\x07") == r"a\nb\tc\x1b[2J\u202e\udce9\x07"
    assert printable("é 漢", io.TextIOWrapper(io.BytesIO(), "ascii")) == r"\xe9 \u6f22"
    assert printable("é 漢", io.TextIOWrapper(io.BytesIO(), "latin-1")) == r"é \u6f22"
