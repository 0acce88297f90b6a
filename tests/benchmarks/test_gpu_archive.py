"""The archive for a GPU machine without a network: what is thinned, packed, refused and unpacked."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu.archive import known, packages, size, verify
from benchmarks.gpu.archive.fatbin import MAGIC, regions, thin
from benchmarks.gpu.archive.pack import split

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT / "benchmarks" / "gpu" / "archive"
PTX, MACHINE_CODE = 1, 2


def image(kind: int, architecture: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", architecture)
    return header.ljust(64, b"\0") + payload


def region(*images: bytes) -> bytes:
    body = b"".join(images)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def extension(device_code: bytes) -> bytes:
    """An ELF file with a section of device code after one of text, and a name table."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    text = b"code" * 16
    code_at = 64 + len(text)
    names_at = code_at + len(device_code)
    table_at = names_at + len(names)

    def header(name: bytes, offset: int, length: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", names.index(name), 1, 0, 0, offset, length, 0, 0, 1, 0)

    table = bytes(64) + header(b".text\0", 64, len(text)) + header(b".nv_fatbin\0", code_at, len(device_code))
    table += header(b".shstrtab\0", names_at, len(names))
    start = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table_at, 0, 64, 0, 0, 64, 4, 3
    )
    return start + text + device_code + names + table


def test_thinning_keeps_one_architecture_and_every_offset() -> None:
    old, new, ptx = image(MACHINE_CODE, 80, b"a" * 40), image(MACHINE_CODE, 90, b"b" * 24), image(PTX, 90, b"c" * 16)
    # Eight bytes between regions, as the linker aligns them.
    data = extension(region(old, new, ptx) + bytes(8) + region(new, old))
    thinned, zeroed = thin(data, 90)
    assert len(thinned) == len(data)
    assert zeroed == 2 * len(old) + len(ptx)
    before, after = regions(data), regions(thinned)
    assert [found.offset for found in after] == [found.offset for found in before]
    for found in after:
        (kept,) = found.images
        assert (kept.architecture, kept.machine_code) == (90, True)
        assert thinned[kept.offset : kept.offset + kept.size] == new
    assert b"a" * 40 not in thinned
    assert b"c" * 16 not in thinned


def test_a_region_without_the_architecture_keeps_its_smallest_image() -> None:
    large, small = image(MACHINE_CODE, 100, b"a" * 40), image(MACHINE_CODE, 80, b"b" * 8)
    thinned, zeroed = thin(extension(region(large, small)), 90)
    (found,) = regions(thinned)
    assert [kept.architecture for kept in found.images] == [80]
    assert zeroed == len(large)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MZ" + bytes(100), "only 64-bit little-endian ELF files"),
        (extension(struct.pack("<IHHQ", 0x1234, 1, 16, 0)), "magic 0x1234 is not a fat binary's 0xba55ed50"),
        (extension(struct.pack("<IHHQ", MAGIC, 1, 16, 4096)), "a region of 4096 bytes ends after its section"),
        (extension(region(bytes(20))), "20 bytes are left, too few for an image"),
        (extension(region(image(7, 90, b"a"))), "an image of kind 7"),
        (extension(region(image(PTX, 90, b"a" * 16)[:-8])), "an image of kind 1 with 64 + 16 bytes does not fit"),
    ],
    ids=["no-elf", "magic", "region", "short", "kind", "payload"],
)
def test_other_layouts_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        thin(data, 90)


def test_too_large_to_travel() -> None:
    assert size.check(50 * size.MIB, 14 * size.MIB) == (
        "archive 50.0 MiB + working tree 14.0 MiB = 64.0 MiB, of 64 MiB"
    )
    with pytest.raises(ValueError, match=r"= 64\.1 MiB is over the limit of 64 MiB; move large files .* or leave"):
        size.check(50 * size.MIB, 14 * size.MIB + size.MIB // 10)


def test_what_travels_of_a_checkout(tmp_path: Path) -> None:
    for command in (["init", "-q"], ["add", "-A"]):
        (tmp_path / ".gitignore").write_text("/ignored\n")
        (tmp_path / "tracked").write_bytes(bytes(100))
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "new").write_bytes(bytes(1000))
    (tmp_path / "ignored").write_bytes(bytes(10000))
    assert size.tree_bytes(tmp_path) == 1100 + len("/ignored\n")
    (tmp_path / "tracked").unlink()
    assert size.tree_bytes(tmp_path) == 1000 + len("/ignored\n")


def test_the_archive_of_this_checkout_is_ignored_by_git() -> None:
    assert subprocess.run(["git", "check-ignore", "-q", ".vp/part00"], cwd=ROOT, check=False).returncode == 0


def test_parts_hold_every_file_once(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"file{index:02d}").write_bytes(os.urandom(1000))
    (tmp_path / "file20").write_bytes(os.urandom(50000))
    groups = split(tmp_path, 4)
    assert sorted(path for group in groups for path in group) == sorted(Path(f"file{i:02d}") for i in range(40))
    assert len(groups) >= 3
    # The large one is unpacked beside the others, not after them.
    assert [len(group) for group in groups if Path("file20") in group] == [1]


