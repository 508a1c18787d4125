"""Imports run downwards only: commands -> train, evaluate -> step -> models, losses; data knows nothing of models, models nothing of data."""

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. A module may import modules of lower layers, and inside a package (a name that ends in a dot) those of its own.
LAYERS = (
    ("vidjoint", "vidjoint.models"),  # what these offer, they import when it is called: `vidjoint.load`, `vidjoint.models.build`
    ("vidjoint.findings", "vidjoint.__main__"),
    (
        "vidjoint.main",
        "vidjoint.compare",
        "vidjoint.probe",
        "vidjoint.visualize",
        "vidjoint.benchmark",
        "vidjoint.pack",
        "vidjoint.export",
        "vidjoint.weights.__main__",
    ),
    ("vidjoint.replay",),
    ("vidjoint.speed.attention",),
    ("vidjoint.speed.training", "vidjoint.speed.decoding", "vidjoint.speed.against_peer"),
    ("vidjoint.speed.topology",),
    ("vidjoint.machine.cpu",),
    ("vidjoint.train",),
    ("vidjoint.evaluate", "vidjoint.predict", "vidjoint.running.summary", "vidjoint.report", "vidjoint.probes."),
    ("vidjoint.classifier", "vidjoint.maps.rollout", "vidjoint.maps.flow", "vidjoint.answers"),
    ("vidjoint.drawing.", "vidjoint.maps.attention"),
    ("vidjoint.weights.",),
    ("vidjoint.validate",),
    ("vidjoint.reporting.results", "vidjoint.reporting.mistakes"),
    ("vidjoint.running.anomalies",),
    ("vidjoint.running.in_flight",),
    ("vidjoint.step", "vidjoint.run_folder", "vidjoint.check_data"),
    ("vidjoint.models.", "vidjoint.data.", "vidjoint.checkpoints", "vidjoint.optim", "vidjoint.mixup")
    + ("vidjoint.reporting.plots", "vidjoint.reporting.predictions", "vidjoint.reporting.page"),
    (
        "vidjoint.losses",
        "vidjoint.metrics",
        "vidjoint.sharding",
        "vidjoint.config",
        "vidjoint.machine.processes",
        "vidjoint.checksums",
        "vidjoint.running.stopping",
    ),
    ("vidjoint.running.trackers", "vidjoint.output_files"),
    ("vidjoint.errors", "vidjoint.exported.", "vidjoint.machine.host_memory", "vidjoint.speed.peer"),
    ("vidjoint.machine", "vidjoint.maps", "vidjoint.reporting", "vidjoint.running", "vidjoint.speed"),  # a line each, of what is in them
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "vidjoint").rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Full names of what a module imports anywhere in its text, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return names


GRAPH = {name: imported(name) & MODULES.keys() - {"vidjoint"} for name in MODULES}  # of which any may know version and place


def layer(name: str) -> tuple[int, str]:
    """Index in LAYERS and the entry that a module belongs to: its own name, or else its package's."""
    entries = {entry: i for i, names in enumerate(LAYERS) for entry in names}
    if name in entries:
        return entries[name], name
    for entry, i in entries.items():
        if entry.endswith(".") and f"{name}.".startswith(entry):
            return i, entry
    raise AssertionError(f"{name} has no layer: give it a place in LAYERS")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    level, entry = layer(name)
    for other in GRAPH[name]:
        other_level, other_entry = layer(other)
        same_package = entry == other_entry and entry.endswith(".")
        assert same_package or other_level > level, f"{name} imports {other}, which is not below it"


def test_no_import_cycles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_data_needs_no_jax_and_knows_no_models():
    """grain's worker processes import it, also through `vidjoint/__init__.py`."""
    for name in MODULES:
        if name == "vidjoint" or name.startswith("vidjoint.data"):
            assert not top_level(imported(name)) & {"jax", "jaxlib", "flax", "optax", "chex", "orbax"}, name
        if name.startswith("vidjoint.data"):
            outside = {other for other in GRAPH[name] if not other.startswith("vidjoint.data")}
            assert outside <= {"vidjoint.errors", "vidjoint.config", "vidjoint.output_files"}, name


def test_models_know_no_data():
    for name in MODULES:
        if name.startswith("vidjoint.models"):
            assert not [other for other in GRAPH[name] if other.startswith("vidjoint.data")], name
            assert not top_level(imported(name)) & {"grain", "av", "PIL", "tensorflow_datasets"}, name


def test_only_checkpoints_imports_orbax():
    assert {name for name in MODULES if "orbax" in top_level(imported(name))} == {"vidjoint.checkpoints"}


def test_nothing_needs_tensorflow_or_torch():
    """But the peer that `benchmark` measures against, a program of its own that no module imports."""
    for name in MODULES:
        assert "vidjoint.speed.peer" not in imported(name), name
        assert name == "vidjoint.speed.peer" or not top_level(imported(name)) & {"tensorflow", "torch", "clu"}, name
