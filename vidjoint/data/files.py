"""Files on disk: which are images and videos, and what a folder holds. One listing per folder, never a look at each file."""

import os
import unicodedata
from collections.abc import Iterable, Iterator

from vidjoint.errors import UserError

EXTENSIONS = {
    "video": frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .3gp .wmv .ogv .vob .gif".split()),
    "image": frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .ppm .pgm .gif .avif .jp2".split()),
}
SHOWN = 5  # faults of one kind that are named; the others are counted


def some(items: Iterable) -> str:
    """The first few of many, with the number of the others."""
    items = list(items)
    return ", ".join(shorten(str(item)) for item in items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def shorten(text: str) -> str:
    """Text out of a file, at a length that fits into a message."""
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def has_extension(path: str, media: str) -> bool:
    return path[path.rfind(".") :].lower() in EXTENSIONS[media]


def is_media(path: str) -> bool:
    return has_extension(path, "video") or has_extension(path, "image")


def existing(root: str, keys: list[str]) -> list[str]:
    """The keys' paths below root (a key may be absolute), with "" for those that are no file.

    A key that names none as it is written is tried with slashes for backslashes, and in the composed and decomposed forms of Unicode (macOS writes
    the latter).

    Raises:
      UserError: a folder may not be read.
    """
    found = _listed(root, keys)
    for rewrite in (_forwards, lambda key: unicodedata.normalize("NFC", key), lambda key: unicodedata.normalize("NFD", key)):
        absent = [i for i, path in enumerate(found) if not path]
        other = {i: key for i in absent if (key := rewrite(_forwards(keys[i]))) != keys[i]}
        for i, path in zip(other, _listed(root, list(other.values())), strict=True):
            found[i] = path
    return found


def _forwards(key: str) -> str:
    return key.replace("\\", "/")


def _listed(root: str, keys: list[str]) -> list[str]:
    listings, found = {}, []
    for key in keys:
        leaf = key.rpartition("/")[2]
        folder = key[: len(key) - len(leaf)]
        if folder not in listings:
            path = os.path.join(root, folder)
            listings[folder] = path, files_in(path)
        path, names = listings[folder]
        found.append(path + leaf if leaf in names else "")
    absent = [i for i, path in enumerate(found) if not path]
    if len(absent) <= 1000:  # few enough to ask for: a file system may tell names apart less strictly than a set does
        for i in absent:
            path = os.path.join(root, keys[i])
            found[i] = path if os.path.isfile(path) else ""
    return found


def files_in(folder: str) -> frozenset[str]:
    """Names of the files in a folder; none where there is no such folder. Raises UserError where it may not be read."""
    try:
        with os.scandir(folder or ".") as entries:
            return frozenset(entry.name for entry in entries if not entry.is_dir())
    except PermissionError as error:
        raise UserError(f"{folder} can't be read ({error.strerror}): change its permissions, or run as who may read it") from None
    except (OSError, ValueError):  # ValueError: a null character
        return frozenset()


def is_outside(path: str, root: str) -> bool:
    """Whether a path leads out of root by its text: links inside root may point anywhere."""
    path = os.path.abspath(path)
    return not any(path.startswith(os.path.join(where(root), "")) for where in (os.path.abspath, os.path.realpath))  # the latter asks the disk


def same_name(path: str) -> str:
    """A path as all its spellings are told apart from other files: without `.`, `..` and doubled slashes, composed."""
    if "//" in path or "/." in path or path.startswith("."):
        path = os.path.normpath(path)
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "lost+found")


def walk(root: str, depth: int = 100) -> Iterator[str]:
    """Paths below root, relative to it, sorted within each folder, hidden ones left out; a folder comes before what it holds and ends in "/".

    Left out are links to a folder above, which would be gone through again and again.

    Raises:
      UserError: a folder can't be listed.
    """
    yield from _below(root, depth, ())


def _below(folder: str, depth: int, linked: tuple[str, ...]) -> Iterator[str]:
    """`walk` of a folder; `linked`: the real paths, each with a final "/", of the folders whose links led here."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{folder} can't be listed: {error.strerror}") from None
    for name, is_folder, is_link in listed:
        path = os.path.join(folder, name)
        if not is_folder:
            yield name
        elif depth > 1:
            passed = (*linked, os.path.join(os.path.realpath(folder), "")) if is_link else linked
            if is_link and any(above.startswith(os.path.join(os.path.realpath(path), "")) for above in passed):
                continue
            yield f"{name}/"
            yield from (f"{name}/{below}" for below in _below(path, depth - 1, passed))
