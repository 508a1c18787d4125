"""The documentation: its examples run, its commands have the flags that it says, its links lead somewhere (CONTRIBUTING.md, "Documentation")."""

import contextlib
import functools
import importlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vidjoint import check_data, optim, step, validate
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, override, parse, task_config
from vidjoint.main import main
from vidjoint.models import mixers
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
OWN_CONFIGS = {"my_config.py", "kitchen.py"}  # files that the pages show
OWN_TESTS = {"python.md"}  # tests/test_docs_python.py runs its examples
PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9]*(\.py)?$")  # what a reader fills in


def blocks(page: Path, kind: str) -> list[str]:
    """The blocks of a kind, but for those that are marked as not run."""
    return [match["text"] for match in BLOCK.finditer(page.read_text()) if match["kind"] == kind and not (match["mark"] or "").startswith("not run")]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours: of lines of shell blocks, and of what stands between back-quotes in the text."""
    text = page.read_text()
    lines = [part for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    lines += re.findall(r"`((?:python -m vidjoint\.|launch/)[^`\n]+)`", BLOCK.sub("", text))
    found = []
    for line in lines:
        if match := re.search(r"(?:^|[\s/])(python3? -m vidjoint\.\w+.*|launch/\w+\.(?:sh|py)\b.*)", line):
            if " " in match[1] and not re.search(r"…|\.\.\.|\[|vidjoint\.COMMAND", match[1]):  # forms, not commands
                found.append(shlex.split(match[1], comments=True))
    return found


COMMANDS = [pytest.param(words, id=f"{page.name}: {shlex.join(words)[:90]}") for page in PAGES for words in commands(page)]


def test_the_package_lists_its_commands(capsys):
    """python -m vidjoint; all of them are in the README's table."""
    listed = importlib.import_module("vidjoint.__main__")
    assert listed.main([]) == 0
    assert {line.split(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()[2:]} == set(listed.commands())
    readme = (ROOT / "README.md").read_text()
    assert {"main", "predict", "weights", "findings"} < set(listed.commands())
    assert [name for name in listed.commands() if not re.search(rf"`{name}[ `]|vidjoint\.{name} ", readme)] == []


@functools.cache
def help_of(module: str, verb: str) -> str:
    """What a command says of itself with --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(([verb] if verb else []) + ["--help"])
    return printed.getvalue()


def flags_of(module: str, verb: str) -> set[str]:
    return set(re.findall(r"--\w+", help_of(module, verb)))


@pytest.mark.parametrize("words", [param for param in COMMANDS if "-m" in param.values[0]])
def test_commands_exist(words):
    """The module, its verb, every flag; an experiment with its argument and the keys that are set."""
    module, rest = words[2], words[3:]
    assert importlib.util.find_spec(module), module
    module += ".__main__" if importlib.util.find_spec(module).submodule_search_locations else ""
    verb = rest[0] if module.endswith("__main__") and rest else ""
    flags = flags_of(module, verb)
    assert flags, f"{module} has no --help"
    changes = [word for word in rest if word.startswith("--config.")]
    assert not [word for word in rest if word.startswith("--") and word not in changes and word.partition("=")[0] not in flags]
    experiment = next((word.partition("=")[2] for word in rest if word.startswith("--config=")), "")
    name = Path(experiment.partition(":")[0]).name
    if module not in ("vidjoint.main", "vidjoint.benchmark"):
        assert not experiment or PLACEHOLDER.match(name) or (ROOT / experiment).exists()
    elif experiment and name not in OWN_CONFIGS and not PLACEHOLDER.match(name):
        parse([f"--config={ROOT / experiment}", *changes])
    else:
        config = base_config()
        config.tasks.videos = task_config()
        assert not [line for change in changes for line in override(config, change)]


@pytest.mark.parametrize("words", [param for param in COMMANDS if "-m" not in param.values[0]])
def test_launch_commands_are_understood(words, tmp_path):
    script = ROOT / words[0]
    result = subprocess.run([script, "--dry_run", *words[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0 and result.stdout, result.stderr


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    for path in re.findall(r"`((?:vidjoint|tests|configs|docs|launch)/[\w./*-]+)(?::[\w,+.]+)?`", text):
        assert list(ROOT.glob(path.rstrip("/"))) or path == "vidjoint/models/mixers/difference.py", path


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with what the examples name: runs/demo, a run of the demo that has not learned anything, and clip.mp4."""
    root = tmp_path_factory.mktemp("examples")
    config, _ = parse([f"--config={ROOT / 'configs' / 'demo.py'}"])
    config.model.update(width=16, depth=1, mlp_dim=16)
    labels = {"appearance": tuple("0123456789"), "digits": tuple("0123456789"), "motion": tuple("abcdefgh")}
    folder = root / "runs" / "demo"
    RunFolder(folder).write(config, labels)
    params = jax.jit(build(config.model, {task: len(names) for task, names in labels.items()}).init)(jax.random.key(0))
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(1, {"params": params, "frozen": {}, "ema": {}}, None)
    tiny.write_clip(root / "clip.mp4", 0)
    return root


def given() -> dict:
    """Names that the examples take as given."""
    return {"pixels": np.zeros((2, 8, 32, 32, 3), np.uint8)}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page.name not in OWN_TESTS], ids=lambda page: page.name)
