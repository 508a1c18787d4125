"""Every experiment that is shipped: it parses, its schema is locked, its real model can be built, and shrunk it makes a step."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.am_flow_base import FROZEN
from vidjoint import optim, validate
from vidjoint.config import as_json, base_config, difference, load, parse
from vidjoint.data.tasks import clip_spec
from vidjoint.errors import UserError
from vidjoint.models.build import build, count_parameters
from vidjoint.step import init_state, make_train_step
from vidjoint.weights.init_from import plan
from vidjoint.weights.pretrained import Pretrained, adopt, flat

FOLDER = Path(__file__).parents[1] / "configs"
FILES = [f"configs/{path.name}" for path in sorted(FOLDER.glob("*.py")) if "\ndef get_config(" in path.read_text()]
ARGUMENTS = {  # besides the default: every word that an experiment takes, at least once
    "am_flow_k400": ("lstm,8f", "transformer,32f", "tcn,24f", "no_flow", "no_encoder", "scratch", "hyperformer", "compacter", "serial", "large"),
    "am_flow_smarthome": ("transformer", "tcn", "24f", "hyperformer"),
    "am_flow_ssv2": ("transformer", "lstm,8f", "32f", "compacter", "clip", "imagenet"),
    "cover_ablations": ("kinetics", "ssv2", "mit", "kinetics+ssv2+mit,k600", "kinetics+ssv2+mit+imagenet,k700,w0.75", "standard"),
    "cover_images": ("b16",),
    "cover_in21k": ("standard", "high_res", "high_res,k600", "standard,k700", "standard,base"),
    "cover_jft": ("standard", "high_res", "high_res,k600", "standard,k700", "high_res,base"),
    "cover_transfer": ("ssv2,frozen", "k400,full", "k400,frozen,standard"),
    "iv_vit": ("separate", "images", "videos", "scratch", "images,scratch"),
    "mevit_k400": ("16f", "m1", "m2", "m3", "m7", "m14", "9+3", "10+2", "11+1", "12+1", "lt0", "lt2", "lt4", "lt8", "lt12"),
    "mevit_k600": ("8f",),
    "mevit_ssv2": ("8f",),
    "polyvit": ("task_by_task", "uniform", "weighted", "accumulated", "scratch", "k400_i21k"),
    "timesformer_k400": ("joint", "space_only", "divided,hr", "long"),
}
VARIANTS = [f"configs/{name}.py:{argument}" for name, arguments in ARGUMENTS.items() for argument in arguments]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)  # where the README's commands are run


def test_the_experiments_are_found():
    assert {f"configs/{name}.py" for name in ("demo", "real_cotrain", "findings", "finetune_folder", "vivit_k400", *ARGUMENTS)} <= set(FILES)


@pytest.mark.parametrize("file", FILES + VARIANTS)
def test_it_parses_and_can_run(file, tmp_path):
    config, name = parse([f"--config={file}"])
    assert f"configs/{name}" == file.replace(".py", "").replace(":", "_").replace(",", "_")
    assert validate.check(config) == []
    (tmp_path / "config.json").write_text(as_json(config))
    assert difference(load(tmp_path / "config.json"), config) == []
    for part in (config, config.model, config.tasks, *config.tasks.values()):
        assert part.is_locked
        with pytest.raises((AttributeError, KeyError)):
            part.no_such_key = 1
    with pytest.raises(UserError, match="there is no key no_such_key"):
        parse([f"--config={file}", "--config.no_such_key=1"])


@pytest.mark.parametrize("file", FILES)
def test_it_opens_with_its_command_and_hardware(file):
    text = Path(file).read_text()
    head = text.split('"""')[1]
    assert f"python -m vidjoint.main --config={file}" in head and "Hardware: " in head


def classes(config: ConfigDict) -> dict[str, int]:
    return {name: task.classes or 10 for name, task in config.tasks.items()}


@functools.cache
def parameters(model):
    return model.abstract()


@pytest.mark.parametrize("file", FILES + VARIANTS)
def test_its_model_can_be_built_at_full_size(file):
    config, _ = parse([f"--config={file}"])
    params = parameters(build(config.model, classes(config)))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    trained, frozen = optim.split_frozen(params, config.optim.freeze)
    print(f"{file}: {count_parameters(params) / 1e6:.2f} M parameters, {count_parameters(trained) / 1e6:.2f} M of them trained")
    assert count_parameters(trained) + count_parameters(frozen) == count_parameters(params) > 1e5


