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
UNDECAYED = {"bias", "scale", "token", "tokens", "registers", "position", "positions", "time"}  # words in the last part of a parameter's name


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
        if not optim.decay_factor > 0:
            problems.append(f"optim.decay_factor={optim.decay_factor} must be above 0, as in 0.1")
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


def make_optimizer(optim, schedule, tasks: int = 1) -> optax.GradientTransformationExtraArgs:
    """Returns the optax chain for `config.optim`: clipping, then the update of the named optimiser.

    It sees the trainable parameters alone (`split_frozen`), so the global norm is theirs and frozen ones have no optimiser state.
      sgd: g = clip(gradient) + weight_decay * p;  v = momentum * v + g;  p -= lr * v, or lr * (g + momentum * v) with Nesterov's momentum.
      adamw: p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), with the moments of the clipped gradient (arXiv:1711.05101, algorithm 2).
    The decay is multiplied by the learning rate in both, as PyTorch does it.

    `update(..., finite=False)` says that a step has no gradient: moments stay; the schedule and the tasks' turns go on. Where gradients are summed
    over a round, it must be given zeros.

    With `tasks` T, step i is of task i mod T, and T steps are a round. `per_task` says what they share (IV-ViT 5.3); clipping, decay and rate are
    always the same for all, and the schedule counts steps:
      shared: everything.
      independent: moments are a task's own, so there are T times as many, and AdamW's bias correction counts the task's own updates.
      cumulative_ref: likewise, and a step takes the sum of the gradients of this round so far, each taken at the parameters of its own step, as
        IV-ViT's code does, which zeroes gradients once a round.
      accumulated: one update at the end of a round, with the sum of its gradients, which are then all taken at the same parameters; clipping is of
        the sum, and the rate is that of the round's last step. The gradients of a round that the run does not finish are never used.

    Args:
      optim: `config.optim`.
      schedule: int32[] -> float32[], the learning rate.
      tasks: number of tasks that take turns; without meaning to `shared`.

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
    if optim.name == "adamw" and not optim.eps > 0:
        problems.append(f"optim.eps={optim.eps} must be above 0, as in 1e-8")
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
    if optim.name == "sgd":
        moments = optax.trace(optim.momentum, nesterov=optim.nesterov) if optim.momentum else optax.identity()
    else:
        moments = optax.scale_by_adam(*optim.betas, eps=optim.eps)
    if optim.per_task != "accumulated":
        moments = _if_finite(moments)
    if optim.per_task in ("independent", "cumulative_ref"):
        moments = _in_turn(moments, tasks)
    rate = (lambda rounds: schedule(rounds * tasks + tasks - 1)) if optim.per_task == "accumulated" else schedule
    update = (decay, moments) if optim.name == "sgd" else (moments, decay)
    optimizer = optax.chain(clip, *update, optax.scale_by_learning_rate(rate))
    if optim.per_task == "cumulative_ref":
        return optax.chain(_sum_of_round(tasks), optimizer)
    if optim.per_task == "accumulated":
        return optax.MultiSteps(optimizer, tasks, use_grad_mean=False).gradient_transformation()
    return optimizer


def select(condition, new, old):
    """The one tree or the other by a bool[], which the host need not know."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def steps_per_update(config) -> int:
    """Steps of which only the last one changes the parameters."""
    return len(config.tasks) if config.optim.per_task == "accumulated" else 1


def _if_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with an argument `finite` of its update, a bool[]: where it is False the state stays."""

    def update(updates, state, params=None, *, finite=True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, select(finite, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _in_turn(inner: optax.GradientTransformationExtraArgs, tasks: int) -> optax.GradientTransformationExtraArgs:
    """`inner` with a state for each of `tasks` tasks, which take turns. Arrays of the states are stacked along a new first axis.

    The key `per_task` tells `sharding.partition` of that axis.
    """

    def init(params):
        states = jax.tree.map(lambda x: jnp.stack([x] * tasks), inner.init(params))
        return {"count": jnp.zeros((), jnp.int32), "per_task": states}

    def update(updates, state, params=None, **extra):
        task = state["count"] % tasks
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, task, keepdims=False), state["per_task"])
        updates, own = inner.update(updates, own, params, **extra)
        states = jax.tree.map(lambda stack, one: jax.lax.dynamic_update_index_in_dim(stack, one, task, 0), state["per_task"], own)
        return updates, {"count": state["count"] + 1, "per_task": states}

    return optax.GradientTransformationExtraArgs(init, update)


def _sum_of_round(tasks: int) -> optax.GradientTransformation:
    """Each gradient becomes the sum of those of its round, itself included; a round is `tasks` steps."""

    def init(params):
        return {"count": jnp.zeros((), jnp.int32), "sum": optax.tree.zeros_like(params)}

    def update(updates, state, params=None):
        begins = state["count"] % tasks == 0
        total = jax.tree.map(lambda so_far, gradient: jnp.where(begins, 0, so_far) + gradient, state["sum"], updates)
        return total, {"count": state["count"] + 1, "sum": total}

    return optax.GradientTransformation(init, update)


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
    paths = names(params)
    problems, compiled = [], []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            problems.append(f"optim.freeze: {pattern!r} is no regular expression ({error})")
            continue
        if not any(compiled[-1].fullmatch(name) for name in paths):
            starts = ", ".join(sorted({name.partition("/")[0] for name in paths}))
            problems.append(f"optim.freeze: {pattern!r} matches no parameter: it must match a whole name such as {paths[0]!r} (starts: {starts})")
    if paths and all(any(pattern.fullmatch(name) for pattern in compiled) for name in paths):
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


def ema_update(ema, params, decay: float, step, every: int = 1):
    """Returns the exponential moving average of the parameters after one more update: d * ema + (1 - d) * params.

    d = min(decay, (1 + n) / (10 + n)) with n updates before: the usual warm-up against a bias towards the initial parameters. d is 0.1 at the first
    update, so that early on the average spans about the last tenth of the updates; it reaches 0.999 after 9,000.

    Args:
      ema: average so far, a tree like `params`; starts as the initial parameters.
      params: parameters after the update.
      decay: `config.optim.ema`, at least 0 and below 1.
      step: int32[], number of steps before this one.
      every: steps per update (`steps_per_update`): the average moves, and d is counted, with the updates alone.
    """
    before = jnp.asarray(step // every, jnp.float32)
    keep = jnp.where(step % every == every - 1, jnp.minimum(decay, (1 + before) / (10 + before)), 1)
    return jax.tree.map(lambda average, value: average + (1 - keep).astype(average.dtype) * (value - average), ema, params)


def names(tree) -> list[str]:
    """The paths of all leaves."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
