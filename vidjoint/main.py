"""Trains and evaluates an experiment; goes on where an earlier run in the same folder stopped.

python -m vidjoint.main --config=configs/demo.py [--workdir=DIR] [--config.optim.lr=1e-3 ...]
"""

import argparse
import logging
import sys
from pathlib import Path

from vidjoint.machine import host_memory

if __name__ == "__main__":
    host_memory.keep()  # it starts this command again, so before the imports that take seconds

import jax

from vidjoint import config as config_module
from vidjoint import sharding, validate
from vidjoint.errors import UserError, command
from vidjoint.evaluate import table
from vidjoint.machine import cpu, processes
from vidjoint.train import Stopped, train

STOPPED = Stopped.exit_status


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.main",
        usage="%(prog)s --config=FILE[:ARGUMENT] [--workdir=DIR] [--config.KEY=VALUE ...] [--force_config]",
        description=__doc__.partition("\n")[0],
        epilog="Exit status: 0 done; 2 something is to be mended, and the lines on standard error say what; "
        f"{STOPPED} stopped by SIGTERM or Ctrl-C and saved, {processes.LOST} another process of the run was lost: the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE[:ARGUMENT]", help="experiment, as in configs/demo.py or configs/cover_jft.py:high_res")
    parser.add_argument("--workdir", metavar="DIR", help="where checkpoints, logs and results go (default: runs/NAME_OF_THE_EXPERIMENT)")
    parser.add_argument(
        "--config.KEY",
        dest="key",
        metavar="VALUE",
        help="sets a key of the experiment, as in --config.optim.lr=1e-3, --config.tasks.digits.flip=False or --config.data_root=/data; "
        f"all keys are explained in {config_module.__file__}",
    )
    parser.add_argument("--force_config", action="store_true", help="go on with the run in DIR although its settings were others")
    processes.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    if args.workdir == "":
        raise UserError("--workdir= is empty (a variable that is not set?): name a folder, or leave it out")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    logging.getLogger("jax").setLevel(logging.WARNING)  # which backends it tried is no news
    config, name = config_module.parse([f"--config={args.config or ''}", *rest], validate.check)
    sharding.keep_compiled()
    if args.num_processes is None:
        cpu.set_up(config)
    try:
        with processes.joined(args):
            results = train(config, args.workdir or Path("runs") / name, args.force_config)
            if jax.process_index() == 0:
                print(table(results))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