def make_archive(folder: Path, parts: int = 2) -> Path:
    """An archive of small parts, as pack.py would write it."""
    folder.mkdir()
    lines = []
    for index in range(parts):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:xz") as tar:
            entry = tarfile.TarInfo(f"package{index}/module.py")
            entry.size = len(b"VALUE = 1\n")
            tar.addfile(entry, io.BytesIO(b"VALUE = 1\n"))
        data = packed.getvalue()
        (folder / f"part{index:02d}").write_bytes(data)
        lines.append(f"part part{index:02d} {len(data)} {hashlib.sha256(data).hexdigest()}")
    (folder / "MANIFEST").write_text("\n".join(lines) + "\n")
    for name in ("unpack.sh", "unpack.py"):
        shutil.copy(ARCHIVE / name, folder)
    return folder


def unpack(archive: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(archive / "unpack.sh"), str(archive), str(target)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_unpacking_fills_the_target_once(tmp_path: Path) -> None:
    archive, target = make_archive(tmp_path / "vp"), tmp_path / "deep" / "site"
    found = unpack(archive, target)
    assert found.returncode == 0, found.stderr
    for index in range(2):
        assert (target / f"package{index}" / "module.py").read_text() == "VALUE = 1\n"
        assert list((target / f"package{index}" / "__pycache__").iterdir())
    assert (target / ".complete").exists()
    assert os.access(target / "bin" / "vllm", os.X_OK)
    (target / "mark").touch()
    again = unpack(archive, target)
    assert again.returncode == 0
    assert "is complete" in again.stdout
    assert (target / "mark").exists()
    # Another archive must not run on the packages of this one.
    (archive / "MANIFEST").write_text((archive / "MANIFEST").read_text() + "package other==1\n")
    assert unpack(archive, target).returncode == 0
    assert not (target / "mark").exists()


@pytest.mark.parametrize("fault", ["changed", "missing", "no manifest", "no part"])
def test_a_broken_archive_leaves_no_target(tmp_path: Path, fault: str) -> None:
    archive, target = make_archive(tmp_path / "vp"), tmp_path / "site"
    if fault == "changed":
        part = archive / "part01"
        part.write_bytes(part.read_bytes()[:-1] + b"!")
    elif fault == "missing":
        (archive / "part01").unlink()
    elif fault == "no manifest":
        (archive / "MANIFEST").unlink()
    else:
        (archive / "MANIFEST").write_text("bytes 0\n")
    found = unpack(archive, target)
    assert found.returncode == 1
    said = {
        "changed": "part01: checksum mismatch",
        "missing": "part01 is missing; carry the archive's whole folder",
        "no manifest": "MANIFEST",
        "no part": "names no part; pack the archive again",
    }[fault]
    assert said in found.stderr
    assert found.stderr.startswith("unpack: error: ")
    assert found.stderr.count("\n") == 1
    assert not target.exists()


def test_an_interrupted_unpacking_is_begun_anew(tmp_path: Path) -> None:
    archive, target = make_archive(tmp_path / "vp"), tmp_path / "site"
    part = archive / "part01"
    data = part.read_bytes()
    part.unlink()
    # Reading the part waits for a writer that never comes.
    os.mkfifo(part)
    child = subprocess.Popen(
        ["bash", str(archive / "unpack.sh"), str(archive), str(target)],
        env={**os.environ, "PYTHON": sys.executable},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "site.partial" / "package0" / "module.py").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not target.exists()
    part.unlink()
    part.write_bytes(data)
    assert unpack(archive, target).returncode == 0
    assert (target / ".complete").exists()
    assert not (tmp_path / "site.partial").exists()


def test_what_the_target_has() -> None:
    found = packages.target_packages()
    assert found["torch"] == "2.11.0"
    assert found["pytest"] is None
    assert not {"vllm", "pydantic", "fastapi"} & found.keys()


def test_known_failures_are_explained_and_not_stale(tmp_path: Path) -> None:
    path = tmp_path / "known.txt"
    path.write_text("# comment\nimport | a.* | no module x | why\nrequirement | b | nothing | why\n")
    entries = known.load(path)
    assert entries.explains("import", "a.b", "ModuleNotFoundError: no module x")
    assert not entries.explains("import", "a.b", "another")
    assert not entries.explains("requirement", "a.b", "no module x")
    assert entries.unused() == ["requirement | b | nothing"]
    path.write_text("import | a.* | no reason\n")
    with pytest.raises(ValueError, match=r"known\.txt:1: .* has not the four fields"):
        known.load(path)
    assert known.load(verify.KNOWN).lines


def test_modules_of_a_package() -> None:
    found = verify.modules(ROOT, "benchmarks.gpu")
    assert {"benchmarks.gpu", "benchmarks.gpu.running.runner", "benchmarks.gpu.archive.fatbin"} <= set(found)


def test_what_verify_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path), "--python", "python0.1"]) == 2
    assert "no interpreter 'python0.1'; README.md" in capsys.readouterr().err
    assert verify.main([str(tmp_path), "--python", sys.executable]) == 2
    assert f"no MANIFEST in '{tmp_path}'; python -m benchmarks.gpu.archive.pack makes" in capsys.readouterr().err


@pytest.mark.slow
def test_packs_for_real(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    command = [sys.executable, "-m", "benchmarks.gpu.archive.pack", "--output", str(tmp_path / "vp")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    if "is a package index within reach?" in found.stderr:
        pytest.skip(f"no package index: {found.stderr.strip()[-200:]}")
    assert found.returncode == 0, found.stderr
    assert unpack(tmp_path / "vp", tmp_path / "site").returncode == 0
    assert (tmp_path / "site" / "vllm" / "_C_stable_libtorch.abi3.so").exists()
    assert (tmp_path / "site" / "pydantic" / "__init__.py").exists()
    assert not (tmp_path / "site" / "torch").exists()
