"""The optimiser: config -> learning-rate schedule and optax chain, the split of parameters into trained and frozen, and their moving average.

Parameters are nested dicts with string keys; a parameter's name is its path, as in `blocks/3/attn/qkv/kernel`.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import optax

from vidjoint.errors import UserError

SCHEDULES = ("cosine", "step", "constant")
OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("matrices", "all")
UNDECAYED = {"bias", "scale", "token", "tokens", "position", "positions", "time"}  # words in the last part of a parameter's name


def make_schedule(optim, total_steps: int, steps_per_epoch: float):
    """Returns the learning rate as a function of how many updates were made before, for `config.optim`.

    With W warm-up steps the rate is lr * min(step / W, 1) * f(step), so the first update of a warm-up has the rate zero. f is
      cosine: (1 + cos(pi * (step - W) / (total_steps - W))) / 2, one during the warm-up, zero from total_steps on (arXiv:1608.03983, eq. 5);
      step: decay_factor ** (number of milestones <= step), milestones being counted from the start of the run, warm-up included;
      constant: one.

    Args:
      optim: `config.optim`; a duration in epochs is rounded to the nearest step.
      total_steps: length of the run in updates.
      steps_per_epoch: updates in one pass over the union of the training sets.

    Returns:
      int32[] -> float32[], traceable.

    Raises:
      UserError: unknown schedule, a duration given in steps and in epochs, a step schedule without (rising) milestones, a warm-up that fills the run.
    """
    warmup = optim.warmup_steps or round(optim.warmup_epochs * steps_per_epoch)
    milestones = tuple(optim.milestone_steps) or tuple(round(m * steps_per_epoch) for m in optim.milestone_epochs)
    given = tuple(optim.milestone_steps) or tuple(optim.milestone_epochs)  # as written: two epochs may round to the same step

    problems = []
    if optim.schedule not in SCHEDULES:
        problems.append(f"optim.schedule={optim.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    if optim.lr < 0:
        problems.append(f"optim.lr={optim.lr} is negative: give the peak learning rate, as in 1e-3")
    if optim.warmup_steps and optim.warmup_epochs:
        problems.append(f"both optim.warmup_steps={optim.warmup_steps} and optim.warmup_epochs={optim.warmup_epochs} are given: set one of them to 0")
    if optim.milestone_steps and optim.milestone_epochs:
        problems.append("both optim.milestone_steps and optim.milestone_epochs are given: set one of them to ()")
    if optim.warmup_steps < 0 or optim.warmup_epochs < 0:
        problems.append("the warm-up is negative: set optim.warmup_steps or optim.warmup_epochs to 0 or more")
    elif warmup and warmup >= total_steps:
        lower = "optim.warmup_steps" if optim.warmup_steps else "optim.warmup_epochs"
        problems.append(f"the warm-up ({warmup} steps) is not shorter than the run ({total_steps} steps): lower {lower} or train longer")
    if optim.schedule == "step":
        if not given:
            problems.append("optim.schedule='step' needs milestones: set optim.milestone_steps or optim.milestone_epochs")
        elif given[0] <= 0 or any(later <= earlier for earlier, later in itertools.pairwise(given)):
            problems.append(f"milestones {given} must be above 0 and rise: put them in order")
    if problems:
        raise UserError(*problems)

    def cosine(step):
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))

    def steps(step):
        factor = jnp.float32(1)
        for passed, milestone in enumerate(milestones, start=1):
            factor = jnp.where(step >= milestone, optim.decay_factor**passed, factor)
        return factor

    factor = {"cosine": cosine, "step": steps, "constant": jnp.ones_like}[optim.schedule]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)  # whole numbers are exact up to 2^24
        warm = jnp.minimum(step / warmup, 1) if warmup else 1.0
        return optim.lr * warm * factor(step)

    return schedule


def make_optimizer(optim, schedule) -> optax.GradientTransformation:
    """Returns the optax chain for `config.optim`: clipping, then the update of the named optimiser.

    It sees the trainable parameters alone (`split_frozen`), so the global norm is theirs and frozen ones have no optimiser state.
      sgd: g = clip(gradient) + weight_decay * p;  v = momentum * v + g;  p -= lr * v, or lr * (g + momentum * v) with Nesterov's momentum.
      adamw: p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), with the moments of the clipped gradient (arXiv:1711.05101, algorithm 2).
    The decay is multiplied by the learning rate in both, as PyTorch does it.

    Args:
      optim: `config.optim`.
      schedule: int32[] -> float32[], the learning rate.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    problems = []
    if optim.name not in OPTIMIZERS:
        problems.append(f"optim.name={optim.name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    if optim.decay not in DECAYS:
        problems.append(f"optim.decay={optim.decay!r} is unknown: choose one of {', '.join(DECAYS)}")
    for key in ("weight_decay", "clip_norm"):
        if optim[key] < 0:
            problems.append(f"optim.{key}={optim[key]} is negative: set it to 0 (off) or above")
    if optim.name == "sgd" and not 0 <= optim.momentum < 1:
        problems.append(f"optim.momentum={optim.momentum} must be at least 0 and below 1")
    if optim.name == "sgd" and optim.nesterov and not optim.momentum:
        problems.append("optim.nesterov needs momentum: set optim.momentum above 0 or optim.nesterov to False")
    if optim.name == "adamw" and not (len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)):
        problems.append(f"optim.betas={optim.betas} must be two numbers of at least 0 and below 1")
    if not 0 <= optim.ema < 1:
        problems.append(f"optim.ema={optim.ema} must be at least 0 (off) and below 1")
    if problems:
        raise UserError(*problems)

    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(optim.weight_decay, mask=lambda params: decay_mask(params, optim.decay))
    scale = optax.scale_by_learning_rate(schedule)
    if optim.name == "sgd":
        momentum = optax.trace(optim.momentum, nesterov=optim.nesterov) if optim.momentum else optax.identity()
        return optax.chain(clip, decay, momentum, scale)
    adam = optax.scale_by_adam(*optim.betas, eps=optim.eps)
    return optax.chain(clip, adam, decay, scale)


