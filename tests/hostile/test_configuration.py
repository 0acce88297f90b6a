"""Whatever stands in the configuration or a preset: a valid result, or a short ValueError that says where."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.values import CONFIG_KEYS, ENTRY, LAYERS, ODD, TOKENS, VALUES, nested
from tests.tiers import Tier
from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.preset_files import MAX_BASES, MAX_PRESET_BYTES
from vllm_trimix.config.resolve import resolve
from vllm_trimix.untrusted import MAX_TOKENS

NUM_LAYERS, NUM_HEADS = 32, 4
MAX_MESSAGE = 20_000


def outcome(raw: object, *names: str, model_entry: object = None) -> str:
    """Resolves; checks that the result is sound, or that the error is short and names one of ``names`` or a key."""
    try:
        resolved = resolve(raw, model="m", num_layers=NUM_LAYERS, model_entry=model_entry, num_heads=NUM_HEADS)
    except ValueError as error:
        message = str(error)
        assert len(message) < MAX_MESSAGE
        assert "\n" not in message
        named = ("trimix", "TRIMIX", *names)
        assert any(name in message for name in named), f"{message!r} names none of {named}"
        return "refused"
    assert_sound(resolved)
    return "accepted"


def assert_sound(resolved: Resolved) -> None:
    """What every process can obey: it survives JSON, and no number of it overflows."""
    assert Resolved.model_validate_json(json.dumps(resolved.model_dump(mode="json"))) == resolved
    assert list(resolved.layers) == sorted(set(resolved.layers) & set(range(NUM_LAYERS)))
    counts = [resolved.n_init, resolved.n_local, resolved.last_n, resolved.min_prompt_len]
    if resolved.shallow is not None:
        shallow = resolved.shallow
        counts += [shallow.last_n, shallow.min_seq_len, shallow.dense_len]
        assert not set(shallow.layers) & set(resolved.layers)
        for layer in shallow.layers:
            assert len(shallow.heads_of(layer, 0, NUM_HEADS)) == NUM_HEADS
    assert all(type(count) is int and 0 <= count <= MAX_TOKENS + 128 for count in counts)
    assert resolved.n_local >= 1
    assert 0 <= resolved.stats_log_interval <= 86400
    assert len(resolved.fingerprint) == 16


def fuzz(tier: Tier, name: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], str], *, sample: int) -> None:
    """Checks many values; both outcomes must have been met often, or the values prove little."""
    met: Counter[str] = Counter()

    @settings(
        max_examples=tier.size(sample=sample, full=40 * sample),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=bool(tier.size(sample=1, full=0)),
    )
    @given(value=strategy)
    def run(value: Any) -> None:
        met[check(value)] += 1
        tier.case(name, met.total())

    run()
    least = met.total() // 50
    assert all(met[kind] > least for kind in ("accepted", "refused")), met


@pytest.mark.tier("I")
def test_any_entry(tier: Tier) -> None:
    fuzz(tier, "entry", ENTRY | VALUES, lambda raw: outcome(raw, *_keys(raw)), sample=300)


@pytest.mark.tier("I")
def test_any_entry_of_the_models_own_config(tier: Tier) -> None:
    fuzz(tier, "model", ENTRY, lambda entry: outcome(None, "config.json", model_entry=entry), sample=100)


FILES = ("a.json", "b.json", "c.json")
PLACES = "folder folder/link.json loop.json missing.json pipe.json zero.json folder.json deep.json .. . / Qwen/Qwen3-8B"
BASES = st.sampled_from((*FILES, *FILES, *PLACES.split(), *ODD, 3, None, ["a.json"]))
SANE = st.fixed_dictionaries({}, optional={"layers": LAYERS, "n_local": st.integers(1, 9), "n_init": TOKENS})
OVERLAY = st.builds(
    lambda entry, base, extra: {**entry, **base, **extra},
    SANE | ENTRY,
    st.fixed_dictionaries({"base": BASES}) | st.just({}),
    st.dictionaries(st.sampled_from(("provenance", "models", "preset")), VALUES, max_size=1) | st.just({}),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every kind that a base may name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder" / "link.json").symlink_to("../a.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.tier("I")
def test_any_preset_files(folder: Path, tier: Tier) -> None:
    """Three files that may build on one another, on links, on devices, on a pipe, on nothing."""

    def check(entries: tuple[Any, ...]) -> str:
        for name, entry in zip(FILES, entries, strict=True):
            (folder / name).write_text(json.dumps(entry))
        return outcome({"preset": "a.json"}, *FILES, "preset")

    fuzz(tier, "files", st.tuples(OVERLAY | SANE | VALUES, OVERLAY | SANE, SANE), check, sample=150)


@pytest.mark.tier("I")
def test_any_damage_to_a_preset_file(folder: Path, tier: Tier) -> None:
    whole = json.dumps({"layers": "16-31", "n_local": 512, "shallow": {"pattern": "a_shape", "n_init": 4}}).encode()
    # Often a digit for a digit: such files are accepted now and then.
    digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
    places = st.sampled_from(digits) | st.integers(0, len(whole) - 1)
    edits = st.lists(st.tuples(places, st.sampled_from(b"0123456789") | st.integers(0, 255)), min_size=1, max_size=3)

    def check(changes: list[tuple[int, int]]) -> str:
        text = bytearray(whole)
        for place, byte in changes:
            text[place] = byte
        (folder / "a.json").write_bytes(text)
        return outcome({"preset": "a.json"}, "a.json")

    fuzz(tier, "damage", edits, check, sample=150)


def test_a_check_that_anything_passes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle itself: an unnamed key, a long text, an overflowing number and another exception are all seen."""
    for message in ("no name", "trimix " + "x" * MAX_MESSAGE, "trimix\n"):
        with monkeypatch.context() as patched:
            patched.setattr("tests.hostile.test_configuration.resolve", _raiser(ValueError(message)))
            with pytest.raises(AssertionError):
                outcome({})
    with monkeypatch.context() as patched:
        patched.setattr("tests.hostile.test_configuration.resolve", _raiser(KeyError("x")))
        with pytest.raises(KeyError):
            outcome({})
    sound = resolve({"layers": "1"}, model="m", num_layers=NUM_LAYERS)
    with pytest.raises(AssertionError):
        assert_sound(sound.model_copy(update={"last_n": 10**12}))


