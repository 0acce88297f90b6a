"""Models without weights, for speed: a config and the demo tokenizer, loaded with ``--load-format dummy``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.config.layers import parse_layers
from vllm_trimix.demo.checkpoint import MAX_POSITIONS, write_checkpoint
from vllm_trimix.demo.vocabulary import vocabulary
from vllm_trimix.patterns.triangle import Triangle

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides a model's speed.

    Attributes:
        head_size: None means hidden_size / heads.
        family: ``llama``, ``qwen2`` or ``qwen3``: the architecture class.
        rope_scaling: Extra entries of ``rope_parameters``.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    head_size: int | None = None
    family: str = "llama"
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the value, the limit and the fix."""
        for name in ("hidden_size", "layers", "heads", "kv_heads", "head_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is too small; choose at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} is not a multiple of kv_heads ({self.kv_heads}); change one of them")
        if self.head_size is None and self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of heads ({self.heads}); "
                f"choose e.g. {64 * self.heads}"
            )
        if self.vocab_size < len(vocabulary()):
            raise ValueError(
                f"vocab_size: {self.vocab_size} is below the {len(vocabulary())} tokens of the demo tokenizer; "
                f"choose at least {len(vocabulary())}"
            )

        if self.head_dim % 2:
            raise ValueError(f"head_size: {self.head_dim} is odd, and RoPE turns pairs; choose an even one, e.g. 64")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_size or self.hidden_size // self.heads


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# fmt: off
SHAPES = {
    # Little beside attention, so that a CPU shows at moderate lengths what long prompts do to large models.
    "bench-8l": ModelShape(
        hidden_size=512, layers=8, heads=8, kv_heads=2, intermediate_size=1024, vocab_size=16384,
    ),
    "llama-3.1-8b": ModelShape(
        hidden_size=4096, layers=32, heads=32, kv_heads=8, intermediate_size=14336, vocab_size=128256,
        rope_scaling=_llama3_rope(8.0),
    ),
    "llama-3.2-1b": ModelShape(
        hidden_size=2048, layers=16, heads=32, kv_heads=8, intermediate_size=8192, vocab_size=128256,
        rope_scaling=_llama3_rope(32.0), tie_word_embeddings=True,
    ),
    "qwen2.5-7b": ModelShape(
        family="qwen2", hidden_size=3584, layers=28, heads=28, kv_heads=4, intermediate_size=18944,
        vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6,
    ),
    "qwen3-8b": ModelShape(
        family="qwen3", hidden_size=4096, layers=36, heads=32, kv_heads=8, head_size=128, intermediate_size=12288,
        vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6,
    ),
}
# fmt: on


def make_bench_model(directory: Path, shape: ModelShape, *, trimix_layers: str | None = None) -> None:
    """Writes config.json, generation_config.json and the tokenizer; no weights.

    Args:
        directory: New, empty, or an earlier model of this package.
        shape: One of ``SHAPES``, or your own.
        trimix_layers: Triangle layers for a ``trimix`` entry in config.json, e.g. ``"4-7"``.

    Raises:
        ValueError: Layers outside the model, or a directory that holds something else.
    """
    config = _config(shape)
    if trimix_layers is not None:
        parse_layers(trimix_layers, num_layers=shape.layers)
        config["trimix"] = {
            "layers": trimix_layers,
            "n_init": Triangle.n_init,
            "n_local": Triangle.n_local,
            "last_n": Triangle.last_n,
            "provenance": "chosen for a speed measurement; the model has no weights to lose accuracy with",
        }
    write_checkpoint(directory, config, generator="make-bench-model")


def _config(shape: ModelShape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            **(shape.rope_scaling or {}),
        },
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    if shape.rope_scaling is not None:
        config["rope_scaling"] = shape.rope_scaling
    if shape.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif shape.family == "qwen3":
        config |= {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config
