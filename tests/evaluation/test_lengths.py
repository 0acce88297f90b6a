"""Which lengths ``eval`` asks: those that whoever answers takes, and a word about those that it leaves out."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from vllm_trimix.cli import engine_limit, eval_choices
from vllm_trimix.cli.engine_limit import Limit
from vllm_trimix.config.context import ALLOW_LONG
from vllm_trimix.evaluation import askers

PUBLISHED = (4096, 8192, 131072)


def test_default_lengths_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_choices.lengths(None, PUBLISHED, Limit(8192, 8192), "m") == (4096, 8192)
    assert capsys.readouterr().err == "eval: left out 131072 tokens: m takes 8192\n"
    assert eval_choices.lengths(None, PUBLISHED, Limit(1000, 1000), "m") == (1000,)
    assert "left out 4096, 8192, 131072 tokens: m takes 1000" in capsys.readouterr().err
    assert eval_choices.lengths(None, PUBLISHED, Limit(None, None), "m") == PUBLISHED
    assert capsys.readouterr().err == ""


def test_default_lengths_that_the_memory_does_not_hold_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    # 256 KiB a token in fp32; half of the memory is for the model.
    free = 2 * (2**27 + 10000 * 2**18)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    config = LlamaConfig(
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_size=4096,
        max_position_embeddings=131072,
        dtype="float32",
    )
    limit = engine_limit.find(arguments(), config, PUBLISHED)
    assert limit == Limit(131072, 131072, 10000)
    assert eval_choices.lengths(None, PUBLISHED, limit, "m") == (4096, 8192)
    assert "left out 131072 tokens: the memory that is free holds a KV cache for 10000" in capsys.readouterr().err
    assert eval_choices.lengths("131072", PUBLISHED, limit, "m") == (131072,)
    for flags, space in ((["--gpu_memory_utilization=0.3"], ""), ([], "4")):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
        assert engine_limit.find(arguments(flags=flags), config, PUBLISHED).held is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert engine_limit.find(arguments(), config, PUBLISHED).held is None


def test_what_is_asked_for_may_be_more_than_is_usual() -> None:
    assert eval_choices.lengths("16384,4096", PUBLISHED, Limit(None, 4096), "m") == (4096, 16384)
    assert eval_choices.lengths("16384", PUBLISHED, Limit(16384, 4096), "m") == (16384,)
    with pytest.raises(ValueError, match="--lengths: 16385 tokens: m takes 16384; choose at most that"):
        eval_choices.lengths("16385", PUBLISHED, Limit(16384, 4096), "m")


def arguments(**changes: Any) -> Any:
    return SimpleNamespace(**{"model": "m", "flags": [], "server": None, "served": None, **changes})


@pytest.mark.parametrize(
    ("served", "limit"),
    [
        ({"m": 16384}, Limit(16384, 16384)),
        # An adapter is as long as its base model.
        ({"base": 16384, "m": None}, Limit(16384, 16384)),
        ({"m": None}, Limit(4096, 4096)),
    ],
)
def test_a_server_says_how_long_prompts_may_be(
    served: dict[str, int | None], limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [SimpleNamespace(id=name, max_model_len=length) for name, length in served.items()]
    client = contextlib.nullcontext()
    client.models = SimpleNamespace(list=lambda: cards)  # type: ignore[attr-defined]
    monkeypatch.setattr(askers, "connect", lambda url, model: (client, "m"))
    config = LlamaConfig(max_position_embeddings=4096)
    assert engine_limit.find(arguments(server="http://localhost"), config, [8192]) == limit


def test_vllms_variable_lifts_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_LONG, "1")
    config = LlamaConfig(max_position_embeddings=4096)
    assert engine_limit.find(arguments(), config, [8192])[:2] == (None, 4096)
