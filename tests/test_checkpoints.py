import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjoint import sharding
from vidjoint.checkpoints import Checkpoints, _damage, load_params
from vidjoint.checksums import FILE as SUMS
from vidjoint.errors import UserError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "frozen", "opt_state", "ema"], meta_fields=[])
@dataclass
class State:
    step: Any
    params: Any
    frozen: Any
    opt_state: Any
    ema: Any


def make_state(step=0, width=8, ema=False) -> State:
    """A state with all that is hard to save: names with digits in them, bfloat16, scalars, empty and missing parts, an optimiser of nested tuples."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "blocks": {"2": {"qkv": {"kernel": jax.random.normal(keys[0], (width, 24))}}, "10": {"scale": jax.random.normal(keys[1], (width,))}},
        "half": jax.random.normal(keys[2], (4, 2), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    return State(jnp.array(step, jnp.int32), params, {}, optimizer.init(params), params if ema else None)


def steps_on_disk(workdir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def abstract(state, mesh=None):
    """The shapes of a state with shardings: those of the mesh, or of the state's own arrays."""
    where = sharding.tree_sharding(state, mesh) if mesh else jax.tree.map(lambda x: x.sharding, state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_bit_equal_in_another_process_of_training(tmp_path, ema):
    state = make_state(3, ema=ema)
    with Checkpoints(tmp_path, keep=2) as saved:
        assert (saved.latest(), saved.best()) == (None, None)
        saved.save(3, state, metric=0.5)
        assert (saved.latest(), saved.best()) == (3, 3)
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() == 3
        assert_bit_equal(saved.restore(abstract(state)), state)


@pytest.mark.parametrize(("before", "after"), [((1, 4, 2), (2, 2, 2)), ((2, 2, 2), None), (None, (1, 8, 1))])
def test_a_state_can_be_restored_onto_another_mesh(tmp_path, before, after):
    """Sizes of (data, fsdp, tensor); None is a single device."""
    meshes = [
        sharding.make_mesh(dict(zip(sharding.AXES, sizes or (1, 1, 1), strict=True)), devices=None if sizes else jax.devices()[:1])
        for sizes in (before, after)
    ]
    state = make_state(1)
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, jax.device_put(state, sharding.tree_sharding(state, meshes[0])))
        restored = saved.restore(abstract(state, meshes[1]))
    assert_bit_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == sharding.tree_sharding(state, meshes[1])


def test_the_newest_and_the_best_stay_also_when_some_saves_have_no_metric(tmp_path):
    metrics = [0.1, 0.9, 0.3, None, 0.4, float("nan"), None, 0.2, None]
    state = make_state()
    with Checkpoints(tmp_path, keep=2) as saved:
        for step, metric in enumerate(metrics):
            saved.save(step, state, metric)
            saved.wait()
            best = max((m, s) for s, m in enumerate(metrics[: step + 1]) if m is not None and m == m)[1]
            assert steps_on_disk(tmp_path) == sorted({step, max(step - 1, 0), best}), step
            assert saved.best() == best
    with Checkpoints(tmp_path, keep=2) as saved:  # a new process knows the metrics
        assert (saved.latest(), saved.best()) == (8, 1)
        saved.save(9, state, 0.9)  # of equals the newest
        assert saved.best() == 9
    assert steps_on_disk(tmp_path) == [8, 9]


def test_without_metrics_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step in range(6):
            saved.save(step, make_state())
        assert saved.best() is None
    assert steps_on_disk(tmp_path) == [3, 4, 5]


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(1, make_state(1), 0.5)
        saved.save(1, make_state(2), 0.9)
        assert_bit_equal(saved.restore(abstract(make_state(1))), make_state(1))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = update({"params": {str(i): jnp.zeros((500_000,)) for i in range(4)}})
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(1, state)
        for _ in range(10):
            state = update(state)
        restored = saved.restore(abstract(state))
    assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(restored))


