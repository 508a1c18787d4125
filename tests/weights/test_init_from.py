"""A new model takes over what fits of an earlier run, and says what it did."""

import functools

import jax
import numpy as np
import pytest

from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import Model, build
from vidjoint.models.position import resize_position, resize_time
from vidjoint.run_folder import RunFolder
from vidjoint.weights.init_from import plan
from vidjoint.weights.pretrained import adopt, open_weights

LABELS = {"actions": ("jump", "run", "sit"), "pictures": ("cat", "dog")}


def model_config(**changes):
    config = base_config()
    config.model.update(variant="Ti/8", width=8, depth=2, heads=2, mlp_dim=12, frames=4, image_size=16)
    config.model.update(**changes)
    for task in LABELS:
        config.tasks[task] = task_config()
    return config


shapes = functools.cache(Model.abstract)


def draw(config, labels, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    model = build(config.model, {task: len(names) for task, names in labels.items()})
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes(model))


def write_run(folder, config, seed=0, labels=LABELS, ema=False) -> dict:
    """A run's folder as training leaves it; returns the parameters that count."""
    run = RunFolder(folder)
    run.write(config, labels)
    params, average = (draw(config, labels, seed + i) for i in range(2))
    frozen = {"embed": params.pop("embed")}
    average.pop("embed")
    state = {"step": np.int32(7), "params": params, "frozen": frozen, "ema": average if ema else {}}
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state))
    return flat((average if ema else params) | frozen)


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def init_from(path: str, fresh: dict, spec, labels, report, allow=()) -> dict:
    """What `fresh` becomes; `report` takes the summary's lines."""
    planned = plan(open_weights(path), fresh, spec, labels, allow)
    for line in planned.summary():
        report(line)
    return planned.apply(fresh)


def load(folder, config, labels=LABELS) -> tuple[dict, dict, list[str]]:
    """What a new model starts from, what it was before, and the report."""
    fresh, lines = draw(config, labels, 99), []
    spec = build(config.model, {}).spec
    result = init_from(str(folder), fresh, spec, labels, lines.append)
    assert jax.tree.structure(result) == jax.tree.structure(fresh)
    assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, fresh)
    return flat(result), flat(fresh), lines


def assert_same(found: dict, expected: dict, names):
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_temporal_encoder_s_table_is_stretched(tmp_path):
    changes = dict(pool="temporal_encoder", temporal_encoder={"depth": 1})
    old = write_run(tmp_path, model_config(**changes))
    found, fresh, lines = load(tmp_path, model_config(frames=6, **changes))
    np.testing.assert_array_equal(found["pool/time"], resize_time(old["pool/time"], 6))
    assert_same(found, old, fresh.keys() - {"pool/time"})
    assert lines[1] == f"init_from={tmp_path} (step 7): 1 parameters resized: pool/time"


@pytest.mark.parametrize("ema", [False, True])
def test_everything_is_taken_over_and_the_average_where_there_is_one(tmp_path, ema):
    config = model_config(mixer="divided")
    old = write_run(tmp_path, config, ema=ema)
    found, fresh, lines = load(tmp_path, config)
    assert found.keys() == fresh.keys() == old.keys()
    assert_same(found, old, old)
    heads = "the classifier of actions, pictures, whose class names are the same"
    assert lines == [f"init_from={tmp_path} (step 7): {len(old)} parameters loaded, with {heads}"]


def test_the_tables_are_stretched(tmp_path):
    old = write_run(tmp_path, model_config(mixer="joint"))
    found, fresh, lines = load(tmp_path, model_config(mixer="joint", image_size=40, frames=6))
    np.testing.assert_allclose(found["embed/position"], resize_position(old["embed/position"], 1, (2, 2), (5, 5)), atol=1e-6)
    np.testing.assert_array_equal(found["embed/position"][0], old["embed/position"][0])
    np.testing.assert_array_equal(found["embed/time"], resize_time(old["embed/time"], 6))
    assert_same(found, old, fresh.keys() - {"embed/position", "embed/time"})
    assert lines[1] == f"init_from={tmp_path} (step 7): 2 parameters resized: embed/{{position,time}}"


@pytest.mark.parametrize("labels", [("run", "jump", "sit"), ("jump", "run", "stand"), ("jump", "run")])
def test_a_head_is_taken_over_only_with_its_class_names(tmp_path, labels):
    config = model_config()
    old = write_run(tmp_path, config)
    found, fresh, lines = load(tmp_path, config, {**LABELS, "actions": labels})
    new = {"heads/actions/kernel", "heads/actions/bias"}
    assert_same(found, fresh, new)
    assert_same(found, old, fresh.keys() - new)
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters {kind}: heads/actions/{{bias,kernel}}" for kind in ("new", "unused")]


def test_all_heads_may_start_anew(tmp_path):
    """As in a transfer to a dataset that the earlier run had, too (CoVeR 3.2)."""
    config = model_config()
    old = write_run(tmp_path, config)
    fresh = draw(config, LABELS, 99)
    planned = plan(open_weights(tmp_path), fresh, build(config.model, {}).spec, LABELS, heads="new")
    heads = {name for name in old if name.startswith("heads/")}
    assert_same(flat(planned.apply(fresh)), flat(fresh), heads)
    assert_same(flat(planned.apply(fresh)), old, old.keys() - heads)
    assert {line.name for line in planned.lines if line.kind == "unused"} == heads


def test_tasks_that_come_and_go(tmp_path):
    config = model_config()
    old = write_run(tmp_path, config)
    found, fresh, lines = load(tmp_path, config, {"actions": LABELS["actions"], "gestures": ("wave", "point")})
    assert_same(found, old, [name for name in fresh if "gestures" not in name])
    assert_same(found, fresh, ["heads/gestures/kernel", "heads/gestures/bias"])
    assert lines[1:] == [
        f"init_from={tmp_path} (step 7): 2 parameters new: heads/gestures/{{bias,kernel}}",
        f"init_from={tmp_path} (step 7): 2 parameters unused: heads/pictures/{{bias,kernel}}",
    ]


SPATIAL = {"temporal_norm": "norm1", "temporal_attn": "attn"}


def spatial(name: str) -> str:
    """blocks/0/mixer/temporal_attn/qkv/bias -> blocks/0/attn/qkv/bias."""
    block, number, _, part, rest = name.split("/", 4)
    return f"{block}/{number}/{SPATIAL[part]}/{rest}"


@pytest.mark.parametrize("mixer", ["divided", "motion"])
@pytest.mark.parametrize("temporal_init", ["zero", "copied"])
def test_from_images_to_videos_the_temporal_attention_is_that_of_space(tmp_path, mixer, temporal_init):
    """CoVeR's second stage: a frame-wise model hands over to one with attention over time, as TimeSformer's and ViViT's loaders do."""
    old = write_run(tmp_path, model_config())
    found, fresh, lines = load(tmp_path, model_config(mixer=mixer, temporal_init=temporal_init))
    copied = {name for name in fresh if "/mixer/temporal_attn/" in name or "/mixer/temporal_norm/" in name}
    new = {name for name in fresh if "/mixer/temporal_fc/" in name or name == "embed/time"}
    assert copied | new == fresh.keys() - old.keys() and (len(copied), len(new)) == (2 * 6, 2 * 2 + 1)
    for name in copied:
        np.testing.assert_array_equal(found[name], old[spatial(name)], err_msg=name)
    assert_same(found, fresh, new)
    assert_same(found, old, old)
    modules = "attn/proj/{bias,kernel}, attn/qkv/{bias,kernel}, norm/{bias,scale}".split(", ")
    assert lines[1:] == [
        f"init_from={tmp_path} (step 7): 12 parameters copied from the spatial attention: "
        + ", ".join(f"blocks/*/mixer/temporal_{module}" for module in modules),
        f"init_from={tmp_path} (step 7): 5 parameters new: blocks/*/mixer/temporal_fc/{{bias,kernel}}, embed/time",
    ]


def test_from_images_to_videos_from_scratch_nothing_is_copied(tmp_path):
    old = write_run(tmp_path, model_config())
    found, fresh, lines = load(tmp_path, model_config(mixer="divided", temporal_init="random"))
    assert_same(found, fresh, fresh.keys() - old.keys())
    assert_same(found, old, old)
    assert lines[1].startswith(f"init_from={tmp_path} (step 7): 17 parameters new: blocks/*/mixer/temporal_attn/proj/{{bias,kernel}}, ")


def test_a_copied_branch_acts_at_once_and_a_zero_one_later():
    for temporal_init, expected in {"zero": np.zeros((8, 8)), "copied": np.eye(8)}.items():
        model = build(model_config(mixer="divided", depth=1, temporal_init=temporal_init).model, {"actions": 3})
        fc, time = jax.jit(lambda key, model=model: _branch_end(model.init(key)))(jax.random.key(0))
        np.testing.assert_array_equal(fc["kernel"], expected)
        assert not fc["bias"].any() and not time.any()


def _branch_end(params: dict) -> tuple:
    return params["blocks"]["0"]["mixer"]["temporal_fc"], params["embed"]["time"]


@pytest.mark.parametrize("temporal_init", ["zero", "copied"])
def test_a_branch_without_a_dense_layer_ends_in_its_projection(tmp_path, temporal_init):
    """That must stay zero, or the fresh model would not be the image ViT."""
    old = write_run(tmp_path, model_config())
    config = model_config(mixer="motion", temporal_init=temporal_init)
    config.model.motion.temporal_fc = False
    found, fresh, _ = load(tmp_path, config)
    for name in fresh.keys() - old.keys() - {"embed/time"}:
        stays = temporal_init == "zero" and "temporal_attn/proj/" in name
        np.testing.assert_array_equal(found[name], fresh[name] if stays else old[spatial(name)], err_msg=name)


def test_temporal_attention_that_is_there_is_kept(tmp_path):
    """Blocks that had none before get theirs from space; divided and motion attention are parameters of one kind."""
    old = write_run(tmp_path, model_config(mixer="divided", mixer_blocks=(1,)))
    found, fresh, lines = load(tmp_path, model_config(mixer="motion"))
    assert_same(found, old, old)
    for name in fresh:
        if name.startswith(("blocks/0/mixer/temporal_attn", "blocks/0/mixer/temporal_norm")):
            np.testing.assert_array_equal(found[name], old[spatial(name)], err_msg=name)
    assert "6 parameters copied" in lines[1] and "2 parameters new: blocks/*/mixer/temporal_fc" in lines[2]


VIDEO = {"embed/video_proj/kernel", "embed/video_proj/bias", "embed/video_position"}


@pytest.mark.parametrize("init", ["central_frame", "average"])
@pytest.mark.parametrize(("tubelet", "size"), [(1, 16), (2, 40)])
def test_an_embedding_for_videos_is_made_from_that_of_images(tmp_path, tubelet, size, init):
    old = write_run(tmp_path, model_config(mixer="joint"))
    found, fresh, lines = load(tmp_path, model_config(mixer="joint", embed="separate", tubelet=tubelet, tubelet_init=init, image_size=size))
    kernel = old["embed/proj/kernel"]
    parts = [kernel] if tubelet == 1 else [kernel / 2] * 2 if init == "average" else [np.zeros_like(kernel), kernel]
    np.testing.assert_array_equal(found["embed/video_proj/kernel"], np.concatenate(parts))
    np.testing.assert_array_equal(found["embed/video_proj/bias"], old["embed/proj/bias"])
    np.testing.assert_array_equal(found["embed/video_position"], found["embed/position"])
    np.testing.assert_allclose(found["embed/position"], resize_position(old["embed/position"], 1, (2, 2), (size // 8,) * 2), atol=1e-6)
    if tubelet == 2:
        np.testing.assert_array_equal(found["embed/time"], resize_time(old["embed/time"], 2))
    made = "3 parameters inflated from the image embedding: embed/video_position, embed/video_proj/{bias,kernel}"
    assert f"init_from={tmp_path} (step 7): {made}" in lines
    assert_same(found, old, fresh.keys() - VIDEO - {"embed/position", "embed/time"})


def test_parts_come_from_other_weights(tmp_path):
    """As in IV-ViT 5.4: the embedding of videos is a video model's, that of images another image model's, the rest is the first's."""
    old = write_run(tmp_path / "a", model_config(mixer="joint"), seed=1)
    video = write_run(tmp_path / "b", model_config(mixer="none", embed="separate", tubelet=2, pool="temporal_encoder", image_size=24), seed=3)
    image = write_run(tmp_path / "c", model_config(mixer="none", frames=1), seed=5)
    config = model_config(mixer="joint", embed="separate", tubelet=2)
    fresh, spec = draw(config, LABELS, 99), build(config.model, {}).spec
    parts = [("embed/video_.*", open_weights(tmp_path / "b")), (r"embed/(proj/.*|position|class_token)", open_weights(tmp_path / "c"))]
    planned = plan(open_weights(tmp_path / "a"), fresh, spec, LABELS, parts=parts)
    found = flat(planned.apply(fresh))
    assert_same(found, video, ["embed/video_proj/kernel", "embed/video_proj/bias"])
    np.testing.assert_allclose(found["embed/video_position"], resize_position(video["embed/video_position"], 1, (3, 3), (2, 2)), atol=1e-6)
    assert_same(found, image, ["embed/proj/kernel", "embed/proj/bias", "embed/position", "embed/class_token"])
    assert_same(found, old, [name for name in old if not name.startswith("embed/")])
    assert f"loaded    embed/video_proj/bias  [8]  <- {tmp_path / 'b'}" in planned.table().splitlines()
    assert planned.summary()[-2:] == [
        f"init_from={tmp_path / 'a'}: 3 parameters are those of {tmp_path / 'b'}: embed/video_position, embed/video_proj/{{bias,kernel}}",
        f"init_from={tmp_path / 'a'}: 4 parameters are those of {tmp_path / 'c'}: embed/{{class_token,position}}, embed/proj/{{bias,kernel}}",
    ]
    write_run(tmp_path / "d", model_config(mixer="none", frames=1, mean=(0.1, 0.2, 0.3)), seed=5)
    planned = plan(open_weights(tmp_path / "a"), fresh, spec, LABELS, parts=[("embed/proj/.*", open_weights(tmp_path / "d"))])
    assert planned.warnings[-1].startswith(f"{tmp_path / 'd'}: model.mean was (0.1, 0.2, 0.3) there and is ")
    with pytest.raises(UserError, match=r"init_parts: .*a has nothing for this model that 'pool/.*' names"):
        plan(open_weights(tmp_path / "a"), fresh, spec, LABELS, parts=[("pool/.*", open_weights(tmp_path / "a"))])


def test_what_no_part_gives_need_not_fit(tmp_path):
    """A misfit is told where the parameter is wanted, and not where other weights take its place."""
    old = write_run(tmp_path / "a", model_config(embed="separate", tubelet=4, mlp_dim=20), seed=1)
    other = write_run(tmp_path / "b", model_config(embed="separate", tubelet=2), seed=3)
    config = model_config(embed="separate", tubelet=2, mlp_dim=20)
    fresh, spec = draw(config, LABELS, 99), build(config.model, {}).spec
    a, b = (open_weights(tmp_path / name) for name in "ab")
    found = flat(plan(a, fresh, spec, LABELS, parts=[("embed/video_.*", b)]).apply(fresh))
    assert_same(found, other, VIDEO)
    assert_same(found, old, [name for name in old if name not in VIDEO])
    for pattern in ("embed/position", "embed/video_position|blocks/.*"):  # the first weights' video embedding, and the others' blocks, do not fit
        with pytest.raises(UserError, match=r"of a model of another size|embed/video_proj/kernel is"):
            plan(a, fresh, spec, LABELS, parts=[(pattern, b)])


def test_separate_embeddings_are_taken_over_stretched_and_left(tmp_path):
    old = write_run(tmp_path, model_config(embed="separate"))
    found, fresh, lines = load(tmp_path, model_config(embed="separate", image_size=40))
    for table in ("embed/position", "embed/video_position"):
        np.testing.assert_allclose(found[table], resize_position(old[table], 1, (2, 2), (5, 5)), atol=1e-6)
    assert np.abs(found["embed/position"] - found["embed/video_position"]).max() > 0.1
    assert_same(found, old, fresh.keys() - {"embed/position", "embed/video_position"})
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters resized: embed/{{position,video_position}}"]

    found, _, lines = load(tmp_path, model_config(embed="separate", tubelet=2))
    kernel = old["embed/video_proj/kernel"]
    np.testing.assert_array_equal(found["embed/video_proj/kernel"], np.concatenate([np.zeros_like(kernel), kernel]))
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 1 parameters resized: embed/video_proj/kernel"]

    found, fresh, lines = load(tmp_path, model_config())
    assert_same(found, old, fresh)
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 3 parameters unused: embed/video_position, embed/video_proj/{{bias,kernel}}"]


def test_tubelets_do_not_become_shorter(tmp_path):
    write_run(tmp_path, model_config(embed="separate", tubelet=4))
    with pytest.raises(UserError) as caught:
        load(tmp_path, model_config(embed="separate", tubelet=2))
    fault = "embed/video_proj/kernel is [768, 8] there and [384, 8] here: use the model settings of those weights"
    assert caught.value.lines == (f"init_from={tmp_path}: {fault}",)


def test_a_head_of_another_width_starts_anew(tmp_path):
    """Branches of the mixer lengthen the features (AM Flow): the same labels then have another kernel."""
    config = model_config()
    old = write_run(tmp_path, config)
    fresh, lines = draw(config, LABELS, 99), []
    fresh["heads"]["actions"]["kernel"] = np.ones((20, 3), np.float32)
    found = flat(init_from(str(tmp_path), fresh, build(config.model, {}).spec, LABELS, lines.append))
    new = {"heads/actions/kernel", "heads/actions/bias"}
    assert_same(found, flat(fresh), new)
    assert_same(found, old, old.keys() - new)
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters {kind}: heads/actions/{{bias,kernel}}" for kind in ("new", "unused")]


def test_parameters_of_the_pool_are_accounted_for(tmp_path):
    config = model_config()
    pooled = {"0": {"mlp": {"bias": np.ones(3, np.float32)}}, "1": {"mlp": {"bias": np.ones(3, np.float32)}}}
    fresh, lines = draw(config, LABELS, 99) | {"pool": pooled}, []
    old = write_run(tmp_path, config)
    found = flat(init_from(str(tmp_path), fresh, build(config.model, {}).spec, LABELS, lines.append))
    assert_same(found, old | flat({"pool": pooled}), found)
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters new: pool/*/mlp/bias"]

    bare = {name: part for name, part in fresh.items() if name != "embed"} | {"embed": {"proj": fresh["embed"]["proj"]}}
    with pytest.raises(UserError) as caught:
        init_from(str(tmp_path), bare, build(config.model, {}).spec, LABELS, lines.append)
    fault = "this model has no place for embed/position: use their model settings, or allow it with init_allow=('REGEX',)"
    assert caught.value.lines == (f"init_from={tmp_path}: {fault}",)
    lines.clear()
    init_from(str(tmp_path), bare, build(config.model, {}).spec, LABELS, lines.append, allow=("embed/.*",))
    assert lines[2] == f"init_from={tmp_path} (step 7): 2 parameters unused: embed/{{class_token,position}}"


def test_blocks_that_come_and_go_need_to_be_allowed(tmp_path):
    old = write_run(tmp_path, model_config())
    for depth, fault in ((1, "this model has no place for blocks/*/"), (3, "the weights lack blocks/*/")):
        with pytest.raises(UserError) as caught:
            load(tmp_path, model_config(depth=depth))
        assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith(f"init_from={tmp_path}: {fault}")
    fresh, lines = draw(model_config(depth=3), LABELS, 99), []
    found = flat(init_from(str(tmp_path), fresh, build(model_config(depth=3).model, {}).spec, LABELS, lines.append, allow=("blocks/2/.*",)))
    assert_same(found, old, old)
    assert_same(found, flat(fresh), found.keys() - old.keys())


def test_every_parameter_has_a_line_in_the_table(tmp_path):
    write_run(tmp_path, model_config(mixer="joint"))
    config = model_config(mixer="divided", image_size=24)
    planned = plan(open_weights(tmp_path), shapes(build(config.model, {"actions": 3})), build(config.model, {}).spec, {"actions": ("a", "b", "c")})
    lines = planned.table().splitlines()
    assert "resized   embed/position  [5, 8] -> [10, 8]" in lines
    assert "loaded    blocks/0/attn/qkv/kernel  [8, 24]" in lines
    assert "new       heads/actions/kernel  [8, 3]" in lines and "unused    heads/actions/kernel  [8, 3]" in lines
    assert len(lines) == len(flat(shapes(build(config.model, {"actions": 3})))) + 4  # and the two classifiers of the weights


def test_a_head_is_found_under_another_name(tmp_path):
    old = write_run(tmp_path, model_config())
    config = model_config()
    fresh, lines = draw(config, {"moves": LABELS["actions"]}, 99), []
    found = flat(init_from(str(tmp_path), fresh, build(config.model, {}).spec, {"moves": LABELS["actions"]}, lines.append))
    np.testing.assert_array_equal(found["heads/moves/kernel"], old["heads/actions/kernel"])
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters unused: heads/pictures/{{bias,kernel}}"]
    planned = plan(open_weights(tmp_path), fresh, build(config.model, {}).spec, {"moves": LABELS["actions"]})
    assert "loaded    heads/moves/kernel  [8, 3]  <- heads/actions/kernel" in planned.table().splitlines()


def test_shapes_that_do_not_fit_are_all_listed(tmp_path):
    write_run(tmp_path, model_config(mixer="motion", am_flow={"bottleneck": 4}))
    fresh = draw(model_config(mixer="motion"), LABELS, 99)
    for block in fresh["blocks"].values():
        block["mixer"]["temporal_fc"]["bias"] = np.zeros(9, np.float32)
    fresh["norm"]["bias"] = np.zeros(9, np.float32)
    with pytest.raises(UserError) as caught:
        init_from(str(tmp_path), fresh, build(model_config(mixer="motion").model, {}).spec, LABELS, print)
    assert caught.value.lines == tuple(
        f"init_from={tmp_path}: {name} is [8] there and [9] here: use the model settings of those weights"
        for name in ("blocks/*/mixer/temporal_fc/bias", "norm/bias")
    )


@pytest.mark.parametrize("changes", [dict(mlp_dim=16), dict(variant="Ti/4"), dict(heads=4), dict(width=16, depth=3)])
def test_weights_of_another_size_are_one_line_with_their_settings(tmp_path, changes):
    """Heads too, which no shape shows."""
    write_run(tmp_path, model_config())
    with pytest.raises(UserError) as caught:
        load(tmp_path, model_config(**changes))
    settings = " ".join(f"--config.model.{key}={value}" for key, value in dict(variant="Ti/8", width=8, depth=2, heads=2, mlp_dim=12).items())
    assert caught.value.lines == (f"init_from={tmp_path}: those weights are of a model of another size: set {settings}, or start from others",)


def test_a_new_class_token_has_no_position(tmp_path):
    old = write_run(tmp_path, model_config(class_token=False, pool="average"))
    found, _, lines = load(tmp_path, model_config())
    np.testing.assert_array_equal(found["embed/position"], np.concatenate([np.zeros((1, 8), np.float32), old["embed/position"]]))
    assert lines[1:3] == [
        f"init_from={tmp_path} (step 7): 1 parameters resized: embed/position",
        f"init_from={tmp_path} (step 7): 1 parameters new: embed/class_token",
    ]


@pytest.mark.parametrize("size", [16, 40])
def test_a_position_table_loses_the_row_of_a_class_token_that_is_gone(tmp_path, size):
    """MEViT's patches have no class token with them, and start from those of an image ViT."""
    old = write_run(tmp_path, model_config())
    found, fresh, lines = load(tmp_path, model_config(class_token=False, pool="average", image_size=size))
    np.testing.assert_allclose(found["embed/position"], resize_position(old["embed/position"][1:], 0, (2, 2), (size // 8,) * 2), atol=1e-6)
    assert_same(found, old, fresh.keys() - {"embed/position"})
    assert lines[1:3] == [
        f"init_from={tmp_path} (step 7): 1 parameters resized: embed/position",
        f"init_from={tmp_path} (step 7): 1 parameters unused: embed/class_token",
    ]


def test_settings_that_pretrained_parameters_rely_on_are_compared(tmp_path):
    write_run(tmp_path, model_config(gelu="tanh"))
    _, _, lines = load(tmp_path, model_config(mean=(0.4, 0.4, 0.4)))
    assert lines[1:] == [
        f"init_from={tmp_path}: model.gelu was tanh there and is exact here: is that meant?",
        f"init_from={tmp_path}: model.mean was (0.5, 0.5, 0.5) there and is (0.4, 0.4, 0.4) here: is that meant?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "asks"),
    [
        ("class_token", "last_frame", False),  # AM Flow from an image model: the same for one frame
        ("class_token", "frame_mean", False),
        ("class_token", "class_attention", False),  # MEViT: its parameters are told of as new
        ("class_token", "average", True),
        ("average", "last_frame", True),
    ],
)
def test_pools_that_read_something_else_are_asked_about(tmp_path, old, new, asks):
    write_run(tmp_path, model_config(pool=old))
    lines = load(tmp_path, model_config(pool=new))[2]
    assert any(f"model.pool was {old} there and is {new} here: is that meant?" in line for line in lines) == asks


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds neither a run"):
        load(tmp_path, model_config())
    RunFolder(tmp_path).write(model_config(), LABELS)
    with pytest.raises(UserError, match="no checkpoints there"):
        load(tmp_path, model_config())


def test_settings_of_the_weights_are_adopted_unless_set(tmp_path):
    write_run(tmp_path, model_config(gelu="tanh", norm_eps=1e-5, layer_scale=0.1, registers=2, mean=(0.1, 0.2, 0.3)))
    config = adopt(model_config(mean=(0.4, 0.4, 0.4)), open_weights(tmp_path).config)
    assert (config.model.gelu, config.model.norm_eps, config.model.layer_scale, config.model.registers) == ("tanh", 1e-5, 0.1, 2)
    assert config.model.mean == (0.4, 0.4, 0.4) and config.model.std == ()