@pytest.mark.parametrize("file", FILES)
def test_shrunk_it_makes_a_step(file):
    config, _ = parse([f"--config={file}"])
    patch = build(config.model, {"a": 1}).spec.patch
    config.batch_size = 8
    config.model.update(width=16, depth=2, heads=2, mlp_dim=32, frames=2 * config.model.tubelet, image_size=2 * patch)
    config.model.mixer_blocks = config.model.mixer_blocks and (1,)
    config.model.temporal_encoder.depth = 1
    flow = config.model.am_flow
    flow.update(bottleneck=8, encoder_width=8, encoder_mlp=16, encoder_heads=2, tpu_width=8, tpu_layers=1, tpu_mlp=16, tpu_heads=2)
    for task in config.tasks.values():
        task.frames = 0
        if max(task.image_size) > 32:
            task.image_size = (0, 0)
    config.optim.lr = max(config.optim.lr, 1e-3)
    config.optim.update(warmup_steps=0, warmup_epochs=0.0)
    model = build(config.model, classes(config))
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 100, 10))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), model.abstract())
    state = jax.jit(lambda params: init_state(config, params, optimizer))(params)

    by_shape = {}
    for index, name in enumerate(sorted(config.tasks)):
        by_shape.setdefault(clip_spec(config, name).shape, []).append((index, classes(config)[name]))
    batches = []
    for shape, tasks in by_shape.items():
        task, count = np.array([tasks[i % len(tasks)] for i in range(8 // len(by_shape))], np.int32).T
        pixels = rng.integers(0, 256, (len(task), *shape), np.uint8)
        batches.append({"pixels": pixels, "label": rng.integers(0, count).astype(np.int32), "task": task, "mask": np.ones(len(task), bool)})
    after, metrics = jax.jit(make_train_step(config, model, optimizer))(state, tuple(batches))
    assert after.step == 1 and np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert sum(metrics[f"{name}/loss"][1] for name in config.tasks) == sum(len(batch["mask"]) for batch in batches)
    for name in config.tasks:
        before = state.params["heads"][name]["kernel"]
        assert (after.params["heads"][name]["kernel"] != before).any(), name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


@pytest.mark.parametrize(("argument", "frames", "side"), [("standard", 8, 224), ("high_res", 16, 448)])
@pytest.mark.parametrize("name", ["cover_jft", "cover_in21k"])
def test_cover_is_the_paper_s_recipe(name, argument, frames, side):
    """CoVeR 4.1 and tables 4 and 7."""
    config, _ = parse([f"--config=configs/{name}.py:{argument}"])
    recipe = config.optim
    assert (recipe.name, recipe.lr, recipe.momentum) == ("sgd", 5e-3, 0.9)
    assert (recipe.schedule, recipe.milestone_epochs, recipe.decay_factor) == ("step", (11, 15), 0.1)
    assert (config.total_epochs, config.batch_size, config.schedule, config.loss.reduction) == (20, 128, "mixed", "per_task")
    assert (config.model.variant, config.model.mixer, config.model.frames, config.model.image_size) == ("L/16", "divided", frames, side)
    assert config.model.divided.image_temporal == "affine" and config.eval.views == "1x3" and config.eval.reversed
    assert {task: settings.flip for task, settings in config.tasks.items()} == {"imagenet": True, "k400": True, "mit": True, "ssv2": False}
    assert {task: settings.loss_weight for task, settings in config.tasks.items()} == {"imagenet": 0.5, "k400": 1, "mit": 1, "ssv2": 1}
    assert {settings.sampler for settings in config.tasks.values()} == {"uniform"}
    assert config.init_from  # the image stage


def test_cover_s_ablations():
    """CoVeR tables 5 and 6, and the transfer of figure 3."""
    tasks = {argument: set(parse([f"--config=configs/cover_ablations.py:{argument}"])[0].tasks) for argument in ("mit", "kinetics+ssv2,k700")}
    assert tasks == {"mit": {"mit"}, "kinetics+ssv2,k700": {"k700", "ssv2"}}
    config, _ = parse(["--config=configs/cover_ablations.py:kinetics+ssv2+mit+imagenet,w0.75"])
    assert {name: task.loss_weight for name, task in config.tasks.items()} == {"k400": 1, "ssv2": 1, "mit": 1, "imagenet": 0.75}
    config, _ = parse(["--config=configs/cover_transfer.py:k400,frozen"])
    trained, _ = optim.split_frozen(parameters(build(config.model, classes(config))), config.optim.freeze)
    assert set(trained) <= {"heads", "pool"} and set(trained["heads"]) == {"k400"}
    assert (config.init_heads, config.init_from) == ("new", "runs/cover_ablations_ssv2")  # 3.2
    with pytest.raises(UserError, match="choose from"):
        parse(["--config=configs/cover_ablations.py:imagenet,w2"])
    with pytest.raises(UserError, match="weighs the loss of images, and kinetics has none"):
        parse(["--config=configs/cover_ablations.py:kinetics,w0.75"])
    assert parse(["--config=configs/cover_in21k.py:base"])[0].model.variant == "B/16"  # figure 4


@pytest.mark.parametrize(
    ("size", "frames", "stride", "side", "short_side"),
    [("base", 8, 32, 224, (256, 320)), ("hr", 16, 16, 448, (448, 512)), ("long", 96, 4, 224, (256, 320))],
)
@pytest.mark.parametrize("attention", ["divided", "joint", "space_only"])
def test_timesformer_is_the_published_recipe(attention, size, frames, stride, side, short_side):
    """TimeSformer's code: its attention, its three inputs, a window of frames x stride at 30 frames a second, and one recipe for all."""
    config, _ = parse([f"--config=configs/timesformer_k400.py:{attention},{size}"])
    assert (config.model.variant, config.model.frames, config.model.image_size) == ("B/16", frames, side)
    mixer, pool = ("none", "frame_mean") if attention == "space_only" else (attention, "class_token")
    assert (config.model.mixer, config.model.pool, config.model.drop_path) == (mixer, pool, 0.1)
    recipe = config.optim
    assert (recipe.name, recipe.lr, recipe.momentum, recipe.weight_decay, recipe.decay) == ("sgd", 5e-3, 0.9, 1e-4, "all")
    assert (recipe.schedule, recipe.milestone_epochs, recipe.decay_factor) == ("step", (11, 14), 0.1)
    assert (config.total_epochs, config.batch_size, config.loss.label_smoothing, config.loss.mixup) == (15, 64, 0, 0)
    assert (config.eval.views, config.eval.average) == ("1x3", "logits")
    (task,) = config.tasks.values()
    assert (task.classes, task.sampler, task.crop, task.short_side, task.flip) == (400, "window", "short_side", short_side, True)
    assert task.window_seconds == pytest.approx(frames * stride / 30)


def test_timesformer_is_8_frames_of_divided_attention_by_default():
    assert as_json(parse(["--config=configs/timesformer_k400.py"])[0]) == as_json(parse(["--config=configs/timesformer_k400.py:divided,base"])[0])


def test_iv_vit_is_the_paper_s_recipe():
    """IV-ViT 5.1 to 5.3 and table 1."""
    config, _ = parse(["--config=configs/iv_vit.py"])
    assert (config.schedule, config.task_order) == ("round_robin", ("tiny_imagenet", "cifar100", "ucf101", "mini_kinetics"))
    assert (config.total_steps, config.batch_size, config.model.frames) == (4 * 20_000, 6, 16)
    assert (config.model.mixer, config.model.token_shift.tokens, config.model.pool) == ("token_shift", "class", "class_token")
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay, config.optim.per_task) == ("adamw", 1e-5, 5e-5, "independent")
    assert classes(config) == {"cifar100": 100, "mini_kinetics": 200, "tiny_imagenet": 200, "ucf101": 101}
    for name, settings in config.tasks.items():
        assert settings.flip
        if name in ("tiny_imagenet", "cifar100"):
            assert (settings.media, settings.crop, settings.area, settings.aspect) == ("image", "area", (0.08, 1.0), (3 / 4, 4 / 3))
        else:
            assert (settings.sampler, settings.window_seconds, settings.crop, settings.short_side) == ("window", 2.67, "short_side", (224, 320))
    assert (config.model.token_shift.fraction, config.model.token_shift.direction) == (1 / 8, "next_first")  # their code's
    assert config.model.embed == "shared" and config.init_from
    assert parse(["--config=configs/iv_vit.py:separate"])[0].model.embed == "separate"
    assert parse(["--config=configs/iv_vit.py:scratch"])[0].init_from == ""


@pytest.mark.parametrize(("word", "names"), [("images", ("tiny_imagenet", "cifar100")), ("videos", ("ucf101", "mini_kinetics"))])
def test_iv_vit_of_one_kind_of_sets(word, names):
    """Table 1: the same 20,000 steps for each of them."""
    config, _ = parse([f"--config=configs/iv_vit.py:{word}"])
    assert set(config.tasks) == set(names) and config.task_order == names
    assert (config.total_steps, config.schedule, config.optim.per_task) == (2 * 20_000, "round_robin", "independent")


def test_polyvit_is_the_paper_s_baseline():
    """IV-ViT 5.4: 32 frames in tubelets, separate embeddings, shared blocks, 3 clips a batch."""
    config, _ = parse(["--config=configs/polyvit.py:weighted"])
    assert (config.model.embed, config.model.tubelet, config.model.frames, config.model.mixer) == ("separate", 2, 32, "joint")
    assert config.model.tubelet_init == "central_frame" and config.schedule == "weighted"
    assert {name: task.batch_size or config.batch_size for name, task in config.tasks.items()} == {
        "tiny_imagenet": 6,
        "cifar100": 6,
        "ucf101": 3,
        "mini_kinetics": 3,
    }


@pytest.mark.parametrize(
    ("schedule", "updates", "budget", "per_task"),
    [
        ("alternating", 80_000, 0, "independent"),  # trained as IV-ViT is
        ("task_by_task", 80_000, 20_000, "shared"),
        ("uniform", 80_000, 0, "shared"),
        ("weighted", 80_000, 20_000, "shared"),
        ("accumulated", 20_000, 0, "shared"),
    ],
)
def test_polyvit_s_schedules(schedule, updates, budget, per_task):
    """IV-ViT's 20,000 steps of each of four sets; `accumulated` makes one update of four batches (Likhosherstov et al. 2021, 3.3)."""
    config, _ = parse([f"--config=configs/polyvit.py:{schedule}"])
    assert (config.schedule, config.total_steps, config.optim.per_task) == (schedule, updates, per_task)
    assert set(config.tasks) == {"tiny_imagenet", "cifar100", "ucf101", "mini_kinetics"}
    assert {task.steps for task in config.tasks.values()} == {budget}
    own = {name: task.batch_size for name, task in config.tasks.items()}
    images = 6 if schedule == "accumulated" else 0  # 0: config.batch_size
    assert own == {"tiny_imagenet": images, "cifar100": images, "ucf101": 3, "mini_kinetics": 3} and config.batch_size == 6
    scratch, _ = parse([f"--config=configs/polyvit.py:{schedule},scratch"])
    assert config.init_from and scratch.init_from == "" and scratch.schedule == schedule


def test_mevit_is_the_paper_s_default():
    """MEViT 4.3: eleven self-attention blocks, the first four of space only, and one of class-attention."""
    for name, frames in (("k400", 8), ("k600", 16), ("ssv2", 16)):
        config, _ = parse([f"--config=configs/mevit_{name}.py"])
        assert (config.model.depth, config.model.mixer_blocks, config.model.frames) == (11, (4, 5, 6, 7, 8, 9, 10), frames)
        assert (config.model.mixer, config.model.motion.block, config.model.motion.order) == ("motion", 2, "time_space")
        assert (config.model.pool, config.model.class_attention.blocks, config.model.class_token) == ("class_attention", 1, False)
        assert config.eval.views == "1x3" and config.tasks[name].short_side == (256, 320)


ABLATION = {  # MEViT tables 1 to 3 -> depth, class-attention blocks (0: a class token all along), M, blocks that see time
    **{f"m{side}": (12, 0, side, 12) for side in (1, 2, 3, 7, 14)},
    **{f"{own}+{cls}": (own, cls, 2, own) for own, cls in ((9, 3), (10, 2), (11, 1), (12, 1))},
    **{f"lt{blocks}": (12, 0, 2, blocks) for blocks in (0, 2, 4, 8, 12)},
}


@pytest.mark.parametrize("word", ABLATION)
def test_mevit_s_ablations_start_from_an_image_model(word):
    depth, class_attention, side, see_time = ABLATION[word]
    config, _ = parse([f"--config=configs/mevit_k400.py:{word}"])
    small = dict(width=8, heads=2, mlp_dim=12, frames=2, image_size=32)
    model = config.model
    model.update(small)
    spec = build(model, {}).spec
    assert (spec.depth, spec.motion.block) == (depth, side)
    assert (spec.pool == "class_attention", spec.class_token) == (class_attention > 0, class_attention == 0)
    assert class_attention in (0, spec.class_attention.blocks)
    assert [block for block in range(depth) if spec.mixer == "motion" and spec.mixes(block)] == list(range(depth - see_time, depth))

    images, _ = parse(["--config=configs/cover_images.py:b16"])
    images.model.update(small, frames=1)
    params = flat(build(images.model, {}).init(jax.random.key(0)))
    weights = Pretrained("images", "vidjoint", {name: np.asarray(x) for name, x in params.items()}, images, {})
    lines = [line for line in plan(weights, build(model, {}).abstract(), spec, {}, config.init_allow).lines if line.name.startswith("blocks/")]
    blocks = {kind: {int(line.name.split("/")[1]) for line in lines if line.kind == kind} for kind in ("loaded", "unused")}
    assert blocks == {"loaded": set(range(depth)), "unused": set(range(depth, 12))}


@pytest.mark.parametrize("word", ["", "clip", "imagenet", "scratch"])
def test_am_flow_takes_the_normalisation_of_its_backbone(word):
    config, _ = parse([f"--config=configs/am_flow_ssv2.py:{word}"])
    stored = base_config()
    stored.model.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), gelu="quick")
    adopted = adopt(config, stored).model
    assert adopted.mean == ((0.485, 0.456, 0.406) if word == "scratch" else (0.1, 0.2, 0.3)) and adopted.gelu == "quick"
    assert adopted.layer_scale == (1e-5 if word == "scratch" else -1)  # from scratch, too, it is DINOv2's model


