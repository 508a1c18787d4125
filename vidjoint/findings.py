"""Measures a finding of the papers anew, in miniature: trains all arms of the comparison on the embedded dataset and prints them beside the paper's.

python -m vidjoint.findings NAME [--seeds=2] [--workdir=runs/findings] [--json=FILE] [--config.KEY=VALUE ...]
"""

import argparse
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from vidjoint import compare, validate
from vidjoint import config as config_module
from vidjoint.errors import UserError, command
from vidjoint.output_files import check_writable, write_json
from vidjoint.reporting import predictions
from vidjoint.run_folder import RunFolder
from vidjoint.running.stopping import Stopped
from vidjoint.weights.pretrained import adopt

EXPERIMENTS = "configs/findings.py"
STDERR = 2  # file descriptor
TIE = 0.15  # points: what differs by less in a paper says nothing of an order
HOLDS, REVERSED, UNCLEAR = "as there", "the other way", "unclear"


@dataclass(frozen=True)
class Finding:
    """What a paper says."""

    source: str  # paper, table or section
    question: str
    sets: dict[str, str]  # task -> the paper's dataset that it stands for
    arms: dict[str, dict[str, float]]  # arm -> task -> published top-1 in percent, where there is one; the others are compared with the first
    stage: str = ""  # the arm that arms with init_from start from; it has no row


FINDINGS = {
    "datasets": Finding(
        "CoVeR, table 5 (a)",
        "is a dataset learned better together with others, videos or images?",
        {"appearance": "K400", "motion": "SSv2", "digits": "ImageNet"},
        {  # `videos` is their K400+SSv2+MiT
            "all": {"appearance": 87.2, "motion": 70.8, "digits": 86.1},
            "videos": {"appearance": 87.2, "motion": 70.6},
            "appearance": {"appearance": 85.0},
            "motion": {"motion": 67.2},
        },
    ),
    "image_weight": Finding(
        "CoVeR, table 6",
        "what shall the loss of the images weigh?",
        {"appearance": "K400", "motion": "SSv2", "digits": "ImageNet"},
        {
            "w0.5": {"appearance": 87.2, "motion": 70.8, "digits": 86.1},
            "w0.0": {"appearance": 87.2, "motion": 70.6},
            "w0.75": {"appearance": 87.2, "motion": 70.6, "digits": 86.6},
        },
    ),
    "transfer": Finding(
        "CoVeR, section 3.2 and table 2",
        "do features that were learned on appearance tell motion?",
        {"motion": "SSv2"},
        {"full": {"motion": 58.8}, "frozen": {"motion": 19.5}, "scratch": {}},
        stage="source",
    ),
    "joint": Finding(
        "IV-ViT, table 1, means of the two image sets and of the two video sets",
        "are images and videos learned better together or apart, with one embedding or two?",
        {"digits": "images", "appearance": "videos", "motion": "videos"},
        {
            "shared": {"digits": 85.96, "appearance": 76.46, "motion": 76.46},
            "separate": {"digits": 86.00, "appearance": 76.03, "motion": 76.03},
            "videos": {"appearance": 80.92, "motion": 80.92},
            "images": {"digits": 85.84},
        },
    ),
    "polyvit": Finding(
        "IV-ViT, table 1, from scratch, means of the two image sets and of the two video sets",
        "frames one by one with token shift, or tubelets with joint attention?",
        {"digits": "images", "appearance": "videos", "motion": "videos"},
        {
            "iv_vit": {"digits": 29.44, "appearance": 27.17, "motion": 27.17},
            "no_shift": {},
            "polyvit": {"digits": 19.59, "appearance": 21.32, "motion": 21.32},
        },
    ),
    "motion_block": Finding(
        "MEViT, table 1",
        "how large a block shall motion attention see?",
        {"motion": "K400"},
        {"m2": {"motion": 80.2}, "m1": {"motion": 78.6}, "m4": {"motion": 77.9}},  # m4, the whole grid, is their 14
    ),
    "class_attention": Finding(
        "MEViT, tables 2 and 1",
        "how many of the blocks shall be class-attention?",
        {"motion": "K400"},
        {"sa2_ca1": {"motion": 80.5}, "sa1_ca2": {"motion": 80.3}, "sa3_ca0": {"motion": 80.2}},  # their 11+1, 10+2, and table 1's M = 2
    ),
    "top_heavy": Finding(
        "MEViT, table 3",
        "how many of the blocks shall see time?",
        {"motion": "K400"},
        {"last2": {"motion": 80.3}, "last3": {"motion": 80.2}, "last1": {"motion": 77.9}, "none": {"motion": 75.6}},  # their 8, 12, 4, 0 of 12
    ),
    "am_flow": Finding(
        "AM Flow, table 4",
        "what do flow, aligning encoder, pretraining and kind of adapter bring?",
        {"motion": "K400"},
        {
            "aligned": {"motion": 88.8},
            "vanilla": {"motion": 72.7},
            "no_flow": {"motion": 74.3},
            "scratch": {"motion": 78.3},
            "hyperformer": {"motion": 84.2},
            "serial": {},
        },
        stage="images",
    ),
}


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: RunFolder
    argv: list[str]  # of vidjoint.main
    config: ConfigDict

    @property
    def is_finished(self) -> bool:
        """Whether it has left all that the table needs, with the same settings of evaluation; its checkpoints show that it is this run."""
        there = self.folder.has_checkpoint and self.folder.results.exists() and set(self.config.tasks) <= set(predictions.tasks_in(self.folder.path))
        return there and all(self.folder.config.eval[key] == self.config.eval[key] for key in ("views", "average"))