def test_parameters_are_read_without_the_optimiser(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        for step, metric in enumerate([0.1, 0.8, None]):
            saved.save(step, make_state(step, ema=True), metric)
    for step, expected in ((None, 2), (1, 1), ("best", 1)):  # None: the newest
        found, params = load_params(tmp_path, step)
        assert found == expected
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
        state = make_state(expected)
        chex.assert_trees_all_equal(params, {"params": state.params, "frozen": {}, "ema": state.params}, strict=True)


def test_a_run_without_metrics_has_no_best_parameters(tmp_path):
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(1, make_state(1))
        saved.save(2, make_state(2))
    before = sorted(tmp_path.rglob("*"))
    step, params = load_params(tmp_path)
    assert step == 2
    chex.assert_trees_all_equal(params, {"params": make_state(2).params, "frozen": {}, "ema": {}}, strict=True)
    with pytest.raises(UserError, match="no best checkpoint"):
        load_params(tmp_path, "best")
    assert sorted(tmp_path.rglob("*")) == before


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "arrays are cut off": lambda step: [truncate(path) for path in step.glob("default/**/d/*")],
    "arrays are missing": lambda step: [path.unlink() for path in step.glob("default/**/d/*")],
    "the list of arrays is missing": lambda step: (step / "default/_METADATA").unlink(),
    "the list of arrays is empty": lambda step: (step / "default/_METADATA").write_text(""),
    "the index is cut off": lambda step: truncate(step / "default/manifest.ocdbt"),
}


def save_two(workdir: Path, metric: float | None = None) -> State:
    with Checkpoints(workdir, keep=2) as saved:
        for step in (1, 2):
            saved.save(step, make_state(step), metric)
    return make_state(1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(tmp_path, capfd, caplog, damage):
    state = save_two(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoints/2")
    before = sorted(path for path in tmp_path.rglob("*"))
    step, params = load_params(tmp_path)
    assert step == 1 and sorted(path for path in tmp_path.rglob("*")) == before, "reading for use writes nothing"
    chex.assert_trees_all_equal(params["params"], jax.device_get(state.params), strict=True)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/checkpoints/2: this checkpoint is damaged (default/") and line.endswith("): step 1 is used in its place")
    with pytest.raises(UserError, match=f"^{tmp_path}/checkpoints/2: this checkpoint is damaged .*; delete the folder to use another step$"):
        load_params(tmp_path, 2)
    caplog.clear()
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() == 1
        assert_bit_equal(saved.restore(abstract(state)), state)
        saved.save(2, state)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/checkpoints/2: this checkpoint is damaged (default/") and line.endswith(
        "): set aside as 2.damaged, and step 1 is used"
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]
    DAMAGES[damage](tmp_path / "checkpoints/2")
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged", "2.damaged.again"]
    assert capfd.readouterr() == ("", "")


def test_any_flipped_bit_is_noticed(tmp_path, full):
    """Of what is read: beside it, orbax keeps a few notes that nobody needs."""
    save_two(tmp_path, 0.5)
    step, rng = tmp_path / "checkpoints/2", random.Random(0)
    files = [path for path in step.rglob("*") if path.is_file() and path.stat().st_size and path.parent != step]
    assert len(files) > 5
    for path in [*files, step / SUMS] * (100 if full else 2):
        content = path.read_bytes()
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        assert _damage(step.parent, 2), path
        path.write_bytes(content)
    assert _damage(step.parent, 2) is None


@pytest.mark.parametrize("sums", [True, False])
def test_where_no_checkpoint_is_whole_nothing_is_changed_and_each_is_named(tmp_path, capfd, sums):
    """Starting anew by itself would be the loss of the run."""
    save_two(tmp_path)
    for step in (tmp_path / "checkpoints").iterdir():
        (step / "default/_METADATA").unlink()
        if not sums:  # as a version without them has saved it
            (step / SUMS).unlink()
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: Checkpoints(tmp_path, keep=2), lambda: load_params(tmp_path)):
        with pytest.raises(UserError) as caught:
            call()
        first, *rest = caught.value.lines
        assert first == f"{tmp_path}/checkpoints: none of the checkpoints is whole: put back a copy of one, or start anew in another folder:"
        assert [line[:12] for line in rest] == ["  2: default", "  1: default"]
    assert sorted(tmp_path.rglob("*")) == before and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["arrays are cut off", "arrays are missing", "the index is cut off"])
