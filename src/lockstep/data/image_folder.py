"""A folder of images, `root/<class>/**`: the files that torchvision.datasets.ImageFolder reads, in its order, and GIFs.

What is left out is counted and named, with the reason: nothing is read less, or twice, without a word.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import UserError
from lockstep.utils.text import count

# torchvision.datasets.folder.IMG_EXTENSIONS, and GIF, which torchvision.io decodes.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def list_image_folder(root: Path) -> tuple[list[str], list[int], list[str]]:
    """(image files, their labels, the classes' names) of `root/<class>/`, in torchvision's ImageFolder's order.

    Raises:
        UserError: there are no classes, or one without images.
    """
    try:
        # Links are followed. All have the same folder before their names, so this is the order of the names.
        folders = sorted((entry.path, entry.name) for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        folders = []
    if not folders:
        what = "holds no class folders" if root.is_dir() else "no such folder"
        raise UserError(f"{root}: {what}; data.root must hold train/<class>/ and val/<class>/ with images")
    paths: list[str] = []
    labels: list[int] = []
    for label, (folder, _) in enumerate(folders):
        found = [path for path in walk_files(folder, []) if is_image(path)]
        if not found:
            raise UserError(
                f"{printable(folder)}: class folder without images ({', '.join(IMAGE_SUFFIXES)}); "
                "fill it or take it out of data.root"
            )
        paths += found
        labels += [label] * len(found)
    return paths, labels, [printable(name) for _, name in folders]


def is_image(path: str) -> bool:
    """Whether its name is an image's; what is in it is looked at later."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def walk_files(folder: str, loops: list[str]) -> Iterator[str]:
    """All files below a folder in torchvision's order, links followed, but not one back to a folder that it lies in.

    Args:
        loops: such links are added to it.
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
        found.append((place, sorted(names)))
    for place, names in sorted(found):
        yield from (os.path.join(place, name) for name in names)


@functools.cache
def say_what_is_left_out(root: Path) -> None:
    """Count on stderr what a folder of images holds besides, once per process."""
    loops: list[str] = []
    outside, other = [], []
    for entry in os.scandir(root):
        if entry.is_dir():
            other += [path for path in walk_files(entry.path, loops) if not is_image(path)]
        elif is_image(entry.name):
            outside.append(entry.path)
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
    if parts:
        print(f"note: {root}: left out: {'; '.join(parts)}", file=sys.stderr)


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