def plan(name: str, seeds: int, workdir: Path, changes: list[str]) -> list[Run]:
    """The runs of a finding in the order in which they are made: a first stage comes before what starts from it.

    Args:
      changes: `--config.KEY=VALUE`, made in all of them.

    Raises:
      UserError: what is wrong with a run's settings, or a folder that holds another run; nothing has been written then.
    """
    if not Path(EXPERIMENTS).is_file():
        raise UserError(f"there is no {EXPERIMENTS} here: call this in the folder that has vidjoint's configs/")
    if any(change.startswith("--config.seed") for change in changes):
        raise UserError("--config.seed: each arm runs with seeds 0 to N-1: set --seeds=N")
    finding, runs, problems = FINDINGS[name], [], {}
    if finding.stage and any(change.startswith("--config.init_from") for change in changes):
        raise UserError(f"--config.init_from: the arms of {name} start from its own first stage, {finding.stage}, or from scratch: leave it out")
    for seed in range(seeds):
        for arm in (*filter(None, [finding.stage]), *finding.arms):
            argv = [f"--config={EXPERIMENTS}:{name},{arm}", *changes, f"--config.seed={seed}"]
            config, _ = config_module.parse(argv)
            if finding.stage and config.init_from:
                argv.append(f"--config.init_from={workdir / name / f'{finding.stage}_{seed}'}")
            folder = RunFolder(workdir / name / f"{arm}_{seed}")
            problems |= {f"{arm}: {line}": None for line in validate.check(config)}
            try:
                folder.check(adopt(config, folder.config) if folder.has_checkpoint else config, {})
            except UserError as error:
                problems |= dict.fromkeys(error.lines)
            runs.append(Run(arm, seed, folder, [*argv, f"--workdir={folder.path}"], config))
    configs = {run.arm: run.config for run in runs if run.seed == 0 and run.arm in finding.arms}
    first = next(iter(configs))
    if same := [arm for arm in configs if arm != first and not config_module.difference(configs[first], configs[arm])]:
        problems[f"{', '.join(same)}: the same as {first} with these settings: leave out the --config.KEY that the arms differ in"] = None
    if problems:
        raise UserError(*problems)
    return runs


