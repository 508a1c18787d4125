"""Repeats the step at which a run stopped because its loss or gradient was not finite, and tells where that comes from.

python -m vidjoint.replay --workdir=DIR [--json=FILE]
"""

import argparse
import json
import math
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import vidjoint
from vidjoint import sharding
from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError, command
from vidjoint.models.build import build
from vidjoint.optim import join
from vidjoint.output_files import check_writable, write_json
from vidjoint.run_folder import RunFolder
from vidjoint.running.anomalies import FOLDER, read_batches
from vidjoint.step import TrainState
from vidjoint.train import sharded_step

PACKAGE = str(Path(vidjoint.__file__).parent)
SHOWN = 8  # parameters that are named

# In place of an optimiser: changes nothing, and keeps the gradients as its state
SPY = optax.GradientTransformationExtraArgs(
    lambda params: optax.tree.zeros_like(params), lambda gradients, state, params=None, **_: (optax.tree.zeros_like(gradients), gradients)
)


class Replay:
    """The step of `DIR/bad_step`, ready to be made again with all of its examples or with one of them.

    Attributes:
      about: the content of `batch.json`.
      examples: {"batch", "row", "task", "file", "label"} of each.
    """

    def __init__(self, workdir: str | Path):
        """Raises UserError if there is no bad step, or it can't be read."""
        run, folder = RunFolder(workdir), Path(workdir) / FOLDER
        if not (folder / "batch.json").is_file():
            if not folder.parent.is_dir():
                raise UserError(f"{folder.parent} does not exist: give the folder of a run")
            raise UserError(f"{folder} holds no step to repeat: a run writes one when it stops because of max_skipped")
        try:
            self.about = json.loads((folder / "batch.json").read_bytes())
            self._batches = read_batches(folder, self.about["processes"])
            self.examples = [{"batch": i, **example} for i, batch in enumerate(self.about["batches"]) for example in batch]
            self.number = int(self.about["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} can't be read ({error}): the run writes it anew when it stops there again") from error
        stored = load_params(folder)[1]
        self._config, self.labels = run.config, run.labels
        self._config.optim.update(ema=0.0, per_task="shared")  # neither matters before the update
        self._model = build(self._config.model, {task: len(names) for task, names in self.labels.items()})
        try:
            self._mesh = sharding.make_mesh(self._config.mesh)
            rows = [len(batch["mask"]) for batch in self._batches]
            for size in rows:
                sharding.local_rows(size, self._mesh)
        except UserError:  # other devices than the run had
            self._mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        abstract, _, self._step = sharded_step(self._config, self._model, SPY, self._mesh)
        state = TrainState(np.int32(self.number - 1), stored["params"], stored["frozen"], optax.tree.zeros_like(stored["params"]), {})
        self._place = lambda: jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, abstract)
        self.params = join(stored["params"], stored["frozen"])

    def run(self, example: dict | None = None) -> tuple[float, float, dict]:
        """Makes the step: loss, gradient norm and gradients; with an `example`, as if only that one were in it, all others black and left out."""
        batches = []
        for i, batch in enumerate(self._batches):
            if example:
                alone = (np.arange(len(batch["mask"])) == example["row"]) & (example["batch"] == i)
                pixels = np.zeros_like(batch["pixels"])
                pixels[alone] = batch["pixels"][alone]
                batch = batch | {"pixels": pixels, "mask": batch["mask"] & alone}
            batches.append(sharding.put_batch(batch, self._mesh))
        with sharding.memory_errors("repeat the step where the run was"):
            state, values = self._step(self._place(), tuple(batches))
            return float(values["loss"]), float(values["grad_norm"]), state.opt_state

    def first_nan(self, example: dict) -> str | None:
        """Where the forward pass of one example first makes a number that is not finite: part of the model and line of the code; None: nowhere."""
        settings = self._config.model.copy_and_resolve_references()
        settings.update(remat="none", **({"scan": False} if "scan" in settings else {}))
        model = build(settings, {task: len(names) for task, names in self.labels.items()})
        pixels = self._batches[example["batch"]]["pixels"][example["row"]][None]
        for kind in (jax.debug_nans, jax.debug_infs):
            try:
                with kind(True), jax.disable_jit():
                    vit = model.bind(self.params)
                    logits = vit(jnp.asarray(pixels))[example["task"]]
            except FloatingPointError as error:
                return f"{_place(vit, error)}: {str(error).splitlines()[0]}"
            if kind is jax.debug_nans and bool(jnp.isfinite(logits).all()):
                return None
        return None


