"""What a path may lead to besides a file, and files that would run something if anybody let them."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import Tier
from vllm_trimix.config import head_files
from vllm_trimix.config.resolve import resolve

ROOT = Path(__file__).parents[2]
HEADS = [{"0": ["stream_llm", 1, 1, 0], "1": ["stream_llm", 1, 1, 0]}] * 2


def preset(path: str) -> object:
    return resolve({"preset": path}, model="m", num_layers=2, num_heads=2)


def heads(path: str) -> object:
    return resolve({"layers": "1", "shallow": {"heads": path}}, model="m", num_layers=2, num_heads=2)


READERS = {"preset": preset, "heads": heads}
GOOD = {"preset": {"layers": "1"}, "heads": HEADS}


@pytest.mark.tier("I")
@pytest.mark.parametrize("kind", READERS)
def test_what_a_path_may_lead_to(kind: str, tmp_path: Path, tier: Tier) -> None:
    """None hangs (a pipe without a writer), none reads without end (a device), and each error names the file."""
    good = tmp_path / "good.json"
    good.write_text(json.dumps(GOOD[kind]))
    (tmp_path / "link.json").symlink_to("good.json")
    (tmp_path / "chain.json").symlink_to("link.json")
    for name in ("good.json", "link.json", "chain.json"):
        READERS[kind](str(tmp_path / name))
        tier.case(kind, name)

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("nothing.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "stdin.json").symlink_to("/dev/stdin")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "up.json").symlink_to("../folder.json")
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "utf16.json").write_text("{}", encoding="utf-16")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    (tmp_path / "null.json").write_bytes(good.read_bytes() + b"\0")
    (tmp_path / "two.json").write_bytes(2 * good.read_bytes())
    names = "pipe folder loop dangling zero stdin tree/up empty utf16 bom null two missing good.json/below".split()
    for name in names:
        with pytest.raises(ValueError, match=f"{Path(name).name}\\.json") as refused:
            READERS[kind](str(tmp_path / f"{name}.json"))
        assert len(str(refused.value)) < 600
        tier.case(kind, name)


@pytest.mark.tier("I")
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_may_not_be_read(kind: str, tmp_path: Path, tier: Tier) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    for path in (tmp_path / "secret.json", locked / "inside.json"):
        path.write_text(json.dumps(GOOD[kind]))
    (tmp_path / "secret.json").chmod(0)
    locked.chmod(0)
    code = (
        "import os, sys; from tests.hostile.test_files import READERS; kind, *paths = sys.argv[1:]\n"
        # What is imported late must be imported before.
        "try: READERS[kind]('missing.json')\n"
        "except ValueError: pass\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "for path in paths:\n"
        "    try: print('read', READERS[kind](path))\n"
        "    except ValueError as error: print('refused', error)\n"
    )
    paths = [str(tmp_path / "secret.json"), str(locked / "inside.json")]
    # Root may read everything: the child lays that right down.
    child = subprocess.run(
        [sys.executable, "-c", code, kind, *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    locked.chmod(0o700)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == 2
    for line, path in zip(lines, paths, strict=True):
        assert line.startswith("refused")
        assert Path(path).name in line
        tier.case(kind, Path(path).name)


@pytest.mark.tier("I")
@pytest.mark.parametrize("kind", READERS)
def test_large_files_cost_no_memory(kind: str, tmp_path: Path, tier: Tier) -> None:
    """Files of 100 MB and of 100 GiB, sparse: no more is read than the limit, whatever the size."""
    code = (
        "import sys; from pathlib import Path; from tests.hostile.test_files import READERS, peak\n"
        "kind, path = sys.argv[1:]\n"
        "try: READERS[kind](path + '.not.json')\n"
        "except ValueError: pass\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = peak()\n"
        "try: READERS[kind](path)\n"
        "except ValueError as error: print(peak() - before, error)\n"
    )
    for size in (10**8, 100 * 2**30):
        with open(tmp_path / "large.json", "wb") as file:
            file.truncate(size)
        command = [sys.executable, "-c", code, kind, str(tmp_path / "large.json")]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        grown, message = child.stdout.split(" ", 1)
        assert "large.json" in message
        assert "is larger than" in message
        # The bytes, and a copy on the way.
        assert int(grown) < 2 * head_files.MAX_BYTES + 2**24
        tier.case(kind, size)


def peak() -> int:
    """Largest resident bytes of this process since they were last reset."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:", 1)[1].split(None, 1)[0])


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['TRIMIX_PAYLOAD']}",)


@pytest.mark.tier("I")
@pytest.mark.parametrize("kind", READERS)
def test_nothing_in_a_file_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier) -> None:
    touched = tmp_path / "touched"
    monkeypatch.setenv("TRIMIX_PAYLOAD", str(touched))
    pickle.loads(pickle.dumps(_Payload()))
    assert touched.exists(), "the payload does nothing: this test would prove nothing"
    touched.unlink()
    path = tmp_path / "a.json"
    for number, content in enumerate(
        (
            pickle.dumps(_Payload()),
            b"!!python/object/apply:os.system ['touch %s']" % str(touched).encode(),
            b"__import__('os').system('touch %s')" % str(touched).encode(),
            json.dumps({"layers": "1", "shallow": {"pattern": "os.system"}}).encode(),
            json.dumps({"layers": "1", "shallow": {"pattern": "vllm_trimix.patterns.dense.Dense"}}).encode(),
            json.dumps([{"0": ["vllm_trimix.patterns.dense.Dense", 1, 1, 0]}] * 2).encode(),
            json.dumps({"format": head_files.FORMAT, "layers": [[{"pattern": "__class__"}]] * 2}).encode(),
            json.dumps(
                {"format": head_files.FORMAT, "layers": [[{"pattern": "dense", "__class__": "x"}]] * 2}
            ).encode(),
        )
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json|trimix\.shallow"):
            READERS[kind](str(path))
        assert not touched.exists()
        tier.case(kind, number)


@pytest.mark.tier("I")
def test_readers_can_not_run_what_they_read(tier: Tier) -> None:
    """No module on the way of a file imports or calls what turns text or bytes into code."""
    package = ROOT / "vllm_trimix"
    files = [package / "untrusted.py", *(package / "config").rglob("*.py"), *(package / "patterns").glob("*.py")]
    assert {"resolve.py", "head_files.py", "triangle.py"} <= {file.name for file in files}
    forbidden = {"pickle", "marshal", "shelve", "yaml", "importlib", "runpy", "eval", "exec", "compile", "__import__"}
    for file in files:
        tree = ast.parse(file.read_text())
        found = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        found |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        # The shipped presets are found by importlib.resources, which reads.
        found -= {"importlib"} if file.parent.name == "presets" else set()
        assert not found & forbidden, f"{file.name}: {found & forbidden}"
        tier.case("module", file.name)
