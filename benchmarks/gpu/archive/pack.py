"""Packs vLLM's official CUDA wheel for one GPU without a network: ``python -m benchmarks.gpu.archive.pack``."""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.gpu.archive import size
from benchmarks.gpu.archive.fatbin import thin
from benchmarks.gpu.archive.packages import TARGET_OPTIONS, closure, pip, target_packages

ROOT = Path(__file__).parents[3]
VLLM = "0.32.0"
# Normalisation, activations, rotary embedding and cache writes; FlashAttention 3; sleep mode; CPU waits. All others
# (mixture of experts, FlashAttention 2 and 4, MLA, quantised products, the Rust front end) vLLM imports where needed.
EXTENSIONS = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/spinloop.abi3.so",
)
_SUFFIXES = (".py", ".jinja", ".json", ".txt", ".html", "py.typed")
_LEFT_OUT = (
    "vllm/third_party/fmha_sm100/",
    "vllm/third_party/deep_gemm/include/",
    "/static/",
    "/fused_moe/configs/",
    "/quantization/utils/configs/",
)
# Unpacked side by side. The two large extensions take one each.
_PARTS = 6
_PRESET = 6


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.archive.pack", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".vp", help="the archive's folder; default: .vp")
    parser.add_argument("--vllm", default=VLLM, help=f"vLLM's version; default: {VLLM}")
    parser.add_argument("--wheel", type=Path, help="vLLM's CUDA wheel, if it is here already")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability without the dot; default: 90")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="pack-") as work:
            site, names = _site(args, Path(work))
            _write(args.output, site, names, args)
        print(size.check(size.folder_bytes(args.output), size.tree_bytes(ROOT)))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"pack: error: {error}", file=sys.stderr)
        return 1
    return 0


def _site(args: argparse.Namespace, work: Path) -> tuple[Path, list[str]]:
    """A folder with vLLM and what it needs, and the names and versions of what it needs."""
    wheel, site = args.wheel, work / "site"
    if wheel is None:
        pip("download", "--no-deps", *TARGET_OPTIONS, "-d", str(work), f"vllm=={args.vllm}")
        (wheel,) = work.glob("vllm-*.whl")
    requirements = extract(wheel, site)
    for name in EXTENSIONS:
        path = site / name
        thinned, zeroed = thin(path.read_bytes(), args.architecture)
        path.write_bytes(thinned)
        print(f"{name}: {zeroed / size.MIB:.1f} of {len(thinned) / size.MIB:.1f} MiB are other device code, zeroed")
    names = closure(requirements, target_packages(), work)
    print(f"{len(names)} packages: {' '.join(names)}")
    wheels = work / "wheels"
    pip("download", "--no-deps", *TARGET_OPTIONS, "-d", str(wheels), *names)
    offline = ["--no-index", "--no-deps", "--no-compile", f"--target={site}"]
    pip("install", *offline, *TARGET_OPTIONS, *(str(path) for path in wheels.glob("*.whl")))
    return site, names


def extract(wheel: Path, site: Path) -> list[str]:
    """Takes out of vLLM's wheel what a dense decoder needs.

    Returns:
        Its requirements without extras.

    Raises:
        ValueError: The wheel lacks an extension.
    """
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        if missing := set(EXTENSIONS) - set(names):
            raise ValueError(f"{wheel.name} lacks {', '.join(sorted(missing))}; is it vLLM {VLLM}'s CUDA wheel?")
        kept = [name for name in names if name in EXTENSIONS or ".dist-info/" in name]
        kept += [name for name in names if name.endswith(_SUFFIXES) and name not in kept]
        file.extractall(site, [name for name in kept if not any(folder in name for folder in _LEFT_OUT)])
        metadata = file.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    lines = (line.removeprefix("Requires-Dist:").strip() for line in metadata.splitlines() if "Requires-Dist:" in line)
    return [line for line in lines if "extra ==" not in line]


def _write(output: Path, site: Path, names: Sequence[str], args: argparse.Namespace) -> None:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    groups = split(site, _PARTS)
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(partial(_compress, site), groups))
    lines = [f"vllm {args.vllm}", f"architecture {args.architecture}"]
    for index, data in enumerate(parts):
        (output / f"part{index:02d}").write_bytes(data)
        lines.append(f"part part{index:02d} {len(data)} {hashlib.sha256(data).hexdigest()}")
    lines.append(f"bytes {sum(map(len, parts))}")
    lines.append(f"sha256 {hashlib.sha256(b''.join(parts)).hexdigest()}")
    lines += [f"package {name}" for name in names]
    for name in ("unpack.sh", "unpack.py"):
        shutil.copy(Path(__file__).with_name(name), output)
    # Last: without it the folder is no archive.
    (output / "MANIFEST").write_text("\n".join(lines) + "\n")


def split(site: Path, parts: int) -> list[list[Path]]:
    """Files of a folder in groups of about the same compressed size, neighbours together.

    Returns:
        Sorted paths relative to ``site``; fewer than ``parts`` groups where there are few files.
    """
    paths = sorted(path.relative_to(site) for path in site.rglob("*") if path.is_file())
    weights = [len(zlib.compress((site / path).read_bytes(), 1)) for path in paths]
    share = sum(weights) / parts
    groups: list[list[Path]] = [[]]
    filled = 0
    for path, weight in zip(paths, weights, strict=True):
        # A file that is a part by itself neither waits for a full one nor fills one.
        if groups[-1] and filled + weight > share:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += weight
    return groups


def _compress(site: Path, paths: Sequence[Path]) -> bytes:
    """The files as .tar.xz; the same files give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in paths:
            entry = tarfile.TarInfo(str(path))
            data = (site / path).read_bytes()
            entry.size, entry.mode = len(data), 0o755 if (site / path).stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(data))
    return lzma.compress(packed.getvalue(), preset=_PRESET)


if __name__ == "__main__":
    sys.exit(main())