def test_am_flow_trains_what_the_paper_trains():
    """AM Flow tables 1 to 3, without the heads: nothing of the image model, and AM flow where it belongs."""
    for argument, flow, blocks in (("k400.py:lstm,8f", "aligned", ()), ("ssv2.py:tcn,24f", "aligned", ()), ("smarthome.py", "vanilla", (0, -1))):
        config, _ = parse([f"--config=configs/am_flow_{argument}"])
        assert (config.model.am_flow.flow, config.model.mixer_blocks) == (flow, blocks)
        trained, frozen = optim.split_frozen(parameters(build(config.model, classes(config))), config.optim.freeze)
        assert set(trained["blocks"]["0"]) == {"mixer"} and "embed" not in trained and "norm" not in trained
        assert count_parameters(frozen) / 1e6 == pytest.approx(85.71, rel=0.01)  # DINOv2-B/14 at 224 px


@pytest.mark.parametrize("argument", ["k400.py:lstm,8f", "ssv2.py:tcn,24f", "smarthome.py", "k400.py:large"])
def test_am_flow_freezes_whatever_an_image_model_has(argument):
    """DINOv2's LayerScale and registers, and CLIP's norm before the blocks."""
    config, _ = parse([f"--config=configs/am_flow_{argument}"])
    config.model.update(depth=2, layer_scale=1.0, registers=4, pre_norm="layer_norm")
    trained, frozen = optim.split_frozen(parameters(build(config.model, classes(config))), config.optim.freeze)
    assert set(trained) == {"blocks", "heads"} and set(frozen) == {"blocks", "embed", "norm"}
    assert {"registers", "norm"} <= set(frozen["embed"])
    for i in "01":
        assert set(trained["blocks"][i]) == {"mixer"}
        assert set(frozen["blocks"][i]) == {"norm1", "attn", "scale1", "norm2", "mlp", "scale2"}


