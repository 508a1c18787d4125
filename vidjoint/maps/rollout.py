"""Attention rollout: from what the pool reads back to the tokens of the input, through all blocks, in space and time."""

import jax.numpy as jnp
import numpy as np

from vidjoint.maps.attention import RESIDUAL, Maps, Stage
from vidjoint.models.mixers.motion import from_blocks, to_blocks


def rollout(maps: Maps) -> np.ndarray:
    """Attention rollout (Abnar and Zuidema 2020): how much each token of the input, float32[T, N], stands behind what the pool reads; sums to 1.

    Their equation for one attention, 0.5 A + 0.5 I, holds for each stage. A block of divided or motion attention has two, over time and over space;
    the rollout is their product in the order in which the tokens pass. MLPs and adapters mix no tokens. Tokens that a stage leaves alone keep to
    themselves. A shift of channels in time has no residual: the shares of the channels are its map. Where the frames hold copies of one class token,
    what each copy reads is the mean over the frames.
    """
    row = maps.reader.copy()
    for stage in reversed(maps.stages):
        if stage.kind != "class attention":
            row = PULL[stage.kind](row, stage, maps)
    return row


def _mixed(row: np.ndarray, read: np.ndarray) -> np.ndarray:
    return RESIDUAL * row + (1 - RESIDUAL) * read


def _pull_space(row: np.ndarray, stage: Stage, maps: Maps) -> np.ndarray:
    asked = row
    if maps.spec.mixer in ("divided", "joint", "motion"):
        asked = row.copy()
        asked[:, : maps.spec.prefix] = row[:, : maps.spec.prefix].mean(axis=0)
    return _mixed(row, np.einsum("tq,tqk->tk", asked, stage.weights))


def _pull_joint(row: np.ndarray, stage: Stage, maps: Maps) -> np.ndarray:
    prefix = maps.spec.prefix
    read = np.concatenate([row[:, :prefix].sum(axis=0), row[:, prefix:].ravel()]) @ stage.weights
    special = np.broadcast_to(read[:prefix] / len(row), (len(row), prefix))  # the copies are equal
    return _mixed(row, np.concatenate([special, read[prefix:].reshape(len(row), -1)], axis=1))


def _pull_time(row: np.ndarray, stage: Stage, maps: Maps) -> np.ndarray:
    prefix = maps.spec.prefix
    patches = row[:, prefix:]
    return np.concatenate([row[:, :prefix], _mixed(patches, np.einsum("qp,pqk->kp", patches, stage.weights))], axis=1)


def _pull_motion(row: np.ndarray, stage: Stage, maps: Maps) -> np.ndarray:
    prefix, side = maps.spec.prefix, maps.spec.motion.block
    patches = row[:, prefix:]
    blocks = np.asarray(to_blocks(jnp.asarray(patches[None, :, :, None]), maps.grid, side)[0])[0, :, :, 0]
    read = jnp.asarray(np.einsum("bq,bqk->bk", blocks, stage.weights)[None, :, :, None])
    return np.concatenate([row[:, :prefix], _mixed(patches, np.asarray(from_blocks(read, maps.grid, side))[0, :, :, 0])], axis=1)


def _pull_shift(row: np.ndarray, stage: Stage, maps: Maps) -> np.ndarray:
    moved = np.einsum("tn,ts->sn", row[:, : stage.moving], stage.weights)
    return np.concatenate([moved, row[:, stage.moving :]], axis=1)


PULL = {"space": _pull_space, "joint": _pull_joint, "time": _pull_time, "motion": _pull_motion, "shift": _pull_shift}
