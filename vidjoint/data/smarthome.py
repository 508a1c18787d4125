"""Toyota Smarthome, trimmed (Das et al., ICCV 2019): the classes, subjects and cameras that its file names hold, and its published protocols."""

import os
import re
from collections import Counter

from vidjoint.data.files import has_extension, some, walk
from vidjoint.errors import UserError

NAME = re.compile(r"(?P<label>[A-Za-z.]+)_p(?P<subject>\d+)_r\d+_v\d+_c(?P<camera>\d+)")  # Cook.Cleandishes_p02_r00_v02_c03.mp4
CLASSES = frozenset(
    "Cook.Cleandishes Cook.Cleanup Cook.Cut Cook.Stir Cook.Usestove Cutbread Drink.Frombottle Drink.Fromcan Drink.Fromcup Drink.Fromglass "
    "Eat.Attable Eat.Snack Enter Getup Laydown Leave Makecoffee.Pourgrains Makecoffee.Pourwater Maketea.Boilwater Maketea.Insertteabag "
    "Pour.Frombottle Pour.Fromcan Pour.Fromkettle Readbook Sitdown Takepills Uselaptop Usetablet Usetelephone Walk WatchTV".split()
)
CROSS_VIEW = CLASSES - frozenset(  # classes that are seen by all the cameras concerned
    "Cook.Cleandishes Cook.Cleanup Cook.Cut Cook.Stir Cook.Usestove Laydown Makecoffee.Pourgrains Makecoffee.Pourwater Maketea.Boilwater "
    "Maketea.Insertteabag Pour.Fromkettle WatchTV".split()
)
SPLITS = {  # name -> what is told apart, who or which belongs to the split, and the protocol's classes
    "cross_subject:train": ("subject", (3, 4, 6, 7, 9, 12, 13, 15, 17, 19, 25), CLASSES),
    "cross_subject:test": ("subject", (2, 10, 11, 14, 16, 18, 20), CLASSES),
    "cross_view1:train": ("camera", (1,), CROSS_VIEW),
    "cross_view1:val": ("camera", (5,), CROSS_VIEW),
    "cross_view1:test": ("camera", (2,), CROSS_VIEW),
    "cross_view2:train": ("camera", (1, 3, 4, 6, 7), CROSS_VIEW),
    "cross_view2:val": ("camera", (5,), CROSS_VIEW),
    "cross_view2:test": ("camera", (2,), CROSS_VIEW),
}


def find_clips(root: str, split: str, media: str) -> tuple[list[str], list[str], list[str]]:
    """Finds the files of a split (a key of SPLITS) anywhere below `root`.

    Returns:
      Their paths, sorted; the class of each; and oddities for the log.

    Raises:
      UserError: there is no such folder, or not one file with a name of this dataset in it.
    """
    if not os.path.isdir(root):
        raise UserError(f"root {root} is not a folder: set root to the folder of Toyota Smarthome's clips")
    key, members, classes = SPLITS[split]
    paths, labels, others, strange = [], [], Counter(), []
    known = False
    for path in walk(root):
        if not has_extension(path, media):
            continue
        match = NAME.fullmatch(os.path.splitext(os.path.basename(path))[0])
        if not match:
            strange.append(path)
            continue
        known = True
        if int(match[key]) in members and match["label"] in classes:
            paths.append(os.path.join(root, path))
            labels.append(match["label"])
        elif match["label"] not in CLASSES:
            others[match["label"]] += 1
    if not known:
        raise UserError(f"{root} holds no {media}s with names like Cook.Cleandishes_p02_r00_v02_c03.mp4: set root to Toyota Smarthome's clips")
    if not paths:
        raise UserError(f"{root} holds no {media}s of {split}, which has the {key}s {some(members)}: is the download complete?")
    notes = [f"{root}: {others.total()} clips of classes outside the published {len(CLASSES)} are left out: {some(sorted(others))}"] if others else []
    notes += [f"{root}: {len(strange)} {media}s without class and subject in their names are left out: {some(strange)}"] if strange else []
    return paths, labels, notes
