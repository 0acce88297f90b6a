"""Values that nobody sane would write, and some that come close to what users do write."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vllm_trimix.config.entry import TrimixConfig
from vllm_trimix.patterns.registry import PATTERNS

HUGE = (2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(2**31), -(10**400))
NUMBERS = st.sampled_from(HUGE) | st.integers(-2, 40) | st.integers()
WORDS = (
    "../../etc/passwd /dev/zero 16-31 dense off on triangle Qwen/Qwen3-8B os.system __class__ 0-99999999999 1,,2 3-1"
)
ODD = ("", " ", "\0", "a\0b", "\ud800", "\n", "٣", "²", "9" * 5000, "x" * 5000)
STRINGS = st.text(max_size=12) | st.sampled_from((*ODD, *WORDS.split()))
SCALARS = NUMBERS | STRINGS | st.none() | st.booleans() | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


def nested(depth: int) -> Any:
    """Lists and objects within one another."""
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def near(valid: list[str]) -> st.SearchStrategy[str]:
    """Valid keys mostly, some of them misspelt, and anything."""
    typos = [key[:-1] for key in valid] + [key.upper() for key in valid] + [f" {key}" for key in valid]
    return st.sampled_from(valid) | st.sampled_from(valid) | st.sampled_from(typos) | st.text(max_size=8)


def entry_of(**likely: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects in which each key is likely to have a value that fits, and anything else besides."""
    fitting = st.fixed_dictionaries({}, optional=likely)
    other = st.dictionaries(near(list(likely)), VALUES, max_size=2)
    return st.builds(lambda one, two: {**one, **two}, fitting, other | st.just({}))


LAYERS = st.sampled_from(("16-31", "5,7,10", "", "1", "0-3")) | st.lists(st.integers(0, 31), max_size=4)
TOKENS = st.integers(0, 4096)
PARAMETERS = sorted({name for pattern in PATTERNS.values() for name in pattern.__dataclass_fields__})
SHALLOW = entry_of(
    pattern=st.sampled_from(list(PATTERNS)),
    layers=LAYERS,
    last_n=TOKENS,
    min_seq_len=TOKENS,
    heads=STRINGS,
    **{name: NUMBERS | st.floats(0, 1) for name in PARAMETERS},
)
CONFIG_KEYS = list(TrimixConfig.model_fields)
ENTRY = entry_of(
    starting_layer=st.integers(0, 31),
    layers=LAYERS,
    n_init=TOKENS,
    n_local=st.integers(1, 4096),
    last_n=TOKENS,
    min_prompt_len=TOKENS,
    stats_log_interval=st.floats(0, 60),
    shallow=SHALLOW | st.just("dense"),
)
