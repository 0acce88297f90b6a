"""Device code inside an extension: keeps that of one architecture and zeroes the rest, at unchanged offsets.

nvcc puts fat binaries into an ELF section ``.nv_fatbin``, one region after another. A region is a header (u32 magic,
u16 version, u16 header size, u64 size of what follows) and images. An image is a header (u16 kind: 1 PTX, 2 machine
code; u16; u32 header size; u64 padded payload size; at byte 28 u32 architecture) and its payload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = 0xBA55ED50
_SECTION = ".nv_fatbin"
_PTX, _MACHINE_CODE = 1, 2
_REGION_HEADER, _IMAGE_HEADER = 16, 48


@dataclass(frozen=True)
class Image:
    """Code for one architecture.

    Attributes:
        offset: Where its header starts, in bytes from the file's start.
        size: Header and payload, in bytes.
        machine_code: Whether it is machine code; else PTX, which the driver compiles.
        architecture: 90 for sm_90 and sm_90a.
    """

    offset: int
    size: int
    machine_code: bool
    architecture: int


@dataclass(frozen=True)
class Region:
    """One fat binary.

    Attributes:
        offset: Where its header starts, in bytes from the file's start.
        images_offset: Where its first image starts.
        images: In the file's order, without gaps.
    """

    offset: int
    images_offset: int
    images: tuple[Image, ...]


def regions(data: bytes | bytearray) -> list[Region]:
    """The fat binaries of an extension.

    Args:
        data: A 64-bit little-endian ELF file.

    Raises:
        ValueError: It is no such file, or its device code is laid out in another way.
    """
    found: list[Region] = []
    for start, size in _sections(data, _SECTION):
        offset, end = start, start + size
        while offset + _REGION_HEADER <= end:
            magic, _, header, following = struct.unpack_from("<IHHQ", data, offset)
            if magic == 0:
                # Padding between regions, which are aligned to 8 bytes.
                offset += 8
                continue
            if magic != MAGIC:
                raise ValueError(f"byte {offset}: magic {magic:#x} is not a fat binary's {MAGIC:#x}; {_OTHER_LAYOUT}")
            first, offset_after = offset + header, offset + header + following
            if offset_after > end:
                raise ValueError(
                    f"byte {offset}: a region of {following} bytes ends after its section; {_OTHER_LAYOUT}"
                )
            found.append(Region(offset, first, tuple(_images(data, first, offset_after))))
            offset = offset_after
    return found


def thin(data: bytes, architecture: int) -> tuple[bytes, int]:
    """An extension with the machine code of one architecture.

    Each region keeps its place: kept images move to its front, its size says so, the rest of its bytes are zero, which
    compresses to nothing. A region without the architecture keeps its smallest image, as the stock file has regions
    for other architectures only; a fat binary without images is not well-formed.

    Args:
        data: A 64-bit little-endian ELF file.
        architecture: 90 for sm_90 and sm_90a.

    Returns:
        The thinned file, as long as ``data``, and how many bytes were zeroed.

    Raises:
        ValueError: It is no such file, or its device code is laid out in another way.
    """
    thinned, zeroed = bytearray(data), 0
    for region in regions(data):
        if not region.images:
            continue
        kept = [image for image in region.images if image.machine_code and image.architecture == architecture]
        kept = kept or [min(region.images, key=lambda image: image.size)]
        body = b"".join(data[image.offset : image.offset + image.size] for image in kept)
        length = sum(image.size for image in region.images)
        thinned[region.images_offset : region.images_offset + length] = body.ljust(length, b"\0")
        struct.pack_into("<Q", thinned, region.offset + 8, len(body))
        zeroed += length - len(body)
    return bytes(thinned), zeroed


_OTHER_LAYOUT = "this CUDA version lays device code out in another way: teach benchmarks/gpu/archive/fatbin.py"


def _sections(data: bytes | bytearray, wanted: str) -> Iterator[tuple[int, int]]:
    """Offset and size of the sections of a name."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(
            f"the file starts with {bytes(data[:6])!r}; only 64-bit little-endian ELF files can be thinned"
        )
    (table,) = struct.unpack_from("<Q", data, 40)
    entry, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + index * entry) for index in range(count)]
    for header in headers:
        name_at = headers[names][4] + header[0]
        name = bytes(data[name_at : data.index(b"\0", name_at)]).decode()
        if name == wanted:
            yield header[4], header[5]


def _images(data: bytes | bytearray, offset: int, end: int) -> Iterator[Image]:
    while offset < end:
        if offset + _IMAGE_HEADER > end:
            raise ValueError(f"byte {offset}: {end - offset} bytes are left, too few for an image; {_OTHER_LAYOUT}")
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, offset)
        (architecture,) = struct.unpack_from("<I", data, offset + 28)
        size = header + payload
        if kind not in (_PTX, _MACHINE_CODE) or header < _IMAGE_HEADER or offset + size > end:
            raise ValueError(
                f"byte {offset}: an image of kind {kind} with {header} + {payload} bytes does not fit; {_OTHER_LAYOUT}"
            )
        yield Image(offset, size, kind == _MACHINE_CODE, architecture)
        offset += size