def train(argv: list[str]) -> int:
    """Calls vidjoint.main in a process of its own, whose output goes to standard error, and returns its exit status.

    SIGTERM is passed on, Ctrl-C reaches it by itself: it saves and ends, and the status is that of a run that was stopped.
    """
    asked, process = [], None

    def stop(number, frame):
        asked.append(number)
        if number == signal.SIGTERM and process:
            process.terminate()

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen([sys.executable, "-m", "vidjoint.main", *argv], stdout=STDERR)
        if signal.SIGTERM in asked:  # it came while the process was started
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return Stopped.exit_status if asked else status


def measured(name: str, runs: list[Run]) -> dict:
    """What the finished runs of a finding say.

    Returns:
      {"finding", "source", "seeds", "arms": {ARM: {TASK: {"top1": of each seed, "mean", "spread": standard deviation over seeds or None,
      "difference": of the mean to the first arm's or None, "interval": of it at 95 %, "seed_differences", "paper", "paper_difference", "verdict"}}},
      "verdict"}; shares in 0..1, the paper's figures too.

    Raises:
      UserError: predictions can't be read, or are not of the same examples.
    """
    finding, arms = FINDINGS[name], {}
    found = {}  # (arm, task) -> predictions of each seed
    for run in runs:
        for task in finding.sets if run.arm in finding.arms else ():
            if task in run.config.tasks:
                found.setdefault((run.arm, task), []).append(predictions.read(predictions.file_of(run.folder.path, task)))
    first = next(iter(finding.arms))
    for (arm, task), own in found.items():
        top1, published = [float(one.correct.mean()) for one in own], finding.arms[arm].get(task)
        row = {"top1": top1, "mean": statistics.mean(top1), "spread": statistics.stdev(top1) if len(top1) > 1 else None}
        row |= dict.fromkeys(("difference", "interval", "seed_differences", "paper", "paper_difference", "verdict"))
        row["paper"] = None if published is None else published / 100
        if arm != first:
            pairs = [compare.compare(base, one) for base, one in zip(found[first, task], own, strict=True)]
            totals = (sum(pair[key] for pair in pairs) for key in ("only_a", "only_b", "n"))
            row["seed_differences"] = [pair["difference"] for pair in pairs]
            row |= {"difference": statistics.mean(row["seed_differences"]), "interval": list(compare.bootstrap(*totals))}
            if published is not None and task in finding.arms[first]:
                row["paper_difference"] = (published - finding.arms[first][task]) / 100
                row["verdict"] = verdict(row)
        arms.setdefault(arm, {})[task] = row
    result = {"finding": name, "source": finding.source, "seeds": len({run.seed for run in runs}), "arms": arms}
    return result | {"verdict": order([(arm, task, row["verdict"]) for arm, tasks in arms.items() for task, row in tasks.items() if row["verdict"]])}


def verdict(row: dict) -> str | None:
    """Whether an arm differs from the first one as in the paper: clear of chance among examples, and with every seed. None: a tie there."""
    if abs(row["paper_difference"]) * 100 < TIE:
        return None
    (low, high), seeds = row["interval"], row["seed_differences"]
    ahead, behind = low > 0 and min(seeds) > 0, high < 0 and max(seeds) < 0
    return UNCLEAR if not ahead and not behind else HOLDS if ahead == (row["paper_difference"] > 0) else REVERSED


def order(comparisons: list[tuple[str, str, str]]) -> str:
    """The verdicts of all (arm, task, verdict) in one line."""
    hold, total = sum(said == HOLDS for _, _, said in comparisons), len(comparisons)
    if not total:
        return "the paper has no figures to compare with"
    if reverse := [f"{arm} ({task})" for arm, task, said in comparisons if said == REVERSED]:
        return f"the paper's order does not hold: {', '.join(reverse)} the other way; {hold} of {total} comparisons as there"
    if hold == total:
        return f"the paper's order holds, in all {total} comparisons" if total > 1 else "the paper's order holds"
    return f"within the spread of seeds and examples; {hold} of {total} comparisons clear, and as there"