LARGE: dict[str, Any] = {
    "a key of ten million characters": {"k" * 10**7: 1},
    "a million keys": {f"key{number}": 1 for number in range(10**6)},
    "a value of ten million characters": {"n_local": "x" * 10**7},
    "layers of ten million characters": {"layers": "1," * 5 * 10**6},
    "a million layers": {"layers": [1] * 10**6},
    "a million bad layers": {"layers": [None] * 10**6},
    "a preset of ten million characters": {"preset": "x" * 10**7},
    "a pattern of ten million characters": {"layers": "1", "shallow": {"pattern": "x" * 10**7}},
    "a parameter of ten million characters": {"layers": "1", "shallow": {"pattern": "a_shape", "k" * 10**7: 1}},
    "a million parameters": {"layers": "1", "shallow": {"pattern": "a_shape", **{f"k{n}": 1 for n in range(10**6)}}},
    "heads beside a million parameters": {
        "layers": "1",
        "shallow": {"heads": "x", **{f"k{n}": 1 for n in range(10**6)}},
    },
    "heads of ten million characters": {"layers": "1", "shallow": {"heads": "x" * 10**7}},
    "an integer of five thousand digits": {"n_local": 10**5000},
    "a layer of five thousand digits": {"layers": [10**5000]},
    "a first layer of five thousand digits": {"starting_layer": 10**5000},
    "two spellings of five thousand digits": {"starting_layer": 10**5000, "layers": [10**5000]},
    "a million bad layers of a pattern": {"layers": "1", "shallow": {"pattern": "a_shape", "layers": [None] * 10**6}},
    "deep": {"layers": nested(20_000)},
    "deep shallow": {"layers": "1", "shallow": {"pattern": nested(20_000)}},
    "deep key": {"unknown": nested(20_000)},
}


@pytest.mark.tier("I")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LARGE)
def test_large_entries_are_refused_in_short_words(name: str, tier: Tier) -> None:
    assert outcome(LARGE[name], *map(str, CONFIG_KEYS)) == "refused"
    tier.case("large", name)


@pytest.mark.tier("I")
def test_large_files_are_not_read(folder: Path, tier: Tier) -> None:
    with open(folder / "a.json", "wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(ValueError, match=f"a.json.*larger than {MAX_PRESET_BYTES} bytes"):
        resolve({"preset": "a.json"}, model="m", num_layers=NUM_LAYERS)
    tier.case("files", "100 GiB")


@pytest.mark.tier("I")
def test_long_chains_end(folder: Path, tier: Tier) -> None:
    for number in range(MAX_BASES + 1):
        (folder / f"{number}.json").write_text(json.dumps({"base": f"{number + 1}.json"}))
    (folder / f"{MAX_BASES}.json").write_text('{"layers": "3"}')
    assert resolve({"preset": "1.json"}, model="m", num_layers=NUM_LAYERS).layers == (3,)
    with pytest.raises(ValueError, match=f"'{MAX_BASES}.json' is one preset too many: at most {MAX_BASES}"):
        resolve({"preset": "0.json"}, model="m", num_layers=NUM_LAYERS)
    tier.case("files", "chain")


def _keys(raw: object) -> list[str]:
    return [key for key in raw if key] if isinstance(raw, dict) else []


def _raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail
