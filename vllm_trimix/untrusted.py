"""Reading what others wrote: JSON files with limits, and values quoted in errors, whatever they are.

A file may be anything: no file, a device, huge, nested without end. A value may be too. Both end in a ``ValueError`` of
a few lines at most.
"""

from __future__ import annotations

import codecs
import json
import math
import reprlib
from pathlib import Path
from typing import Any

MAX_TOKENS = 2**31 - 1
"""Of every setting that counts tokens: what the kernels' 32-bit positions hold."""

# The longer ones first: one begins with another.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXTS = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"PAR1", "Parquet"),
    (b"(\xb5/\xfd", "zstd"),
    (b"BZh", "bzip2"),
)

_MAX_QUOTED = 200
_MAX_KEYS = 100


class _Quoter(reprlib.Repr):
    """``repr`` in bounded time and space."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxother = 4, 4, 6, _MAX_QUOTED
        self.maxstring = 120

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out integers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 256 else f"<a whole number of {x.bit_length()} bits>"


def quoted(value: Any) -> str:
    """A value for an error: like ``repr``, on one line, of at most some 200 characters."""
    text = _Quoter().repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."


def check_object(value: dict[Any, Any], where: str) -> None:
    """Refuses what no JSON object of settings looks like, before anyone spends time on it.

    Raises:
        ValueError: A key that is no string, or more keys than any entry has.
    """
    if not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {quoted(value)} has keys that are no strings")
    if len(value) > _MAX_KEYS:
        raise ValueError(f"{where}: {quoted(list(value))} are {len(value)} keys; there are fewer than {_MAX_KEYS}")


def reason(error: BaseException) -> str:
    """What an error says, without the path in full."""
    text = (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."


def read_json(path: Path, label: str, *, max_bytes: int) -> Any:
    """The JSON of a file: no key twice in an object, only finite numbers.

    Args:
        path: A regular file, or a link to one.
        label: What to call it in errors.
        max_bytes: Its limit.

    Raises:
        ValueError: Starting with ``label``.
    """
    try:
        # Neither a device nor a pipe: one never ends, the other may never begin.
        if not path.is_file():
            raise ValueError(f"{label}: there is no such file")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{label}: cannot be read: {reason(error)}") from None
    if len(raw) > max_bytes:
        raise ValueError(f"{label}: is larger than {max_bytes} bytes, the limit")
    try:
        return json.loads(
            raw.decode(), object_pairs_hook=plain_object, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{label}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{label}: {reason(error)}") from None


def plain_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``.

    Raises:
        ValueError: A key stands twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {quoted(key)} stands twice in one object; keep one")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(text)} is too large for a number")
    return value


def read_text(path: Path, label: str) -> str:
    """A text file: UTF-8 whatever the locale, or what its byte-order mark says; without that mark.

    Args:
        path: The file.
        label: What to call it in errors.

    Raises:
        ValueError: Starting with ``label``, and naming the line.
        OSError: It can't be read.
    """
    raw = path.read_bytes()
    kind = next((name for mark, name in _NO_TEXTS if raw.startswith(mark)), None)
    if kind is not None:
        raise ValueError(f"{label}: is a {kind} file, no text; unpack or convert it first")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            # The decoder counts from behind the mark.
            start = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
            line = raw.count(b"\n", 0, start) + 1
            hint = "UTF-16 without its mark?" if b"\x00" in raw[:100] else "write the file as UTF-8"
            raise ValueError(f"{label}, line {line}: byte 0x{raw[start]:02x} is not UTF-8; {hint}") from None
        raise ValueError(
            f"{label}: is not the {encoding.upper()} that its first bytes promise; save it as UTF-8"
        ) from None
