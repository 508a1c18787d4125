"""Three sets of noise (fixture `root`), their configs and mixtures."""

import numpy as np

from vidjoint.config import base_config, task_config
from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import open_tasks

SIZES = {"stills": 20, "moves": 13, "turns": 8}
NUMBER = {"moves": 0, "stills": 1, "turns": 2}  # of a task in batches: alphabetical


def configure(root, *names, batch_size=6, **changes):
    config = base_config()
    config.data_root, config.batch_size = str(root), batch_size
    config.model.frames, config.model.image_size, config.data.threads = 3, 16, 2
    for name in names:
        media = "image" if name == "stills" else "video"
        settings = dict(media=media, train=f"{name}.csv", val=f"{name}.csv", root=name, short_side=(17, 22), randaugment_layers=1, erase=0.2)
        config.tasks[name] = task_config(**settings)
    config.update_from_flattened_dict(changes)
    return config


def mixed(config, **shares):
    return Mixture(config, open_tasks(config, ("train",)), config.total_steps or 60, **shares)


def same(ours, theirs):
    """Asserts that two tuples of batches are equal to the bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
