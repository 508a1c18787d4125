"""Measures an experiment on this machine: its model, its training step, its input pipeline.

python -m vidjoint.benchmark --config=configs/demo.py [--what=model,memory,compile,step,attention,data,decode,peer] [--steps=N] [--json=FILE]
python -m vidjoint.benchmark --config=configs/cover_jft.py:high_res --topology=v5e:16x16     compiles the training step for TPUs, without one
"""

import argparse
import importlib.metadata
import sys

from vidjoint.machine import host_memory

if __name__ == "__main__":
    host_memory.keep()  # as vidjoint.main does

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import config as config_module
from vidjoint import validate
from vidjoint.errors import UserError, command
from vidjoint.machine import cpu
from vidjoint.models.layers import ATTENTIONS
from vidjoint.output_files import check_writable, write_json
from vidjoint.sharding import memory_errors
from vidjoint.speed import topology, training
from vidjoint.speed.against_peer import measure_peer
from vidjoint.speed.attention import measure_attention
from vidjoint.speed.decoding import measure_decode
from vidjoint.train import MEMORY_ADVICE, prepare
from vidjoint.weights.pretrained import adopt, open_weights

PARTS = {
    "model": "parameters and operations; needs no data",
    "memory": "what the gradient of one clip needs, compiled but not run; needs no data",
    "compile": "how long the training step takes to compile",
    "step": "the training step and the forward pass, on batches that are on the device",
    "attention": "each kind of attention in the blocks by itself, made of products or, on an NVIDIA GPU, by cuDNN (model.attention); needs no data",
    "data": "the input pipeline alone, and how much of a training run waits for it",
    "decode": "clips/s of this package, and of decord and torchcodec where they are installed, on files of the experiment",
    "peer": "the training step and the forward pass against Hugging Face's TimeSformer in PyTorch, on CPUs; needs no data",
}
DEFAULT = "model,step,data"
TEXTS = {  # the figures for people: what they are, and how they are written
    "params": ("parameters", "{:,}"),
    "trainable_params": ("of them trained", "{:,}"),
    "macs_per_view": ("multiply-accumulates of one view of its largest clip", "{}"),
    "view": ("frames x height x width of that view", "{}"),
    "gradient_temp_bytes": ("memory for the gradient of that view, bytes beside the parameters", "{}"),
    "compile_s": ("compiling the step, s", "{:.1f}"),
    "trace_s": ("of that in Python, s", "{:.1f}"),
    "step_argument_bytes": ("memory for state and batches, bytes on a device", "{}"),
    "step_temp_bytes": ("memory for what the step keeps meanwhile, bytes on a device", "{}"),
    "train_clips_per_s": ("training, clips and images per second", "{:,.1f}"),
    "forward_clips_per_s": ("forward only", "{:,.1f}"),
    "ms_per_step": ("one training step, ms", "{:,.1f}"),
    "train_flops_per_s": ("FLOP/s of training", "{}"),
    "matmul_peak_flops_per_s": ("FLOP/s of large matrix products", "{}"),
    "mfu": ("share of that reached (MFU)", "{:.1%}"),
    "peak_bytes": ("memory of one device at its peak, bytes", "{}"),
    "peak_bytes_from": ("as told by", "{}"),
    "examples": ("clips of the largest size at once", "{:,}"),
    "pipeline_clips_per_s": ("decoding alone, clips and images per second", "{:,.1f}"),
    "run_clips_per_s": ("training with decoding beside it", "{:,.1f}"),
    "wait_share": ("share of training that waits for data", "{:.1%}"),
    "training_steps": ("measured over so many steps", "{:,}"),
    "host_bytes_begin": ("memory of the host from 10 to 20 % of them, bytes", "{}"),
    "host_bytes_end": ("over the last 10 %", "{}"),
    "task": ("files of the task", "{}"),
    "files": ("how many", "{}"),
    "peer": ("against TimeSformer of", "{}"),
    "peer_params": ("its parameters", "{:,}"),
    "train_s": ("a training step here, s", "{:.3f}"),
    "peer_train_s": ("there, s", "{:.3f}"),
    "train_ratio": ("times as fast here, median of the rounds", "{:.2f}"),
    "forward_s": ("a forward pass here, s", "{:.3f}"),
    "peer_forward_s": ("there, s", "{:.3f}"),
    "forward_ratio": ("times as fast here, median of the rounds", "{:.2f}"),
}
TOPOLOGY = "v4, v5e, v5p or v6e, and a size as in v5e:16x16: compile the training step for these TPUs, without one and without data (extra tpu)"
READERS = ("vidjoint", "decord", "torchcodec_exact", "torchcodec_approximate")
FORMULA = """MFU = FLOP/s of training / FLOP/s of large matrix products, measured here in the model's dtype (times the devices;
not on CPUs, whose devices share the cores). FLOPs of a step = 2 x the MACs of its matrix products and convolutions on paper: those of the
forward pass three times, fewer where parameters are frozen; what model.remat computes again does not count. Rates are medians of 5 rounds
after a warm-up. Any key of the experiment can be set by --config.KEY=VALUE."""


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.benchmark",
        usage="%(prog)s --config=FILE[:ARGUMENT] [--what=PARTS] [--steps=N] [--gops=N,N] [--topology=CHIP:SIZE] [--json=FILE] [--config.KEY=VALUE]",
        description=__doc__.partition("\n")[0],
        epilog=FORMULA,
        allow_abbrev=False,
    )
    what = "; ".join(f"{part}: {text}" for part, text in PARTS.items()).replace("%", "%%")
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="experiment, as in configs/demo.py; its data must be there")
    parser.add_argument("--what", default=DEFAULT, metavar="PARTS", help=f"comma-separated (default: %(default)s). {what}")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="training steps of `data` (default: %(default)s; 2000 show whether memory grows)"
    )
    parser.add_argument(
        "--gops", default="", metavar="N,N", help="`decode`: first write the files anew, with a keyframe every N frames, 10 s of 340 x 256"
    )
    parser.add_argument("--topology", metavar="CHIP:SIZE", help=TOPOLOGY)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args, rest = parser.parse_known_args(argv)
    parts, gops = args.what.split(","), args.gops.split(",") if args.gops else []
    problems = [f"--what={part}: choose from {', '.join(PARTS)}" for part in parts if part not in PARTS]
    problems += ["--steps must be at least 1"] * (args.steps < 1)
    problems += [f"--gops={args.gops}: write numbers of frames, as in --gops=12,30,250"] * any(not gop.isdigit() or gop == "0" for gop in gops)
    if problems:
        raise UserError(*problems)
    check_writable(args.json)
    config, _ = config_module.parse([f"--config={args.config}", *rest], validate.check)
    if args.topology:
        config, notes = with_weights(config)
        figures = {"jax": jax.__version__} | topology.measure_topology(config, args.topology)
        print("\n".join([*notes, topology.as_table(figures)]))
        write_json(args.json, figures)
        return 0
    cpu.set_up(config)
    setup = prepare(config) if {"compile", "step", "data"} & set(parts) else None
    config, notes = (setup.config, []) if setup else with_weights(config)
    figures = {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__, "dtype": config.model.dtype}
    figures |= {"av": importlib.metadata.version("av")} if "decode" in parts else {}
    print("\n".join([", ".join([figures["device"], f"jax {jax.__version__}", config.model.dtype]), *notes]), flush=True)
    compiled = None

    def steps() -> training.Steps:
        nonlocal compiled
        compiled = compiled or training.Steps(setup)
        return compiled

    measures = {
        "model": lambda: training.measure_model(config),
        "memory": lambda: training.measure_memory(config),
        "compile": lambda: steps().measure_compile(),
        "step": lambda: steps().measure_step(),
        "attention": lambda: measure_attention(config),
        "data": lambda: training.measure_data(setup, steps(), args.steps),
        "decode": lambda: measure_decode(config, tuple(map(int, gops))),
        "peer": lambda: measure_peer(config),
    }
    chosen = [part for part in PARTS if part in parts]
    with memory_errors(MEMORY_ADVICE), tqdm(total=len(chosen), disable=None, leave=False, bar_format="measuring {desc} ({n} of {total} done)") as bar:
        for part in chosen:
            bar.set_description_str(part)
            figures[part] = measures[part]()
            bar.update()
            bar.write("\n".join(as_rows(part, figures[part])))
    write_json(args.json, figures)
    return 0


