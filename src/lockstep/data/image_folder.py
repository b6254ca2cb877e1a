"""A folder of images, `root/<class>/**`: the files that torchvision.datasets.ImageFolder reads, in its order, and GIFs.

What is left out is counted and named, with the reason: nothing is read less, or twice, without a word.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lockstep.errors import UserError
from lockstep.utils.files import cache_folder, write_atomically
from lockstep.utils.text import count

# torchvision.datasets.folder.IMG_EXTENSIONS, and GIF, which torchvision.io decodes.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEPT_FROM = 100_000  # images, from which on a listing is kept
CHANGING_NS = 5_000_000_000  # for which a folder must have been left alone before: clocks and file systems are coarse


class Listing(NamedTuple):
    """What a folder holds: image files, their labels, the classes' names, and what is left out, in words."""

    paths: list[str]
    labels: list[int]
    names: list[str]
    left_out: str


def list_image_folder(root: Path) -> Listing:
    """The images of `root/<class>/`, in torchvision's ImageFolder's order.

    A million files take minutes to list on a shared file system, and every rank needs them. So the listing of many is
    kept in ~/.cache/lockstep, by the process that checks the data before the ranks start, and holds as long as no folder
    below has another time of change; ranks look at the folders alone.

    Raises:
        UserError: there are no classes, or one without images.
    """
    kept = kept_listing(root)
    if kept is not None:
        return kept
    began = time.time_ns()
    folders: list[str] = [str(root)]
    found = scan_image_folder(root, folders)
    if len(found.paths) >= KEPT_FROM:
        with contextlib.suppress(OSError):
            changed = {folder: os.stat(folder).st_mtime_ns for folder in folders}
            if max(changed.values()) < began - CHANGING_NS:  # else a file that comes now may not change the time
                file = listing_file(root)
                file.parent.mkdir(0o700, parents=True, exist_ok=True)
                write_atomically(file, json.dumps({"changed": changed} | found._asdict()), durable=False)
    return found


def listing_file(root: Path) -> Path:
    return cache_folder("listings") / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]}.json"


def kept_listing(root: Path) -> Listing | None:
    """The listing that was kept of a folder, if there is one and it still holds."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(listing_file(root).read_text(encoding="utf-8"))
        if kept["changed"] and all(os.stat(path).st_mtime_ns == at for path, at in kept.pop("changed").items()):
            return Listing(**kept)
    return None


def scan_image_folder(root: Path, seen: list[str]) -> Listing:
    """As `list_image_folder`, from the folders themselves, which are added to `seen`."""
    try:
        # Links are followed. All have the same folder before their names, so this is the order of the names.
        entries = sorted(os.scandir(root), key=lambda entry: entry.path)
    except OSError:
        entries = []
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        what = "holds no class folders" if root.is_dir() else "no such folder"
        raise UserError(f"{root}: {what}; data.root must hold train/<class>/ and val/<class>/ with images")
    paths: list[str] = []
    labels: list[int] = []
    loops: list[str] = []
    other: list[str] = []
    for label, folder in enumerate(folders):
        before = len(paths)
        for path in walk_files(folder.path, loops, seen):
            (paths if is_image(path) else other).append(path)
        if len(paths) == before:
            raise UserError(
                f"{printable(folder.path)}: class folder without images ({', '.join(IMAGE_SUFFIXES)}); "
                "fill it or take it out of data.root"
            )
        labels += [label] * (len(paths) - before)
    outside = [entry.path for entry in entries if not entry.is_dir() and is_image(entry.name)]
    names = [printable(folder.name) for folder in folders]
    return Listing(paths, labels, names, what_is_left_out(other, outside, loops))


def is_image(path: str) -> bool:
    """Whether its name is an image's; what is in it is looked at later."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def walk_files(folder: str, loops: list[str], seen: list[str]) -> Iterator[str]:
    """All files below a folder in torchvision's order, links followed, but not one back to a folder that it lies in.

    Args:
        loops: such links are added to it.
        seen: the folders are added to it.
    """
    found = []
    above = {folder: {os.path.realpath(folder)}}  # of each folder, itself and those it lies in
    for place, folders, names in os.walk(folder, followlinks=True):
        for name in list(folders):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if real in above[place]:
                loops.append(path)
                folders.remove(name)
            else:
                above[path] = above[place] | {real}
        seen.append(place)
        found.append((place, sorted(names)))
    for place, names in sorted(found):
        yield from (os.path.join(place, name) for name in names)


def what_is_left_out(other: list[str], outside: list[str], loops: list[str]) -> str:
    """Counted, in words: files that are no images, images in no class folder, links back; empty where there are none."""
    other = [path for path in other if not os.path.basename(path).startswith((".", "Thumbs.db"))]
    kinds = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in other)
    parts = []
    if other:
        named = ", ".join(f"{times} {printable(kind)}" for kind, times in kinds.most_common(5))
        parts.append(f"{count(len(other), 'file')} of other types than images ({named}), such as {printable(other[0])}")
    if outside:
        parts.append(f"{count(len(outside), 'image')} in no class folder, such as {printable(outside[0])}")
    if loops:
        parts.append(f"{count(len(loops), 'link')} to a folder above, such as {printable(loops[0])}")
    return "; ".join(parts)


@functools.cache
def say_what_is_left_out(root: Path, left_out: str) -> None:
    """Say it on stderr, once per process."""
    if left_out:
        print(f"note: {root}: left out: {left_out}", file=sys.stderr)


def printable(path: str) -> str:
    """A path to be printed: what is not UTF-8 in it as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def check_image(path: str) -> None:
    """Tell what is no whole image. Most by the first and last bytes: cheap, where decoding all is not.

    The name does not decide: ImageNet itself has a PNG that is called .JPEG. A file of another format, or with much
    after its end, as a phone's motion photo, is decoded.

    Raises:
        UserError: it cannot be read, or is truncated, or no image.
    """
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
    try:
        with open(path, "rb") as stream:
            head = stream.read(2)
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 4096))
            tail = stream.read()
    except OSError as error:
        raise UserError(
            f"{printable(path)}: cannot be read ({error.strerror}); replace it or take it out of data.root"
        ) from None
    if head in ends and ends[head] in tail:
        return
    from PIL import Image  # not torch's decoders: ranks may be forked from this process

    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # its decoders raise anything
        raise UserError(
            f"{printable(path)}: not a readable image (truncated, or another format); replace it or take it out of data.root"
        ) from None
