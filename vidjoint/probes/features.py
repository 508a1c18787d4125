"""What a frozen model makes of the examples of a split: one vector each, or the tokens of all patches of all frames."""

import dataclasses
import functools
import hashlib
import logging
import math
import os
import zipfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import sharding
from vidjoint.data.mixture import evaluation_batches
from vidjoint.data.records import Source
from vidjoint.data.tasks import Task
from vidjoint.errors import UserError, printable
from vidjoint.models.build import Model

HELD_OUT = 0.2  # share of each class of the training split that chooses a probe's settings
EPS = 1e-6  # of the norm of tokens

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Features:
    """Of one split: n examples in its order, those that can be decoded."""

    x: np.ndarray  # float32[n, D], or for tokens float16[n, M, D]
    label: np.ndarray  # int32[n], or int32[n, K] filled up by -1
    index: np.ndarray  # int32[n], their numbers in the split

    def __len__(self) -> int:
        return len(self.label)


class Backbone:
    """A frozen model with its parameters, on all devices of this process. No augmentation: examples are seen as in an evaluation."""

    def __init__(self, config: ConfigDict, model: Model, params: dict, views: tuple[int, int], batch_size: int):
        """`views`: temporal x spatial. Features are means over them; tokens are those of all of them."""
        self.config, self.model, self.views = config, model, views
        self.mesh = sharding.make_mesh(config.mesh)
        self.params = jax.device_put(jax.device_get(params), sharding.tree_sharding(params, self.mesh))
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.batch_size = math.ceil(batch_size / devices) * devices
        split = sharding.batch_sharding(self.mesh)
        self._run = {make.__name__: jax.jit(functools.partial(make, model), out_shardings=split) for make in (features, tokens)}
        self._named = set()  # files that have been reported

    def shape(self, task: Task, what: str) -> tuple[int, ...]:
        """Of one example: (D,) of features, (M, D) of tokens."""
        temporal, spatial = self._views(task)
        pixels = jax.ShapeDtypeStruct((self.batch_size, temporal * spatial, *task.clip.shape), np.uint8)
        return jax.eval_shape(self._run[what], self.params, pixels).shape[1:]

    def batches(self, task: Task, source: Source, what: str) -> Iterator[tuple[jax.Array, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (x, label, index, mask) for batches of `source`, in its order; x stays on the devices. A row whose mask is False has no example."""
        task = dataclasses.replace(task, val=source)
        rows_of = functools.partial(sharding.local_rows, mesh=self.mesh)
        for batch in evaluation_batches(task, self.config, self.batch_size, *self._views(task), rows_of):
            for _, number, reason in batch["bad"]:
                if (name := source.name(number)) not in self._named:
                    self._named.add(name)
                    log.warning("%s: left out: %s", task.name, printable(f"{name}: {reason}"))
            pixels = sharding.put_batch({"pixels": batch["pixels"]}, self.mesh)["pixels"]
            with sharding.memory_errors("lower --batch_size"):
                yield self._run[what](self.params, pixels), batch["label"], batch["index"], batch["mask"]

    def read(self, task: Task, source: Source, what: str, title: str) -> Features:
        """Features or tokens of a whole split, in memory."""
        shape = self.shape(task, what)
        x = np.empty((len(source), *shape), np.float32 if what == "features" else np.float16)
        labels, indices, done = [], [], 0
        total = math.ceil(len(source) / self.batch_size)
        for rows, label, index, mask in tqdm(
            self.batches(task, source, what), title, total=total, disable=None, delay=2, leave=False, unit=" batches"
        ):
            count = int(mask.sum())
            x[done : done + count] = np.asarray(rows)[mask]
            labels.append(label[mask])
            indices.append(index[mask])
            done += count
        return Features(x[:done], np.concatenate(labels), np.concatenate(indices))

    def fingerprint(self, task: Task) -> str:
        """A text that is another one if the parameters, the examples, their labels or how they are seen differ."""
        digest = hashlib.blake2b(repr((self.model.spec, self._views(task), task.clip.shape, task.clip.interpolation)).encode(), digest_size=16)
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(self.params)):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(x))
        digest.update(repr(sorted(task.clip.settings.to_dict().items())).encode())
        for source in (task.train, task.val):
            digest.update(repr(source.labels).encode())
            digest.update(np.ascontiguousarray(labels_of(source)))
            for number in range(len(source)):
                digest.update(source.name(number).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def _views(self, task: Task) -> tuple[int, int]:
        return self.views if task.is_video else (1, self.views[1])


def features(model: Model, params: dict, pixels: jax.Array) -> jax.Array:
    """uint8[B, V, T, H, W, 3] -> what the classifiers of the model see, mean over the views: float32[B, D]."""
    flat = pixels.reshape(-1, *pixels.shape[2:])
    return model.features(params, flat).reshape(*pixels.shape[:2], -1).mean(axis=1)


def tokens(model: Model, params: dict, pixels: jax.Array) -> jax.Array:
    """uint8[B, V, T, H, W, 3] -> the patches after the model's last norm, each with mean 0 and variance 1: float16[B, M, D], M = V T patches."""
    x = model.bind(params).tokens(pixels.reshape(-1, *pixels.shape[2:]))[:, :, model.spec.prefix :].astype(jnp.float32)
    x = (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + EPS)
    return x.reshape(len(pixels), -1, x.shape[-1]).astype(jnp.float16)


class Picked:
    """Some records of another source's, in another order."""

    def __init__(self, records, order: Sequence[int]):
        self.records, self.order = records, order
        if hasattr(records, "targets"):
            self.targets = records.targets[order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int):
        return self.records[int(self.order[i])]

    def name(self, i: int) -> str:
        return self.records.name(int(self.order[i]))


def pick(source: Source, order: np.ndarray) -> Source:
    """The examples of numbers `order` int[n], in this order."""
    return dataclasses.replace(source, records=Picked(source.records, order))


def save(file: str, fingerprint: str, labels: tuple[str, ...], train: Features, val: Features) -> None:
    """Writes features as an .npz, whole or not at all. Raises UserError if that fails."""
    arrays = {f"{split}_{name}": value for split, part in (("train", train), ("val", val)) for name, value in vars(part).items()}
    part = f"{file}.part"
    try:
        with open(part, "wb") as opened:
            np.savez(opened, fingerprint=np.array(fingerprint), labels=np.array(labels), **arrays)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"--features={file} can't be written: {error.strerror}") from None


def load(file: str, fingerprint: str) -> tuple[Features, Features]:
    """Reads what `save` wrote. Raises UserError if it is damaged, or of other weights or data."""
    try:
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds a single array")
        with opened as stored:
            same = str(stored["fingerprint"]) == fingerprint
            train, val = (Features(*(stored[f"{split}_{name}"] for name in ("x", "label", "index"))) for split in ("train", "val"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--features={file} can't be read ({error}): give the name of a new file") from None
    if not same:
        raise UserError(f"--features={file} holds features of other weights, data or views: give another name, or remove it")
    return train, val


def check_file(file: str | None) -> None:
    """Finds out before the work whether `save` can write, or `load` read, `file` (None: nowhere). Raises UserError if not."""
    if file and not os.path.isfile(file) and (os.path.exists(file) or not os.access(os.path.dirname(os.path.abspath(file)), os.W_OK)):
        raise UserError(f"--features={file} can't be written: name a file in a folder that exists and is yours")


def labels_of(source: Source) -> np.ndarray:
    """The labels of a whole split: int32[n], or int32[n, K] filled up by -1."""
    targets = getattr(source.records, "targets", None)
    return np.asarray([source[i]["label"] for i in range(len(source))], np.int32) if targets is None else targets


def hold_out(label: np.ndarray, seed: int) -> np.ndarray:
    """Draws HELD_OUT of the examples of each class, at least one of each that has two: bool[n]. Of several labels, the first one counts.

    Args:
      label: int[n] or int[n, K].
    """
    first = label.reshape(len(label), -1)[:, 0]
    rng, held = np.random.default_rng([seed, 0]), np.zeros(len(label), bool)
    for number in np.unique(first):
        members = np.flatnonzero(first == number)
        if len(members) > 1:
            held[rng.permutation(members)[: max(1, round(HELD_OUT * len(members)))]] = True
    return held
