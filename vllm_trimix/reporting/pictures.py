"""Pictures as data URIs: only files of the result's own folder, and only formats that can't hold a script."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from urllib.parse import unquote

from vllm_trimix.reporting.sources import is_inside

MAX_BYTES = 16 * 2**20


class NotShown(Exception):
    """Why a picture is not in the page, as the end of a sentence."""


def data_uri(source: str, folder: Path) -> str:
    """A picture of a report, as its page carries it.

    Args:
        source: As the Markdown names it: a path relative to the folder, percent-encoded.
        folder: Where the Markdown lies.

    Raises:
        NotShown: No picture that may stand in the page.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", source):
        raise NotShown("lies elsewhere, and a page holds only its own pictures")
    path = folder / unquote(source)
    if not is_inside(path, folder):
        raise NotShown("lies outside the result's folder")
    try:
        if not path.is_file():
            raise NotShown("is missing")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotShown(f"can't be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise NotShown(f"is larger than {MAX_BYTES // 2**20} MiB, the limit")
    kind = _kind(raw)
    if kind is None:
        raise NotShown("is neither PNG nor JPEG, GIF or WebP")
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _kind(raw: bytes) -> str | None:
    """The format by the first bytes; names can lie."""
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if raw.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if raw.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "webp" if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP" else None
