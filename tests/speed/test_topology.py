"""`benchmark --topology`: shapes from the config alone, what is read from the compiler's text, and (where libtpu is installed) a compilation."""

import importlib.util
import json
import os

import jax
import numpy as np
import pytest

from configs import cover_jft
from tests import tiny
from vidjoint import benchmark, optim, sharding
from vidjoint.config import base_config, task_config
from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.speed import topology
from vidjoint.train import sharded_step

HLO = """
  %all-reduce.1 = (f32[4,2]{1,0:T(8,128)}, bf16[3]{0:T(256)(128)(2,1)S(1)}) all-reduce(%a, %b), channel_id=1, replica_groups=mesh['x'=4] {'x'}
  %all-reduce.2 = s32[]{:T(128)} all-reduce(%c), to_apply=%region
  %all-gather-start.1 = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%d), dimensions={0}
  %all-gather-done.1 = f32[8,8]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute-start = (pred[16]{0}, pred[16]{0}, u32[], u32[]) collective-permute-start(%e)
  %fusion = f32[8,8]{1,0} fusion(%all-reduce.1), metadata={op_name="all-reduce(x)"}
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert topology.collectives(topology.repeated_lines(HLO)) == {
        "all-gather": {"count": 1, "bytes": 8 * 8 * 4},
        "all-reduce": {"count": 2, "bytes": 4 * 2 * 4 + 3 * 2 + 4},
        "collective-permute": {"count": 1, "bytes": 16},
    }


LOOPS = """HloModule jit_f
%inner_body (p: s32[]) -> s32[] {
  %all-gather.1 = f32[8]{0} all-gather(%x), dimensions={0}
}
%inner_condition (p: s32[]) -> pred[] {
  %constant.5.clone = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element, %constant.5.clone), direction=LT
}
%branch (p: f32[2]) -> f32[2] {
  %all-reduce.2 = f32[2]{0} all-reduce(%p), to_apply=%add
}
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.2 = (s32[], /*index=5*/f32[8]{0}) while(%tuple), condition=%inner_condition, body=%inner_body
  %conditional.1 = f32[2]{0} conditional(%i, %a, %b), branch_computations={%branch, %branch}
}
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  ROOT %fusion = pred[] fusion(%get-tuple-element)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %while.3 = (s32[], f32[8]{0}) while(%tuple), condition=%condition.1, body=%inner_body
}
"""


def test_what_is_in_loops_counts_as_often_as_it_runs():
    found = topology.collectives(topology.repeated_lines(LOOPS))
    assert found["all-gather"] == {"count": 5 * 3 + 1, "bytes": 16 * 32}  # of the last loop nobody knows the rounds
    assert found["all-reduce"] == {"count": 5 * 2, "bytes": 10 * 8}


def test_lack_of_memory_is_read_from_the_message():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
    assert topology.exceeded(message) == (18.5 * 2**30, 15.75 * 2**30)
    assert topology.exceeded("RESOURCE_EXHAUSTED: something else") is None


def test_rows_of_cover_without_its_data():
    """62 videos and 66 images (section 4.1), each filled up to the 32 devices x parts that share a batch."""
    config = cover_jft.get_config("high_res")
    mixture = Mixture(config, topology.unopened_tasks(config), 100, row_multiple=8)
    assert [stream.batch_size for stream in mixture.streams] == [66, 62] or [stream.batch_size for stream in mixture.streams] == [62, 66]
    shapes = topology.batch_shapes(mixture, 0, sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1}))
    assert {batch["pixels"].shape for batch in shapes} == {(64, 16, 448, 448, 3), (72, 1, 448, 448, 3)}
    assert all(batch["label"].shape == batch["mask"].shape == batch["pixels"].shape[:1] for batch in shapes)


def test_unknown_sets_count_as_the_mean_of_those_that_are_known():
    config = base_config()
    known = {"a": task_config(train="ucf101/train.txt"), "b": task_config(train="cifar100:train", classes=100, multilabel=True)}
    config.tasks.update(known, c=task_config(train="mine.csv"))
    tasks = topology.unopened_tasks(config)
    assert [len(task.train) for task in tasks.values()] == [9_537, 50_000, round((9_537 + 50_000) / 2)]
    assert [len(task.labels) for task in tasks.values()] == [1000, 100, 1000] and tasks["b"].train.label_shape == (100,)


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
def test_shapes_are_those_of_real_batches(tmp_path, schedule):
    tiny.write_data(tmp_path)
    config = tiny.config_of(tmp_path)
    config.schedule = schedule
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    real = Mixture(config, open_tasks(config), 20, row_multiple=8)
    abstract = Mixture(config, topology.unopened_tasks(config), 20, row_multiple=8)
    for step in real.kinds():
        arrays, shapes = real.step(step), topology.batch_shapes(abstract, step, mesh)
        assert len(arrays) == len(shapes)
        if schedule == "round_robin":  # mixed shares rows out by the sets' sizes, which are not known here
            assert jax.tree.map(lambda x: (x.shape, x.dtype), arrays) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_the_steps_figures(tmp_path):
    """Compiled for eight CPUs: the same code, another compiler."""
    config = tiny.config_of(tmp_path)
    config.schedule = "mixed"
    config.mesh.update(data=2, fsdp=2, tensor=2)
    mesh, tasks = sharding.make_mesh(config.mesh), topology.unopened_tasks(config)
    optimizer = optim.make_optimizer(config.optim, lambda step: 1e-3, len(tasks))
    state, _, train_step = sharded_step(config, build(config.model, dict.fromkeys(tasks, 10)), optimizer, mesh)
    shapes = topology.batch_shapes(Mixture(config, tasks, 20, row_multiple=4), 0, mesh)
    figures = topology.compile_step(train_step, state, shapes, topology.CHIPS["v5e"])
    sizes = [np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves((state, shapes))]
    assert figures["fits"] and figures["bytes"]["arguments"] == pytest.approx(sum(sizes), rel=0.05)
    assert figures["bytes_free"] == 16 * 2**30 - figures["bytes_needed"] > 0
    assert figures["collectives"]["all-reduce"]["count"] > 0 and figures["cycles_seconds"] is None
    whole = {"topology": "x", "devices": 8, "device_kind": "y", "hbm_gib": 16, "libtpu": "0", "mesh": dict(mesh.shape), "remat": "none"}
    lines = topology.as_table(whole | {"steps": [{"batches": [{"shape": [8, 4, 16, 24, 3], "filling": 1}]} | figures]}).splitlines()
    assert "fits" in lines and any("8x4x16x24 (1)" in line for line in lines) and any("all-reduce" in line for line in lines)
    assert any("not given" in line for line in lines)


def test_mistakes_are_lines(capsys):
    for name in ("v7:2x2", "v5e", "v5e:2x", "v5e:0", "H100:2x2"):
        assert benchmark.main(["--config=configs/cover_jft.py", f"--topology={name}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: --topology={name}: write CHIP:SIZE")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vidjoint\[tpu\]'"):
        topology.describe("v5e:2x2")


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPUs' compiler: pip install 'vidjoint[tpu]'")


@needs_libtpu
def test_command(tmp_path, capfd, monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # undone afterwards
    file = tmp_path / "experiment.py"
    file.write_text("""
