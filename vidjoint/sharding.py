"""Where arrays live: a mesh of devices with the axes data, fsdp and tensor, and one table of rules from parameter paths to partitions.

Batches are split over data and fsdp; parameters and optimiser state over fsdp (ZeRO-3, Rajbhandari et al. 2020) and tensor (Megatron-LM, Shoeybi et
al. 2019). Models know nothing of it: XLA inserts the communication.
"""

import contextlib
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vidjoint.errors import UserError

AXES = ("data", "fsdp", "tensor")

# How the end of a parameter's path decides which dimension the tensor axis splits; the first rule that matches holds. A bias is added to what its
# kernel makes, so it is split like the kernel's outputs.
RULES = (
    (r"attn/qkv/kernel", PartitionSpec(None, "tensor")),
    (r"attn/qkv/bias", PartitionSpec("tensor")),
    (r"attn/proj/kernel", PartitionSpec("tensor", None)),
    (r"mlp/fc1/kernel", PartitionSpec(None, "tensor")),
    (r"mlp/fc1/bias", PartitionSpec("tensor")),
    (r"mlp/fc2/kernel", PartitionSpec("tensor", None)),
)
WHOLE = r"heads/[^/]+/(kernel|bias)"  # every device holds classifiers entirely: split, they make XLA rebuild whole activations


def make_mesh(sizes, devices=None) -> Mesh:
    """Arranges the devices as [data, fsdp, tensor].

    Args:
      sizes: `config.mesh`, the size of each axis; one may be -1, what is left.
      devices: the devices to use, all of them if None.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [sizes[axis] for axis in AXES]
    told = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1:
        raise UserError(f"{told}: only one axis may be -1 (all devices that are left)")
    if any(size < 1 and size != -1 for size in shape):
        raise UserError(f"{told}: sizes are 1 or more, or -1 for one of them (all devices that are left)")
    count, known = len(devices), int(np.prod([size for size in shape if size != -1]))
    if -1 in shape:
        if count % known:
            raise UserError(f"{told}: {known} does not divide the number of devices, {count}; change the sizes")
        shape[shape.index(-1)] = count // known
    elif known != count:
        raise UserError(f"{told}: that makes {known} devices, but there are {count}; change the sizes, or set one to -1")
    types = (AxisType.Auto,) * len(AXES)
    slices = len({device.slice_index for device in devices if device.platform == "tpu" and hasattr(device, "slice_index")})
    if slices > 1:  # several TPU slices on one network: batches are split over them, for all else takes the fast links inside of a slice
        if shape[0] % slices:
            raise UserError(f"{told}: mesh.data={shape[0]} is no multiple of the {slices} TPU slices, over which batches are split")
        inside = (shape[0] // slices, *shape[1:])
        return Mesh(create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True), AXES, axis_types=types)
    # as jax.make_mesh, which lets an axis be a part of a TPU pod's side, as 4 of 16 chips, on v5e alone
    return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=types)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the array of that path is split: by its rule over tensor, then its largest remaining dimension that divides over fsdp.

    A dimension that its axis does not divide stays whole, and so do classifiers (`WHOLE`). Vectors take part in fsdp too, so that memory falls by its
    size. The path may have a prefix, as in the optimiser's state: rules match its end. Below a key `per_task`, arrays are stacked along a first axis,
    one for each task (`optim.make_optimizer`), which stays whole.
    """
    _, stacked, inner = f"/{path}".partition("/per_task/")
    if stacked:
        return PartitionSpec(None, *partition(inner, shape[1:], mesh))
    spec = [None] * len(shape)
    if re.search(f"(^|/){WHOLE}$", path):
        return PartitionSpec(*spec)
    rule = next((spec for pattern, spec in RULES if re.search(f"{pattern}$", path) and len(spec) == len(shape)), spec)
    if mesh.shape["tensor"] > 1:
        spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape, strict=True)]
    free = [i for i, size in enumerate(shape) if spec[i] is None and size and size % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def tree_sharding(abstract_tree, mesh: Mesh):
    """A tree of NamedSharding for parameters, optimiser state or both: any pytree of arrays or `jax.ShapeDtypeStruct`. Scalars are replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, mesh)), abstract_tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0, the examples, is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process holds, ascending: int[b]. Processes that share a tensor axis hold the same rows.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """
    _check_divides(batch_size, mesh)
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process's rows of a batch ([b, ...] each, `local_rows` of the global batch) into global arrays [B, ...], split over data and fsdp.

    Raises:
      UserError: the batch does not divide over data x fsdp.
    """
    lengths = {name: len(rows) for name, rows in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the fields of a batch differ in length: {lengths}")
    sharding, shards = batch_sharding(mesh), _shards(mesh)
    size = max(lengths.values()) * shards // len(local_rows(shards, mesh))
    _check_divides(size, mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:])) for name, rows in batch.items()}


def keep_compiled() -> None:
    """Keeps compiled programs on disk for the next time, in ~/.cache/vidjoint or VIDJOINT_CACHE."""
    cache = os.environ.get("VIDJOINT_CACHE", Path.home() / ".cache" / "vidjoint")
    jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "xla"))


@contextlib.contextmanager
def memory_errors(advice: str):
    """Turns a device's lack of memory into a UserError that ends in `advice`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device has too little memory: {advice}") from error


def _shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _check_divides(batch_size: int, mesh: Mesh) -> None:
    shards = _shards(mesh)
    if batch_size < 1 or batch_size % shards:
        raise UserError(f"a batch of {batch_size} examples does not divide over {shards} devices (data x fsdp): choose a multiple of {shards}")