def _place(vit: nnx.Module, error: Exception) -> str:
    """The innermost module and line of this package that a traceback goes through."""
    names = {id(node): "/".join(map(str, path)) for path, node in nnx.iter_graph(vit) if isinstance(node, nnx.Module)}
    module, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith(f"{PACKAGE}/models"):
            line = f"{Path(frame.f_code.co_filename).relative_to(Path(PACKAGE).parent)}:{number}"
            module = names.get(id(frame.f_locals.get("self"))) or module
    return " ".join(filter(None, (module, f"({line})" if line else "")))


def not_finite(tree: dict) -> list[str]:
    """`name (n of m numbers)` of each array with numbers that are not finite."""
    lines = []
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        if count := int((~np.isfinite(np.asarray(x, np.float32))).sum()):
            lines.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({count} of {x.size} numbers)")
    return lines


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.replay",
        usage="%(prog)s --workdir=DIR [--json=FILE]",
        description=__doc__.partition("\n")[0],
        epilog="Reads DIR/bad_step, which holds the examples, the parameters and the seed of that step; the data set is not needed. The JSON file "
        "holds the same as what is printed. Exit status: 0 if the step is finite here, 1 if again it is not, 2 if it can not be repeated.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run that stopped")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args(argv)
    check_writable(args.json)
    replay = Replay(args.workdir)
    sharding.keep_compiled()
    about = replay.about
    seen = f"loss {about['loss']}, gradient norm {about['grad_norm']}"
    print(f"step {replay.number}, seed {about['seed']}: {seen}; {about['skipped']} steps in a row were skipped")
    if about["updates_since"]:
        print(f"note: the parameters are those after {about['updates_since']} later updates")
    wrong = not_finite(replay.params)
    print(f"parameters: {_some(wrong) if wrong else 'all are finite'}")
    loss, norm, gradients = replay.run()
    again = not (math.isfinite(loss) and math.isfinite(norm))
    print(f"repeated on {jax.device_count()} {jax.devices()[0].device_kind}: loss {loss:.6g}, gradient norm {norm:.6g}")
    if not again:
        print("which is finite: it takes other devices or another version of the libraries to fail, or other parameters")
    result = {"step": replay.number, "loss": loss, "grad_norm": norm, "finite": not again, "parameters": wrong}
    examples = [_alone(replay, example) for example in tqdm(replay.examples, "examples", disable=None, delay=2, leave=False)]
    bad = [example for example in examples if not example["finite"]]
    print(f"{'batch':>5} {'row':>4}  {'loss':>10} {'gradient':>10}  task, file, label")
    for example in sorted(examples, key=lambda example: example["finite"]):
        told = f"{example['task']}, {example['file']}, {'|'.join(example['label'])}"
        print(f"{example['batch']:>5} {example['row']:>4}  {example['loss']:>10.6g} {example['grad_norm']:>10.4g}  {told}")
    if again and not bad:
        print("each example alone is finite: it is their sum, or their mixing (loss.mixup, loss.cutmix)")
    for example in bad[:1]:
        where = "the parameters" if wrong else f"the forward pass, {place}" if (place := replay.first_nan(example)) else "the backward pass"
        example["place"] = where
        print(f"batch {example['batch']}, row {example['row']}: not finite first in {where}")
    if again and (groups := not_finite(gradients)):
        print(f"gradients: {_some(groups)}")
        result["gradients"] = groups
    write_json(args.json, result | {"examples": examples})
    return 1 if again else 0


def _alone(replay: Replay, example: dict) -> dict:
    loss, norm, _ = replay.run(example)
    return example | {"loss": loss, "grad_norm": norm, "finite": math.isfinite(loss) and math.isfinite(norm)}


def _some(names: list[str]) -> str:
    return f"{len(names)} are not finite: {', '.join(names[:SHOWN])}" + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


if __name__ == "__main__":
    sys.exit(main())
