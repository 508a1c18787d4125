"""Says whether one run is better than another, example by example: difference in top-1 with its confidence interval, and where it comes from.

python -m vidjoint.compare RUN_A RUN_B [--task=NAME] [--json=FILE]
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from vidjoint.errors import UserError, command, printable
from vidjoint.output_files import check_writable, write_json
from vidjoint.reporting import predictions
from vidjoint.reporting.predictions import Predictions
from vidjoint.reporting.results import percent

RESAMPLES = 10_000
SEED = 0  # of the resamples: the same files give the same interval
SHOWN = 5  # classes that gain or lose most


def compare(a: Predictions, b: Predictions) -> dict:
    """Compares two models on the same examples.

    Returns:
      {"n", "top1_a", "top1_b", "difference": B less A, "interval": [low, high] of it at 95 %, "only_a", "only_b": examples that one alone has right,
      "p": McNemar's exact p, "per_class": [{"label", "examples", "top1_a", "top1_b", "difference"}, biggest gain first]}; shares in 0..1. In
      multilabel tasks an example counts as right if its best class is one of its labels, and has no part in `per_class`.

    Raises:
      UserError: the examples are not the same.
    """
    right_a, right_b = a.correct, b.correct[matched(a, b)]
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    result = {"n": len(right_a), "top1_a": _mean(right_a), "top1_b": _mean(right_b), "difference": (only_b - only_a) / len(right_a)}
    result |= {"interval": list(bootstrap(only_a, only_b, len(right_a))), "only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}
    rows = defaultdict(list)
    for i, labels in enumerate(a.labels if not a.multilabel else ()):
        rows[labels[0]].append(i)
    classes = [(label, len(own), _mean(right_a[own]), _mean(right_b[own])) for label, own in rows.items()]
    classes = [dict(zip(("label", "examples", "top1_a", "top1_b", "difference"), (*row, row[3] - row[2]), strict=True)) for row in classes]
    return result | {"per_class": sorted(classes, key=lambda row: -row["difference"])}


def matched(a: Predictions, b: Predictions) -> np.ndarray:
    """For each example of `a`, its row in `b`: same path, from the folder that all paths of a run share, and same label.

    Raises:
      UserError: the two have not the same examples.
    """
    keys = [list(zip(_relative(side.paths), (tuple(sorted(labels)) for labels in side.labels), strict=True)) for side in (a, b)]
    rows_a, rows_b = (sorted(range(len(side)), key=side.__getitem__) for side in keys)
    ordered_a, ordered_b = [keys[0][i] for i in rows_a], [keys[1][i] for i in rows_b]
    if ordered_a != ordered_b:
        odd = sorted(set(ordered_a) ^ set(ordered_b)) or [("", ())]
        path, labels = odd[0]
        raise UserError(
            f"the runs were not evaluated on the same examples ({len(a.paths)} and {len(b.paths)}; {path} with {'|'.join(labels)} is not in both): "
            "evaluate both on one list by vidjoint.evaluate --data=CSV --predictions=FOLDER, and compare the folders"
        )
    order = np.empty(len(rows_a), int)
    order[rows_a] = rows_b
    return order


def bootstrap(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95 % percentile interval of the difference in top-1, from paired resamples of the n examples.

    Each example adds -1, 0 or 1 to the difference, so a resample is a draw of three counts from a multinomial distribution.
    """
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    counts = np.random.default_rng(SEED).multinomial(n, shares, RESAMPLES)  # [resamples, 3]
    low, high = np.percentile((counts[:, 1] - counts[:, 0]) / n, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test: how likely so uneven a split is if each example that one run alone has right were a toss-up."""
    n, term, total = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        total += term
        term = term * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * total / 2**n)


def table(name: str, result: dict) -> str:
    """A comparison for people."""
    low, high = result["interval"]
    verdict = "no clear difference" if low <= 0 <= high else "B is better" if low > 0 else "A is better"
    lines = [
        f"{name}: {result['n']:,} examples",
        f"  top-1       A {percent(result['top1_a'])}, B {percent(result['top1_b'])}",
        f"  difference  {_points(result['difference'])} points, 95 % interval {_points(low)} to {_points(high)}: {verdict}",
        f"  only A right {result['only_a']:,}, only B right {result['only_b']:,}, McNemar's exact p {result['p']:.2g}",
    ]
    rows = result["per_class"]
    shown = [row for row in [*rows[:SHOWN], *rows[SHOWN:][-SHOWN:]] if row["difference"]]
    if shown:
        lines.append(f"  {'class':<32} {'examples':>8} {'A':>8} {'B':>8} {'B - A':>7}")
    for row in shown:
        shares = f"{percent(row['top1_a']):>8} {percent(row['top1_b']):>8} {_points(row['difference']):>7}"
        lines.append(f"  {printable(row['label']):<32} {row['examples']:>8,} {shares}")
    return "\n".join(lines)


def _relative(paths: tuple[str, ...]) -> list[str]:
    folders = {os.path.dirname(path) for path in paths}
    shared = os.path.commonpath(folders) if folders and len({os.path.isabs(folder) for folder in folders}) == 1 else ""
    return [path[len(shared) :].lstrip("/") for path in paths]


def _mean(right: np.ndarray) -> float:
    return float(right.mean())


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.compare",
        description=__doc__.partition("\n")[0],
        epilog=f"The interval is a paired bootstrap's ({RESAMPLES:,} resamples of the examples, seeded): it says how much the difference hangs on "
        "which examples happened to be in the validation split, not on the seed of training. The JSON file holds "
        '{TASK: {"n", "top1_a", "top1_b", "difference", "interval": [low, high], "only_a", "only_b", "p", "per_class": [..]}}, shares in 0..1.',
    )
    parser.add_argument(
        "a", metavar="RUN_A", help="folder of a finished run, or any with predictions_TASK.csv (vidjoint.evaluate --predictions=FOLDER)"
    )
    parser.add_argument("b", metavar="RUN_B", help="likewise")
    parser.add_argument("--task", metavar="NAME", help="compare this task only (default: all that both have)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args(argv)
    check_writable(args.json)
    problems, there = [], []
    for folder in (args.a, args.b):
        names = predictions.tasks_in(folder)
        there.append(names)
        if not Path(folder).is_dir():
            problems.append(f"{folder} is no folder: name the --workdir of a training run")
        elif not names or (args.task and args.task not in names):
            what = f"predictions_{args.task}.csv" if args.task else "predictions of any task"
            problems.append(f"{folder} has no {what}: python -m vidjoint.evaluate --workdir={folder} --predictions={folder}")
    tasks = [args.task] if args.task else sorted(set(there[0]) & set(there[1]))
    if not problems and not tasks:
        problems.append(f"{args.a} has {', '.join(there[0])}, {args.b} has {', '.join(there[1])}: there is no task that both have")
    if problems:
        raise UserError(*problems)
    results = {}
    for name in tasks:
        a, b = (predictions.read(predictions.file_of(folder, name)) for folder in (args.a, args.b))
        if not a.paths or not b.paths:
            raise UserError(f"{name}: a run has no predictions of any example")
        try:
            results[name] = compare(a, b)
        except UserError as error:
            raise UserError(*(f"{name}: {line}" for line in error.lines)) from None
    print(f"A: {args.a}\nB: {args.b}")
    print("\n".join(table(name, result) for name, result in results.items()))
    write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