AM_FLOW_WORDS = {  # what each word of table 4 changes
    "": {},
    "no_flow": dict(flow="none"),
    "no_encoder": dict(flow="vanilla"),
    "scratch": dict(freeze=(), init_from=""),
    "hyperformer": dict(adapter="hyperformer"),
    "compacter": dict(adapter="compacter"),
    "serial": dict(adapter="serial"),
    "large": dict(variant="L/14", init_from="checkpoints/dinov2_l14"),
    "8f": dict(frames=8),
    "24f": dict(frames=24),
    "32f": dict(frames=32),
}


@pytest.mark.parametrize(("name", "flow", "frames"), [("k400", "aligned", 8), ("ssv2", "aligned", 24), ("smarthome", "vanilla", 8)])
def test_am_flow_s_ablations_are_the_paper_s(name, flow, frames):
    default = dict(flow=flow, adapter="parallel", freeze=FROZEN, init_from="checkpoints/dinov2_b14", variant="B/14", frames=frames)
    absent = ("no_encoder", "32f") if name == "smarthome" else ()  # its flow has no encoder to leave out
    for word, changes in AM_FLOW_WORDS.items():
        if word in absent:
            continue
        config, _ = parse([f"--config=configs/am_flow_{name}.py:{word}"])
        found = {key: config.model.am_flow[key] for key in ("flow", "adapter")} | {key: config.model[key] for key in ("variant", "frames")}
        assert found | dict(freeze=config.optim.freeze, init_from=config.init_from) == default | changes, word