def decay_mask(params, decay: str):
    """Returns which parameters decay, as a tree of bool.

    Args:
      params: nested dict of arrays or of their shapes.
      decay: "all"; or "matrices", that is what has two dimensions or more and is no bias, no norm scale, no token and no position or time table.
    """

    def decays(path, leaf) -> bool:
        words = set(_name(path).rpartition("/")[-1].split("_"))
        return decay == "all" or (leaf.ndim >= 2 and not words & UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, params)


def split_frozen(params: dict, patterns) -> tuple[dict, dict]:
    """Splits parameters into what is trained and what stays as it is; `join` undoes it.

    Only the first part is differentiated, clipped and given to the optimiser, so that a frozen parameter costs neither compute nor memory.

    Args:
      params: nested dict with string keys, of arrays, shapes or anything else that is no dict.
      patterns: regular expressions (`config.optim.freeze`); a parameter is frozen if one of them matches the whole of its name.

    Returns:
      (trainable, frozen): nested dicts that share no parameter.

    Raises:
      UserError: a pattern is no regular expression or matches no parameter, or nothing is left to train.
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    problems, compiled = [], []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            problems.append(f"optim.freeze: {pattern!r} is no regular expression ({error})")
            continue
        if not any(compiled[-1].fullmatch(name) for name in names):
            starts = ", ".join(sorted({name.partition("/")[0] for name in names}))
            problems.append(f"optim.freeze: {pattern!r} matches no parameter: it must match a whole name such as {names[0]!r} (starts: {starts})")
    if names and all(any(pattern.fullmatch(name) for pattern in compiled) for name in names):
        problems.append("optim.freeze: every parameter is frozen and nothing is left to train: freeze fewer")
    if problems:
        raise UserError(*problems)

    def select(tree: dict, prefix: str, frozen: bool) -> dict:
        chosen = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                part = select(value, f"{name}/", frozen)
                if part or (not value and not frozen):  # a module without parameters stays, on the trained side
                    chosen[key] = part
            elif any(pattern.fullmatch(name) for pattern in compiled) == frozen:
                chosen[key] = value
        return chosen

    return select(params, "", False), select(params, "", True)


def join(trainable: dict, frozen: dict) -> dict:
    """Puts the two parts of `split_frozen` together again, without copying any array.

    Raises:
      ValueError: both parts hold the same parameter.
    """
    joined = dict(trainable)
    for key, value in frozen.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(value, dict) and isinstance(joined[key], dict):
            joined[key] = join(joined[key], value)
        else:
            raise ValueError(f"parameter {key!r} is both trainable and frozen")
    return joined


def ema_update(ema, params, decay: float, step):
    """Returns the exponential moving average of the parameters after one more update: d * ema + (1 - d) * params.

    d = min(decay, (1 + step) / (10 + step)): the usual warm-up against a bias towards the initial parameters. d is 0.1 at the first update, so that
    early on the average spans about the last tenth of the updates; it reaches 0.999 after 9,000.

    Args:
      ema: average so far, a tree like `params`; starts as the initial parameters.
      params: parameters after the update.
      decay: `config.optim.ema`, at least 0 and below 1.
      step: int32[], number of updates before this one.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, value: average + (1 - keep).astype(average.dtype) * (value - average), ema, params)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