def test_python_runs(page, demo, monkeypatch):
    """The blocks of a page, one after the other; an experiment among them has no unknown key or value."""
    monkeypatch.chdir(demo)
    names = given()
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
        if "def get_config" in block:
            assert not validate.check(names["get_config"]())


SMALL = ["variant=Ti/8", "width=16", "depth=1", "heads=2", "mlp_dim=16", "frames=2", "image_size=16", "dtype=float32"]
SMALL = [f"--config.model.{change}" for change in SMALL]
SMALL += ["--config.data.threads=1", "--config.batch_size=4", "--config.total_epochs=0", "--config.total_steps=2", "--config.optim.warmup_epochs=0"]
SMALL += ["--config.eval.reversed=False"]


def test_adding_a_dataset(tmp_path, monkeypatch):
    """The list and the experiment of the page, with files where it says: looked at, then trained on for two steps and evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDJOINT_CACHE", str(tmp_path / "cache"))
    page = ROOT / "docs" / "adding_a_dataset.md"
    (listed,), (experiment,) = blocks(page, "csv"), blocks(page, "python")
    folder = tmp_path / "kitchen"
    (folder / "clips").mkdir(parents=True)
    clips = [line.split(",")[0] for line in listed.splitlines()]
    for i, clip in enumerate(clips):
        tiny.write_clip(folder / clip, i)
        tiny.write_clip(folder / f"clips/train{i}.mp4", i + 7)
    (folder / "val.csv").write_text(listed)
    (folder / "train.csv").write_text("".join(listed.replace(clip, f"clips/train{i}.mp4").splitlines(True)[i] for i, clip in enumerate(clips)))
    for i, place in enumerate(("train/onion", "train/carrot", "val/onion", "val/carrot")):
        (folder / "ingredients" / place).mkdir(parents=True)
        Image.new("RGB", (40, 30), (50 * i, 90, 20)).save(folder / "ingredients" / place / "1.jpg")
    (tmp_path / "kitchen.py").write_text(experiment)
    assert check_data.main(["kitchen/train.csv"]) == 0
    assert main(["--config=kitchen.py", "--config.data_root=kitchen", "--workdir=runs/kitchen", *SMALL]) == 0
    results = json.loads((tmp_path / "runs/kitchen/results.json").read_text())["tasks"]
    assert {task: result["n"] for task, result in results.items()} == {"cooking": 2, "ingredients": 2}


def test_adding_a_mixer(tmp_path, monkeypatch):
    """The file of the page, put into the table: at first the image model, then two steps on clips and images."""
    (source,) = blocks(ROOT / "docs" / "adding_a_mixer.md", "python")
    names = {}
    exec(compile(source, "difference.py", "exec"), names)
    monkeypatch.setitem(mixers.MIXERS, "difference", names["Difference"])

    config = tiny.config_of(tmp_path)
    config.model.update(mixer="difference", temporal_init="zero")
    model = build(config.model, {"a": 3})
    params = jax.jit(model.init)(jax.random.key(0))
    config.model.mixer = "none"
    bare = {key: value for key, value in params.items() if key != "blocks"}
    bare["blocks"] = {i: {key: value for key, value in block.items() if key != "mixer"} for i, block in params["blocks"].items()}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
    wanted = jax.jit(build(config.model, {"a": 3}).logits)(bare, pixels)["a"]
    np.testing.assert_allclose(jax.jit(model.logits)(params, pixels)["a"], wanted, atol=1e-6)

    config.model.update(mixer="difference", temporal_init="random")
    config.optim.update(lr=1e-2, schedule="constant")
    assert not validate.check(config)
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 2, 1), 2)
    model = build(config.model, {"clips": len(tiny.CLIPS), "stills": len(tiny.STILLS)})
    rng = np.random.default_rng(0)
    batches = tuple(
        {
            "pixels": rng.integers(0, 256, (2, frames, 16, 16, 3), np.uint8),
            "label": np.arange(2, dtype=np.int32),
            "task": np.full(2, task, np.int32),
            "mask": np.ones(2, bool),
        }
        for task, frames in enumerate((4, 1))
    )

    states = [jax.jit(lambda key: step.init_state(config, model.init(key), optimizer))(jax.random.key(0))]
    train_step, losses = jax.jit(step.make_train_step(config, model, optimizer)), []
    for _ in range(2):
        state, metrics = train_step(states[-1], batches)
        states.append(state)
        losses.append(metrics["loss"])
    kernel = [state.params["blocks"]["0"]["mixer"]["fc"]["kernel"] for state in states]
    assert np.isfinite(losses).all() and losses[1] < losses[0] and np.abs(kernel[2] - kernel[0]).max() > 1e-3