def with_weights(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """The config with the settings that come with `init_from`, as `train.prepare` has it; where that can't be opened, without, and a line says so.

    Raises:
      UserError: the two don't go together.
    """
    notes = []
    if config.init_from:
        try:
            config = adopt(config, open_weights(config.init_from).config)
        except UserError as error:
            notes = [f"without the settings that come with init_from={config.init_from}: {error.lines[0]}"]
    if problems := validate.check(config):
        raise UserError(*problems)
    return config, notes


def as_rows(part: str, figures: dict) -> list[str]:
    """The lines of the table that show the figures of one part."""
    rows = [(TEXTS[key][0], as_text(key, value)) for key, value in figures.items() if key in TEXTS]
    if part == "decode":
        there = [reader for reader in READERS if f"{reader}_clips_per_s" in figures["rows"][0]]
        rows.append(("clips per second and core:", ", ".join(there)))
        for row in figures["rows"]:
            text = f"  GOP {row['gop']}, {row['frames']} frames, {row['size']}"
            rows.append((text, "".join(f"{row[f'{reader}_clips_per_s']:9.2f}" for reader in there)))
    if part == "attention":
        rows.append(("cuDNN's flash attention", "timed where it fits" if figures["cudnn"] else "not on this device: it takes an A100 or newer"))
    for row in figures["rows"] if part == "attention" else ():
        text = "{calls} x {sequences:,} sequences, {queries} of {keys} tokens, {heads} heads of {channels}".format(**row)
        rows.append((text, "ms forward, with gradients"))
        for how in [how for how in ATTENTIONS if f"{how}_train_ms" in row]:
            rows.append((f"  {how}", "".join(f"{row[f'{how}_{what}_ms']:10.3f}" for what in ("forward", "train"))))
    return [f"{part if i == 0 else '':<8} {text:<62} {value:>14}" for i, (text, value) in enumerate(rows)]


def as_text(key: str, value: float | str | None) -> str:
    """A figure as the table shows it, large ones in M, G or T."""
    if value is None:
        return "unknown"
    text = TEXTS[key][1]
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if text == "{}" and not isinstance(value, str) and value >= size:
            return f"{value / size:,.2f} {unit}"
    return text.format(value)


if __name__ == "__main__":
    sys.exit(main())
