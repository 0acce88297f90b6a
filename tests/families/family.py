"""What the matrix says of a family of models: its configuration, and what TRIMIX does there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOCAB_SIZE = 512
WINDOW = 64
"""Of models that have windows: shorter than the prompts."""

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
THREE_WINDOWS, THREE_LINEAR = [SLIDING, SLIDING, SLIDING, FULL] * 2, [LINEAR, LINEAR, LINEAR, FULL] * 2
"""``layer_types`` as many have them."""
NO_CLASS = "transformers has no class of it"

TOY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Sizes that most configurations name alike; heads are of 32."""


LLAMA: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
"""What files of models like Llama have besides."""


def toy(architecture: str, model_type: str, *without: str, **keys: Any) -> dict[str, Any]:
    """A config.json of toy sizes.

    Args:
        architecture: Its only ``architectures`` entry.
        model_type: Its ``model_type``.
        without: Keys of ``TOY`` that files of this family don't have.
        keys: What they have besides, or otherwise.
    """
    return {"architectures": [architecture], "model_type": model_type, **without_keys(TOY, *without), **keys}


def without_keys(config: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """A configuration less some keys."""
    return {key: value for key, value in config.items() if key not in without}


@dataclass(frozen=True)
class Family:
    """One line of the matrix. What it expects is written by hand, from what the published model is.

    Attributes:
        name: As its makers call it.
        published: A model on the Hugging Face hub whose config.json has these keys; empty: they are those that the
            class in vLLM reads, no published file being known here.
        config: The config.json.
        sparse: Layers in which triangle rows must be counted, where all layers are chosen.
        stock: The other layers, with the reason that the start-up line must give.
        outcome: ``served``; ``refused`` at start, in one line; or ``stock_fails``: vLLM itself doesn't serve it here.
        words: What the refusal, or stock vLLM's failure, says.
        truth: ``hf``: log-probabilities are compared with Hugging Face's; else why they can't be.
        truth_config: What Hugging Face must be told otherwise than the file says, to compute what vLLM does.
        covers: Registered architectures that this entry stands for; None for those of the configuration.
        engine: Arguments of the engine besides those that all families get.
        std: Standard deviation of drawn weights; attention must bite, and the logits stay finite.
        attention_std: Of those of the attention; None: the same.
        passes: How often each of its attentions runs in one pass of the model.
        attentions: Layers of the attentions, by the number in their names; empty: the name has the layer's.
        own_code: Published with a configuration class of its own, for ``trust_remote_code``.
        attribute_map: What that class calls by other names than the file.
        mistral: The files are in Mistral's own format: params.json and consolidated.safetensors.
        note: For readers of the page.
        feature: What the fast tests run it for; empty: only the slow ones do.
    """

    name: str
    published: str
    config: Mapping[str, Any]
    sparse: frozenset[int] = frozenset()
    stock: Mapping[int, str] = field(default_factory=dict)
    outcome: Literal["served", "refused", "stock_fails"] = "served"
    words: str = ""
    truth: str = "hf"
    truth_config: Mapping[str, Any] = field(default_factory=dict)
    covers: tuple[str, ...] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    std: float = 0.2
    attention_std: float | None = None
    passes: int = 1
    attentions: tuple[int, ...] = ()
    own_code: bool = False
    attribute_map: Mapping[str, str] = field(default_factory=dict)
    mistral: bool = False
    note: str = ""
    feature: str = ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Registered names that this entry stands for."""
        return tuple(self.config["architectures"]) if self.covers is None else self.covers

    @property
    def stds(self) -> tuple[float, float]:
        """Both."""
        return self.std, self.std if self.attention_std is None else self.attention_std

    @property
    def dtype(self) -> str:
        """That the engine computes in."""
        return str(self.engine.get("dtype", "float32"))

    def layer_of(self, name: str) -> int:
        """The layer that an attention belongs to, by the name that vLLM's model gave it."""
        number = next(int(part) for part in name.split(".") if part.isdecimal())
        return self.attentions[number] if self.attentions else number

    @property
    def slug(self) -> str:
        """The name as a file's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower()).strip("-")


def layers(*numbers: int, first: int | None = None, last: int | None = None) -> frozenset[int]:
    """Layers by number, or a run of them."""
    return frozenset(numbers) if first is None or last is None else frozenset(range(first, last + 1))


ALL_FOUR = layers(0, 1, 2, 3)