from pathlib import Path
from tests import tiny

def get_config():
    config = tiny.config_of(Path("/absent"))
    config.update(task_order=(), batch_size=16, schedule="mixed")
    config.tasks.clips.classes, config.tasks.stills.classes = 8, 10
    config.mesh.update(data=-1, tensor=2)
    return config
""")
    assert benchmark.main([f"--config={file}", "--topology=v5e:2x2", f"--json={tmp_path / 'x.json'}"]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())
    (step,) = figures["steps"]
    assert figures["devices"] == 4 and figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2} and figures["fits"]
    assert step["flops"] > 0 and step["bytes_needed"] > 0 and step["cycles_seconds"] > 0 and step["collectives"]["all-reduce"]["count"] > 0
    assert "4 x TPU v5 lite of 16 GiB" in capfd.readouterr().out


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "sizes"), [("v4:4x4x8", (64, 1, 2)), ("v5e:16x16", (64, 1, 4)), ("v5p:4x4x8", (64, 2, 1)), ("v6e:16x16", (64, 1, 4))]
)
def test_a_device_is_a_chip_and_an_axis_may_be_a_part_of_a_side(name, sizes, monkeypatch):
    for variable in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # undone afterwards
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), topology.describe(name))
    assert mesh.devices.shape == sizes


@needs_libtpu
def test_an_arrangement_that_does_not_exist():
    with pytest.raises(UserError, match="--topology=v5e:3x5: libtpu knows no such arrangement"):
        topology.describe("v5e:3x5")