def test_without_checksums_damage_is_an_error_of_one_line(tmp_path, capfd, damage):
    state = save_two(tmp_path)
    for sums in (tmp_path / "checkpoints").rglob(SUMS):
        sums.unlink()
    with Checkpoints(tmp_path, keep=2) as saved:
        assert_bit_equal(saved.restore(abstract(state), 1), state)
        DAMAGES[damage](tmp_path / "checkpoints/2")
        for read in (lambda: saved.restore(abstract(state), 2), lambda: load_params(tmp_path, 2)):
            with pytest.raises(UserError, match=f"^{tmp_path}/checkpoints/2: this checkpoint is damaged") as caught:
                read()
            assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_metric_is_damage_too(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step, metric in ((1, 0.5), (2, 0.9), (3, 0.1)):
            saved.save(step, make_state(), metric)
    for sums in (tmp_path / "checkpoints").rglob(SUMS):
        sums.unlink()
    truncate(tmp_path / "checkpoints/2/metrics/metrics")
    assert load_params(tmp_path, "best")[0] == 1
    with Checkpoints(tmp_path, keep=3) as saved:
        assert (saved.latest(), saved.best(), saved.has_metric(1)) == (3, 1, True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged", "3"]


def test_missing_checkpoints_are_errors_that_name_the_folder(tmp_path):
    nothing = f"^{tmp_path}/checkpoints: no checkpoints there"
    with pytest.raises(UserError, match=nothing):
        load_params(tmp_path)
    assert not list(tmp_path.iterdir())
    with Checkpoints(tmp_path, keep=2) as saved:
        with pytest.raises(UserError, match=nothing):
            saved.restore(abstract(make_state()))
        saved.save(7, make_state())
        with pytest.raises(UserError, match="no checkpoint of step 8; there are 7"):
            saved.restore(abstract(make_state()), step=8)
    with pytest.raises(UserError, match="no checkpoint of step 8; there are 7"):
        load_params(tmp_path, step=8)


def test_a_workdir_that_cannot_hold_checkpoints_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/checkpoints: cannot be used"):
        Checkpoints(tmp_path / "file", keep=1)
    with pytest.raises(UserError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_checkpoint_of_another_model_names_all_differences(tmp_path):
    with Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, make_state(1, width=8))
        other = make_state(1, width=16, ema=True)
        other.params["new"] = jnp.zeros(3)
        with pytest.raises(UserError) as caught:
            saved.restore(abstract(other))
    first, *rest = caught.value.lines
    assert first.startswith(f"{tmp_path}/checkpoints/1: saved by another model or optimiser")
    assert "  params/blocks/2/qkv/kernel: saved float32[8, 24], wanted float32[16, 24]" in rest
    assert "  params/new: saved not at all, wanted float32[3]" in rest
    assert "  ema/blocks/10/scale: saved not at all, wanted float32[16]" in rest
    assert (len(rest), rest[-1]) == (11, "  and 1 more")


def in_another_process(code: str, *args) -> subprocess.CompletedProcess:
    """Runs a script in a fresh Python, as a command does: without the settings of the tests."""
    header = "import sys, jax, jax.numpy as jnp\nfrom vidjoint.checkpoints import Checkpoints\nfrom vidjoint.errors import UserError\n"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", header + textwrap.dedent(code), *map(str, args)], env=environment, capture_output=True, text=True)


def test_a_save_that_is_killed_leaves_the_checkpoint_before_and_no_rubbish(tmp_path):
    done = in_another_process(
        """
        import os
        saved = Checkpoints(sys.argv[1], keep=2)
        saved.save(1, {"params": {"a": jnp.ones(8)}})
        saved.wait()
        saved.save(2, {"params": {"a": jnp.ones(20_000_000)}})
        while os.listdir(f"{sys.argv[1]}/checkpoints") == ["1"]:  # threads write
            pass
        os.kill(os.getpid(), 9)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert load_params(tmp_path)[1]["params"]["a"].tolist() == [1] * 8
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() == 1
        saved.save(2, {"params": {"a": jnp.ones(8)}})
    assert steps_on_disk(tmp_path) == [1, 2]


def test_a_full_disk_is_an_error_of_one_line_and_the_checkpoint_before_stays_whole(tmp_path):
    done = in_another_process(
        """
        import resource, signal
        saved = Checkpoints(sys.argv[1], keep=1)
        saved.save(1, {"params": {"a": jnp.ones(8)}})
        saved.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may be larger: writing fails as on a full disk
        saved.save(2, {"params": {"a": jax.random.normal(jax.random.key(0), (1_000_000,))}})
        try:
            saved.close()
        except UserError as error:
            print(error)
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path}/checkpoints: a checkpoint could not be saved") and done.stdout.count("\n") == 1
    assert load_params(tmp_path)[1]["params"]["a"].shape == (8,)


def test_nothing_is_printed(tmp_path):
    """Not even with all of absl's messages on: orbax logs dozens of lines for each save."""
    done = in_another_process(
        """
        import warnings
        from absl import logging
        from vidjoint.checkpoints import load_params
        warnings.simplefilter("error")
        logging.set_verbosity(logging.INFO)
        state = {"params": {"a": jnp.ones(8)}}
        with Checkpoints(sys.argv[1], keep=1) as saved:
            for step in range(3):
                saved.save(step, state, None if step else 0.5)
            saved.restore(state)
        load_params(sys.argv[1])
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
