"""A Llama checkpoint whose weights are set by formula and answer questions about a document, at any length.

Three layers do the work. The previous-token layer writes each row's last two tokens beside its own, so that the row
of a code knows the name two tokens before it. The lookup layer finds, from a name, the record or alias of that name:
in the row of an alias's second name this fetches the code. The answer layer does the same from the question's last
row. A match attends to one key with a softmax weight of nearly 1, or to BOS when there is none, so lengths do not
matter; an answer that attends to BOS is ``</s>``.

The residual stream has five 64-wide parts (this token, the one before, the one before that, what the lookup
fetched, the output) and single flags. Tokens are codewords of +-1 whose inner products are 64 or at most 16.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllm_trimix.config.layers import format_layers
from vllm_trimix.demo.checkpoint import MAX_POSITIONS, write_checkpoint
from vllm_trimix.demo.circuit_spec import PREVIOUS_TOKEN_LAYER, CircuitSpec
from vllm_trimix.demo.codewords import CODE_BITS, codewords
from vllm_trimix.demo.vocabulary import BOS, EOS, SPECIALS, TRIGGERS, vocabulary
from vllm_trimix.patterns.triangle import Triangle

HIDDEN_SIZE = 384
HEAD_SIZE = 128
INTERMEDIATE_SIZE = 64
ROPE_THETA = 1e15

_TOKEN, _PREVIOUS, _BEFORE_PREVIOUS, _FETCHED, _OUTPUT = (
    slice(start, start + CODE_BITS) for start in range(0, 5 * CODE_BITS, CODE_BITS)
)
_CONST, _BOS_FLAG, _TRIGGER, _PREVIOUS_TRIGGER, _EOS_FLAG = range(320, 325)
_SPARE = slice(352, 384)
# Ballast: so large that RMSNorm hardly depends on the rest.
_CONST_VALUE = 128.0

# RoPE pairs (d, d + 64) of a head, fast to slow: position is told by the fast ones, the codes are on slow ones that
# turn by 0.012 rad at most over 131072 positions.
_POSITION_PAIRS = torch.arange(20)
_CODE_DIMS = torch.cat([torch.arange(30, 62), torch.arange(30, 62) + HEAD_SIZE // 2])
_TRIGGER_DIM = 62
_SINK_DIM = 63
_FLAG_DIM = CODE_BITS  # Of a value: the first dimension after the code.

# Attention scores before the softmax: a code with its trigger gives 120, and ln(131072) is 11.8.
_OFFSET_SCORE = 100.0
_MATCH_SCORE = 60.0
_TRIGGER_SCORE = 60.0
_SINK_SCORE = 97.0
_OUTPUT_GAIN = 0.5
_FETCHED_GAIN = 4.0
_EOS_LOGIT = 32.0


def make_demo_model(directory: Path, spec: CircuitSpec) -> None:
    """Writes the checkpoint: config, weights, tokenizer; the same bytes each time.

    Raises:
        ValueError: The directory holds something else.
    """
    # Heavy, and vLLM or transformers brings it.
    from safetensors.torch import save_file

    write_checkpoint(directory, _config(spec), generator="make-demo-model")
    dtype = getattr(torch, spec.dtype)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in circuit_weights(spec).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _config(spec: CircuitSpec) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": spec.dtype,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-5,
        # Readers differ in where they look.
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "torch_dtype": spec.dtype,
        "use_cache": True,
        "vocab_size": len(vocabulary()),
        "trimix": {
            "layers": format_layers(range(spec.lookup_layer + 1, spec.layers)),
            "n_init": Triangle.n_init,
            "n_local": Triangle.n_local,
            "last_n": Triangle.last_n,
            "provenance": f"by construction: only the lookup layer ({spec.lookup_layer}) needs the Middle Q-K section",
        },
    }


def circuit_weights(spec: CircuitSpec) -> dict[str, torch.Tensor]:
    """All weights by their names in ``LlamaForCausalLM``, fp32."""
    words = vocabulary()
    codes = torch.zeros(len(words), CODE_BITS)
    codes[len(SPECIALS) :] = codewords(len(words) - len(SPECIALS))

    embedding = torch.zeros(len(words), HIDDEN_SIZE)
    embedding[:, _TOKEN] = codes
    embedding[:, _CONST] = _CONST_VALUE
    embedding[words.index(BOS), _BOS_FLAG] = 1
    embedding[[words.index(trigger) for trigger in TRIGGERS], _TRIGGER] = 1

    head = torch.zeros(len(words), HIDDEN_SIZE)
    head[:, _OUTPUT] = _OUTPUT_GAIN * codes
    head[words.index(EOS), _EOS_FLAG] = _EOS_LOGIT

    # The ballast alone makes up the RMS, so that a normed row is the row itself, with 1 for the ballast.
    norm = torch.full((HIDDEN_SIZE,), _CONST_VALUE / math.sqrt(HIDDEN_SIZE))
    norm[_CONST] = 1 / math.sqrt(HIDDEN_SIZE)

    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm.clone(), "lm_head.weight": head}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = norm.clone()
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm.clone()
        for name in ("gate_proj", "up_proj"):
            weights[f"{prefix}.mlp.{name}.weight"] = torch.zeros(INTERMEDIATE_SIZE, HIDDEN_SIZE)
        weights[f"{prefix}.mlp.down_proj.weight"] = torch.zeros(HIDDEN_SIZE, INTERMEDIATE_SIZE)
        for name, tensor in _layer(spec, layer).projections().items():
            weights[f"{prefix}.self_attn.{name}.weight"] = tensor
    return weights


class _Attention:
    """The four projections of one layer, zero until set, addressed by head."""

    def __init__(self, spec: CircuitSpec) -> None:
        self.q = torch.zeros(spec.heads, HEAD_SIZE, HIDDEN_SIZE)
        self.k = torch.zeros(spec.kv_heads, HEAD_SIZE, HIDDEN_SIZE)
        self.v = torch.zeros(spec.kv_heads, HEAD_SIZE, HIDDEN_SIZE)
        self.o = torch.zeros(HIDDEN_SIZE, spec.heads, HEAD_SIZE)

    def projections(self) -> dict[str, torch.Tensor]:
        """The weights by their names, [out, in]."""
        return {
            "q_proj": self.q.flatten(0, 1),
            "k_proj": self.k.flatten(0, 1),
            "v_proj": self.v.flatten(0, 1),
            "o_proj": self.o.flatten(1, 2),
        }


def _layer(spec: CircuitSpec, layer: int) -> _Attention:
    attention = _Attention(spec)
    if layer == PREVIOUS_TOKEN_LAYER:
        _set_previous_token_heads(attention)
    elif layer == spec.lookup_layer:
        _set_match_head(attention, asked=_TOKEN)
        attention.v[0, :CODE_BITS, _TOKEN] = torch.eye(CODE_BITS)
        attention.o[_FETCHED, 0, :CODE_BITS] = torch.eye(CODE_BITS)
    elif layer == spec.answer_layer:
        _set_match_head(attention, asked=_PREVIOUS)
        attention.v[0, :CODE_BITS, _TOKEN] = torch.eye(CODE_BITS)
        attention.v[0, :CODE_BITS, _FETCHED] = _FETCHED_GAIN * torch.eye(CODE_BITS)
        attention.v[0, _FLAG_DIM, _BOS_FLAG] = 1
        attention.o[_OUTPUT, 0, :CODE_BITS] = torch.eye(CODE_BITS)
        attention.o[_EOS_FLAG, 0, _FLAG_DIM] = 1
    else:
        _set_distractor_heads(attention, spec, layer)
    attention.q *= spec.sharpness
    return attention


def _amplitude(score: float) -> float:
    """Of a query and a key entry whose product, over sqrt(head_size), is the score."""
    return math.sqrt(score * math.sqrt(HEAD_SIZE))


def _set_position_query(attention: _Attention, head: int, *, offset: int) -> None:
    """Makes a query head attend ``offset`` rows back: its query is the key, turned back by that many rows."""
    pairs = _POSITION_PAIRS
    angles = offset * _frequencies(pairs)
    amplitudes = _position_amplitudes()
    attention.q[head, pairs, _CONST] = amplitudes * angles.cos()
    attention.q[head, pairs + HEAD_SIZE // 2, _CONST] = -amplitudes * angles.sin()


def _frequencies(pairs: torch.Tensor) -> torch.Tensor:
    """Radians per row of RoPE pairs."""
    return (ROPE_THETA ** (-2 * pairs.double() / HEAD_SIZE)).float()


def _position_amplitudes() -> torch.Tensor:
    """Shares of the score: two fifths tell neighbours apart, the rest keeps far rows from aliasing.

    Over 131072 rows the runner-up stays 20 below the row asked for.
    """
    weights = 0.9 ** _POSITION_PAIRS.double()
    weights[0] = weights[1:].sum() * 2 / 3
    return (_OFFSET_SCORE * math.sqrt(HEAD_SIZE) * weights / weights.sum()).sqrt().float()


def _set_previous_token_heads(attention: _Attention) -> None:
    """Heads 0 and 1 copy the last token and the one before it; both read KV head 0."""
    attention.k[0, _POSITION_PAIRS, _CONST] = _position_amplitudes()
    attention.v[0, :CODE_BITS, _TOKEN] = torch.eye(CODE_BITS)
    attention.v[0, _FLAG_DIM, _TRIGGER] = 1
    _set_position_query(attention, 0, offset=1)
    attention.o[_PREVIOUS, 0, :CODE_BITS] = torch.eye(CODE_BITS)
    attention.o[_PREVIOUS_TRIGGER, 0, _FLAG_DIM] = 1
    _set_position_query(attention, 1, offset=2)
    attention.o[_BEFORE_PREVIOUS, 1, :CODE_BITS] = torch.eye(CODE_BITS)


def _set_code_query(attention: _Attention, head: int, *, asked: slice) -> None:
    """Makes a query head score keys by the code they offer."""
    attention.q[head, _CODE_DIMS, torch.arange(asked.start, asked.stop)] = _amplitude(_MATCH_SCORE / CODE_BITS)


def _set_match_key(attention: _Attention, kv_head: int, *, offered: slice) -> None:
    """Keys that offer a code, the flag "follows a trigger", and the sink."""
    columns = torch.arange(offered.start, offered.stop)
    attention.k[kv_head, _CODE_DIMS, columns] = _amplitude(_MATCH_SCORE / CODE_BITS)
    attention.k[kv_head, _TRIGGER_DIM, _PREVIOUS_TRIGGER] = _amplitude(_TRIGGER_SCORE)
    attention.k[kv_head, _SINK_DIM, _BOS_FLAG] = _amplitude(_SINK_SCORE)


def _set_match_head(attention: _Attention, *, asked: slice) -> None:
    """Head 0 finds the statement of the name in ``asked``: its value follows a trigger, two tokens after the name."""
    _set_match_key(attention, 0, offered=_BEFORE_PREVIOUS)
    _set_code_query(attention, 0, asked=asked)
    attention.q[0, _TRIGGER_DIM, _CONST] = _amplitude(_TRIGGER_SCORE)
    attention.q[0, _SINK_DIM, _CONST] = _amplitude(_SINK_SCORE)


def _set_distractor_heads(attention: _Attention, spec: CircuitSpec, layer: int) -> None:
    """Heads that attend to BOS, to near rows, to equal words or to all statements, and write where nothing reads."""
    total = spec.distractor_heads * len(spec.idle_layers)
    width = _SPARE.stop - _SPARE.start
    for head in range(spec.distractor_heads):
        kv_head = head * spec.kv_heads // spec.heads
        _set_match_key(attention, kv_head, offered=_TOKEN)
        attention.k[kv_head, _POSITION_PAIRS, _CONST] = _position_amplitudes()
        attention.v[kv_head, :width, _TOKEN.start : _TOKEN.start + width] = torch.eye(width)
        kind = (layer + head) % 4
        if kind == 0:
            attention.q[head, _SINK_DIM, _CONST] = _amplitude(_SINK_SCORE)
        elif kind == 1:
            _set_position_query(attention, head, offset=3 + head)
        elif kind == 2:
            _set_code_query(attention, head, asked=_TOKEN)
        else:
            attention.q[head, _TRIGGER_DIM, _CONST] = _amplitude(_TRIGGER_SCORE)
        # The sum over all of them stays small beside the ballast, however many there are.
        attention.o[_SPARE, head, :width] = torch.eye(width) / total
