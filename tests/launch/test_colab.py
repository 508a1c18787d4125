"""The notebook runs from top to bottom: its cells but the installation, with the demo cut to two steps of a small model."""

import importlib
import json
import re
import shlex
import subprocess

import pytest

from tests.launch.stand_ins import LAUNCH, ROOT

pytest.importorskip("flatbuffers", reason="vidjoint.export needs it: pip install flatbuffers")
NOTEBOOK = json.loads((LAUNCH / "colab.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORT = "--config.optim.warmup_steps=0 --config.batch_size=8 --config.model.width=16 --config.model.depth=1 --config.model.mlp_dim=16"


def tagged(tag: str) -> list[str]:
    return ["".join(cell["source"]) for cell in CODE if tag in cell["metadata"].get("tags", ())]


def as_python(source: str) -> str:
    """A cell as Python: `!command {name}`, which IPython gives to a shell, becomes shell(f"..."); the names of IPython.display are given."""
    source = source.replace("from IPython.display import Image, display\n", "")
    return re.sub(r"^(\s*)!(.+)$", lambda match: f"{match[1]}shell(f{match[2]!r})", source, flags=re.M)


def shell(command: str) -> None:
    """Runs a command of this package here, with what is compiled already; anything else as a shell would."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        status = importlib.import_module(words[2]).main(words[3:])
    else:
        status = subprocess.run(command, shell=True).returncode
    assert status == 0, command


@pytest.mark.timeout(300)
def test_runs_from_top_to_bottom(tmp_path, monkeypatch, full):
    if not full:
        pytest.skip("takes a minute: pytest --full")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shown = []
    (parameters,) = tagged("parameters")
    names = {"shell": shell, "Image": str, "display": shown.append}
    for cell in CODE:
        source = "".join(cell["source"])
        if source not in tagged("install"):
            exec(compile(as_python(source.replace("STEPS = 1300", "STEPS = 2").replace("--config.eval_every=0", SHORT)), "cell", "exec"), names)
    assert "STEPS = 1300" in parameters and names["STEPS"] == 2
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in shown) and len(shown) == 3
    assert (tmp_path / "exported.zip").exists() and (tmp_path / "exported" / "run.py").exists()


def test_every_cell_is_python():
    for cell in CODE:
        compile(re.sub(r"^%.*$", "", as_python("".join(cell["source"])), flags=re.M), "cell", "exec")


def test_it_is_clean():
    """No outputs, and the installation installs what the README does."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CODE) and NOTEBOOK["nbformat"] == 4
    (install,) = tagged("install")
    assert "-r requirements.lock" in install and "--no-deps -e ." in install