def table(result: dict) -> str:
    """For people, and as Markdown: a row for each arm and task."""
    finding = FINDINGS[result["finding"]]
    rows = [("arm", "task", "top-1", "difference", "95 % interval", "paper", "difference", "here")]
    for arm, tasks in result["arms"].items():
        for task in filter(tasks.__contains__, finding.sets):
            row = tasks[task]
            spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
            interval = " to ".join(map(_points, row["interval"])) if row["interval"] else "-"
            paper = "-" if row["paper"] is None else f"{100 * row['paper']:.1f} ({finding.sets[task]})"
            ours, theirs = (_points(row[key]) for key in ("difference", "paper_difference"))
            rows.append((arm, task, f"{100 * row['mean']:.1f}{spread}", ours, interval, paper, theirs, row["verdict"] or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    name, seeds = result["finding"], "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    return "\n".join([f"{name}: {finding.question} ({finding.source}; {seeds})", "", *lines, "", f"{name}: {result['verdict']}"])


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f}"


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.findings",
        usage="%(prog)s [NAME] [--seeds=N] [--workdir=DIR] [--json=FILE] [--config.KEY=VALUE ...]",
        description=__doc__.partition("\n")[0],
        epilog=f"Every arm is an experiment of {EXPERIMENTS}, trained by vidjoint.main in DIR/NAME/ARM_SEED; what is finished there is not repeated, "
        "so the same command goes on after an interruption, and with more seeds adds those. The table has a row for each arm and task: top-1 in "
        "percent, mean and standard deviation over the seeds; difference to the first arm in points, with vidjoint.compare's paired interval over "
        f"the examples of all seeds; the paper's figure and difference. '{HOLDS}': the interval and every seed lie on the paper's side of zero; "
        f"'{REVERSED}': on the other; '{UNCLEAR}': neither. Differences below {TIE} points in the paper are not judged. Exit status: 0 done, "
        f"whatever the verdict; 2 something is to be mended; {Stopped.exit_status} stopped and saved: the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the finding; without it, all are listed")
    parser.add_argument("--list", action="store_true", help="list the findings")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds per arm (default: 2; with 1 there is no spread over seeds)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/findings"), metavar="DIR", help="where the runs go (default: runs/findings)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--config.KEY", dest="key", metavar="VALUE", help="sets a key in every run, as in --config.optim.lr=1e-3")
    args, changes = parser.parse_known_args(argv)
    wrong = [f"unknown argument {word}: see --help" for word in changes if not word.startswith("--config.")]
    if args.name and args.name not in FINDINGS:
        wrong.append(f"there is no finding {args.name}: choose from {', '.join(FINDINGS)}")
    if args.seeds < 1:
        wrong.append(f"--seeds={args.seeds} must be at least 1")
    if args.workdir.exists() and not args.workdir.is_dir():
        wrong.append(f"--workdir={args.workdir} is not a folder: name one")
    if wrong:
        raise UserError(*wrong)
    if args.list or not args.name:
        width = max(map(len, FINDINGS))
        print("\n".join(f"{name:<{width}}  {finding.question} ({finding.source})" for name, finding in FINDINGS.items()))
        return 0
    check_writable(args.json)
    runs = plan(args.name, args.seeds, args.workdir.expanduser(), changes)
    for number, run in enumerate(runs, 1):
        if run.is_finished:
            continue
        print(f"run {number} of {len(runs)}: {args.name}, {run.arm}, seed {run.seed}", file=sys.stderr, flush=True)
        status = train(run.argv)
        if status == Stopped.exit_status:
            print("stopped: the same command goes on", file=sys.stderr)
            return status
        if status:
            raise UserError(f"{run.folder.path}: the run ended with status {status}: mend what it says above, and the same command goes on")
    result = measured(args.name, runs)
    print(table(result))
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
