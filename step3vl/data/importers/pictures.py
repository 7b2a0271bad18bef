"""A record's images as files: found inside one folder or in the record itself, decoded once, and kept byte for byte.

PNG, JPEG and WebP are stored as they are, with whatever metadata they carry; other formats become PNG.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
from pathlib import Path
from typing import Any

from PIL import Image

from step3vl.data.decode import open_image
from step3vl.data.importers.record import Refused, is_empty, shown
from step3vl.data.shards import stored_as
from step3vl.data.tar_index import MAX_MEMBER_BYTES

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA = re.compile(r"data:image[^,]{0,64}?;base64,|data:image[^,]{0,64},", re.IGNORECASE)


class Pictures:
    """The folder in which image paths lie.

    Args:
        folder: The folder given by the user (`--images`); None: the folder of the file a record is in.
    """

    def __init__(self, folder: Path | None):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--images {folder}: there is no such folder")
        self.folder = folder

    def load(self, reference: Any, where: str, source: Path) -> tuple[Image.Image, bytes]:
        """The decoded image and the bytes to store. `where` names the field, `source` the file of the record.

        Accepted are a path, a file:// path, base64 in a data: address, bytes, and a mapping with `bytes` or `path`.
        Raises Refused.
        """
        if isinstance(reference, dict):
            for name in ("bytes", "path", "url"):
                if not is_empty(reference.get(name)):
                    reference = reference[name]
                    break
        if isinstance(reference, bytes | bytearray):
            data, where = bytes(reference), f"{where} ({len(reference)} bytes)"
        elif isinstance(reference, str) and _DATA.match(reference):
            data, where = _inline(reference, where), f"{where} (base64)"
        elif isinstance(reference, str) and reference:
            data, where = self._read(reference, where, source), f"{where}: {shown(reference, 100)}"
        else:
            raise Refused(
                "image field", f"{where} is {shown(reference)}; accepted are a path, bytes, and {{bytes, path}}"
            )
        if len(data) > MAX_MEMBER_BYTES:
            raise Refused("image unreadable", f"{where} has {len(data)} bytes; at most {MAX_MEMBER_BYTES} are accepted")
        try:
            image = open_image(data, where)
        except ValueError as error:
            raise Refused("image unreadable", str(error)) from None
        return image, data if stored_as(data) else _as_png(image, where)

    def _read(self, reference: str, where: str, source: Path) -> bytes:
        path = self._path(reference, where, source)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise Refused("image missing", f"{where} is {shown(reference, 100)}, which is not a file")
            if status.st_size > MAX_MEMBER_BYTES:
                raise Refused(
                    "image unreadable",
                    f"{where} is {shown(reference, 100)}, a file of {status.st_size} bytes; at most {MAX_MEMBER_BYTES} "
                    "are accepted",
                )
            return path.read_bytes()
        except FileNotFoundError:
            hint = self._hint(path, source)
            base = self._base(source)
            raise Refused(
                "image missing", f"{where} is {shown(reference, 100)}, which the folder {base} does not hold{hint}"
            ) from None
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise Refused(
                "image missing", f"{where} is {shown(reference, 100)}, which cannot be read: {reason}"
            ) from None

    def _base(self, source: Path) -> Path:
        return self.folder if self.folder is not None else source.parent

    def _path(self, reference: str, where: str, source: Path) -> Path:
        """The path inside the folder. Links are followed, `..` and absolute paths may not lead out of it."""
        text = reference
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        elif _SCHEME.match(text):
            raise Refused(
                "image is an address",
                f"{where} is {shown(reference, 100)}; images are not downloaded, accepted are paths of local files",
            )
        base = os.path.abspath(self._base(source))
        path = os.path.normpath(os.path.join(base, text))
        if os.path.commonpath([base, path]) != base:
            more = "" if self.folder is not None else "; give the folder of the images with --images"
            raise Refused(
                "image outside the folder",
                f"{where} is {shown(reference, 100)}, outside of the folder {self._base(source)}; accepted are paths "
                f"inside it{more}",
            )
        return Path(path)

    def _hint(self, path: Path, source: Path) -> str:
        """Where else the file lies, if the user named a folder too high or too low."""
        if self.folder is None:
            return "; give the folder of the images with --images"
        base = Path(os.path.abspath(self.folder))
        parts = path.relative_to(base).parts
        for k in range(1, len(parts)):
            if base.joinpath(*parts[k:]).is_file():
                above = "/".join(parts[:k])
                return f", but '{'/'.join(parts[k:])}' is there; give the folder that holds '{above}'"
        return ""


def _inline(reference: str, where: str) -> bytes:
    header, _, text = reference.partition(",")
    if not header.lower().endswith(";base64"):
        raise Refused("image unreadable", f"{where} is {shown(header)}; accepted is data:image/...;base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("image unreadable", f"{where} is not base64: {error}") from None


def _as_png(image: Image.Image, where: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    if buffer.tell() > MAX_MEMBER_BYTES:
        raise Refused(
            "image unreadable", f"{where} has {buffer.tell()} bytes as PNG; at most {MAX_MEMBER_BYTES} are accepted"
        )
    return buffer.getvalue()
