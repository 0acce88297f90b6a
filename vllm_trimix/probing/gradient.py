"""Importance of each section of each layer's causal map for an answer, by its gradient.

The map of a layer has three sections (TriangleMix, https://arxiv.org/abs/2507.21526): Streaming (sinks and window),
Last Q-K (the prompt's last rows and the answer's, beyond those), Middle Q-K (the rest: what the triangle hides). With A
the attention probabilities and dA the gradient of the answer's logit with respect to them, as free variables:

- ``contribution``: sum of |A * dA|, what the answer would lose, to first order, without each pair. The default.
- ``gradient``: mean of |dA|, the paper's score. It fires on pairs that carry no attention.
- ``centred``: sum of |A * (dA - sum_k A dA)|, the gradient that reaches the attention scores. It vanishes where the
  softmax is saturated.
- ``mass``: mean over rows of the attention a row pays. It says nothing of what the row is for.

Memory is linear in the prompt: layers are recomputed one by one (gradient checkpointing), each in blocks of query rows.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from vllm_trimix.hf_attention import TriangleAttention, attend, dense_mask, install
from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import SCORES

SECTIONS = ("streaming", "last", "middle")
Objective = Literal["logit", "logprob"]

# Bytes of one block's probabilities, fp32, and the few tensors of its size that exist at a time.
BLOCK_BYTES = 4
BLOCK_TENSORS = 6
# Rows of a block here: smaller than the forward's, as more of them exist at a time.
BLOCK_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer, as tokens.

    Attributes:
        prompt: Token ids.
        answer: Token ids of what the model should say; teacher-forced.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class SectionScores:
    """Scores of one sample.

    Attributes:
        values: Score -> [layer][section], in the order of ``SECTIONS``; 0 in layers that stay stock.
        logprob: Log-probability of the answer, dense, natural log, summed over its tokens.
    """

    values: dict[str, list[list[float]]]
    logprob: float


@dataclass
class _Recorder:
    """Sums that the backward passes of the layers leave: [layers, sections, sums] in fp64, and each layer's heads."""

    pattern: Triangle
    prompt_len: int
    sums: torch.Tensor
    heads: dict[int, int] = field(default_factory=dict)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
        self.heads[layer] = q.shape[1]
        if not torch.is_grad_enabled():
            return attend(q, k, v, **{**rule, "pattern": None})
        out: torch.Tensor = _Probed.apply(q, k, v, self, layer, rule)
        return out


class _Probed(torch.autograd.Function):
    """Dense attention whose backward also records the sections' sums."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, recorder: _Recorder, layer: int, rule: dict[str, Any]) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.recorder, ctx.layer, ctx.rule = recorder, layer, rule
        return attend(q, k, v, **{**rule, "pattern": None})

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = _backward(q, k, v, grads[0], ctx.recorder, ctx.layer, ctx.rule)
        return grad_q, grad_k, grad_v, None, None, None


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    recorder: _Recorder,
    layer: int,
    rule: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of dense attention, a KV head and a block of rows at a time, in fp32; records on the way."""
    _, num_heads, num_rows, _ = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    scale, soft_cap = rule["scale"], rule["soft_cap"]
    for start in range(0, num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, num_rows)
        visible = dense_mask(start, stop, q.device)
        sections = section_masks(recorder.pattern, recorder.prompt_len, start, stop, visible)
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            block_q, block_out = q[0, heads, start:stop].float(), grad_out[0, heads, start:stop].float()
            keys, values = k[0, kv_head, :stop].float(), v[0, kv_head, :stop].float()
            logits = (block_q @ keys.T) * scale
            slope = None
            if soft_cap:
                capped = torch.tanh(logits / soft_cap)
                logits, slope = soft_cap * capped, 1 - capped**2
            probabilities = torch.softmax(logits.masked_fill_(~visible, float("-inf")), dim=-1)
            del logits
            grad_p = block_out @ values.T
            weighted = probabilities * grad_p
            grad_s = weighted - probabilities * weighted.sum(-1, keepdim=True)
            for index, mask in enumerate(sections):
                for column, tensor in enumerate((weighted, grad_p, grad_s, probabilities)):
                    recorder.sums[layer, index, column] += (tensor * mask).abs().sum(dtype=torch.float64)
            if slope is not None:
                grad_s *= slope
            grad_s *= scale
            grad_q[0, heads, start:stop] = (grad_s @ keys).to(q.dtype)
            grad_k[0, kv_head, :stop] += (grad_s.transpose(1, 2) @ block_q).sum(0)
            grad_v[0, kv_head, :stop] += (probabilities.transpose(1, 2) @ block_out).sum(0)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def section_masks(
    pattern: Triangle, prompt_len: int, start: int, stop: int, visible: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The three sections among the visible pairs of the rows [start, stop): bool [rows, keys] each, disjoint.

    Args:
        pattern: Parameters of the triangle.
        prompt_len: Prompt tokens; rows at or past ``prompt_len - last_n`` are last rows.
        start: Position of the first row.
        stop: Past that of the last.
        visible: Pairs that the layer sees, [rows, keys].
    """
    rows = torch.arange(start, stop, device=visible.device)
    keys = torch.arange(visible.shape[1], device=visible.device)
    # With no dense last rows the rule's mask is the streaming section.
    streaming = Triangle(pattern.n_init, pattern.n_local, 0).mask(rows, keys, stop + 1) & visible
    rest = visible & ~streaming
    last = (rows >= prompt_len - pattern.last_n)[:, None]
    return streaming, rest & last, rest & ~last


def score_sample(model: Any, sample: Sample, pattern: Triangle, *, objective: Objective = "logit") -> SectionScores:
    """Scores every layer's sections on one sample.

    Args:
        model: A causal language model of transformers, on its device.
        sample: Prompt and answer.
        pattern: Parameters of the triangle.
        objective: What the gradient is of: the answer tokens' logits, or their log-probabilities, summed. Where the
            model is sure, log-probabilities saturate and every gradient vanishes.

    Raises:
        ValueError: The model's attention can't be replaced, or wasn't used.
    """
    num_layers = hf_layers.num_layers(model)
    # On the device: a backward pass adds to it thousands of times and must not wait for each.
    sums = torch.zeros(num_layers, len(SECTIONS), len(SCORES), dtype=torch.float64, device=model.device)
    recorder = _Recorder(pattern, len(sample.prompt), sums)
    with _probing(model, recorder) as settings:
        logits = answer_logits(model, sample)
        answer = torch.tensor(sample.answer, device=logits.device)
        chosen = logits.gather(1, answer[:, None]).sum()
        logprob = chosen - torch.logsumexp(logits, dim=-1).sum()
        (chosen if objective == "logit" else logprob).backward()
    able = [layer for layer in range(num_layers) if layer not in settings.stock]
    if not recorder.sums[able, :, SCORES.index("mass")].any(dim=1).all():
        raise ValueError(f"{type(model).__name__}: not every layer's attention went through AttentionInterface")
    return SectionScores(_normalised(recorder, len(sample.prompt) + len(sample.answer) - 1), float(logprob.detach()))


def _normalised(recorder: _Recorder, rows: int) -> dict[str, list[list[float]]]:
    contribution, gradient, centred, mass = recorder.sums.cpu().unbind(-1)
    visible = dense_pairs(recorder.pattern, recorder.prompt_len, rows)
    heads = torch.tensor([recorder.heads.get(layer, 1) for layer in range(len(recorder.sums))])[:, None]
    pairs = torch.tensor([max(1, count) for count in visible], dtype=torch.float64) * heads
    found = {
        "contribution": contribution,
        "gradient": gradient / pairs,
        "centred": centred,
        "mass": mass / (rows * heads),
    }
    return {name: values.tolist() for name, values in found.items()}


def dense_pairs(pattern: Triangle, prompt_len: int, rows: int) -> tuple[int, int, int]:
    """Pairs of each section of a head's whole causal map, in closed form."""
    streaming = Triangle(pattern.n_init, pattern.n_local, 0).visible_pairs(rows)
    triangle = Triangle(pattern.n_init, pattern.n_local, rows - prompt_len + pattern.last_n).visible_pairs(rows)
    return streaming, triangle - streaming, rows * (rows + 1) // 2 - triangle


def answer_logits(model: Any, sample: Sample) -> torch.Tensor:
    """Logits that predict the answer's tokens, teacher-forced: [answer tokens, vocabulary], fp32."""
    tokens = torch.tensor([[*sample.prompt, *sample.answer[:-1]]], device=model.device)
    # Logits of a whole prompt are large.
    few = {"logits_to_keep": len(sample.answer)} if "logits_to_keep" in _parameters(model) else {}
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **few).logits
    return logits[0, -len(sample.answer) :].float()


def _parameters(model: Any) -> Any:
    """Of a model's forward pass, by name."""
    return inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _probing(model: Any, recorder: _Recorder) -> Iterator[TriangleAttention]:
    """Attention that records, layers recomputed one by one, parameters without gradients."""
    settings = install(model, layers=[], pattern=recorder.pattern)
    settings.prompt_len, settings.attend = recorder.prompt_len, recorder.attend
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers, inputs, stack = list(hf_layers.layer_list(model)), None, contextlib.ExitStack()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        # Not transformers' own gradient checkpointing: that needs training mode, where routers draw noise and some
        # models want more inputs, and not every model has it.
        for layer in layers:
            stack.enter_context(replaced_forward(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
        inputs = model.get_input_embeddings().register_forward_hook(_differentiable)
        yield settings
    finally:
        stack.close()
        if inputs is not None:
            inputs.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        settings.remove()


@contextlib.contextmanager
def replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    """A module with another forward pass; one that others gave it (accelerate does) comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _differentiable(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    """The embeddings, where the gradient ends. A copy: some models write into them."""
    return output.detach().requires_grad_().clone() if torch.is_grad_enabled() else output


def mean_scores(samples: Sequence[SectionScores]) -> dict[str, list[list[float]]]:
    """Mean over samples: score -> [layer][section]."""
    return {
        name: torch.tensor([sample.values[name] for sample in samples], dtype=torch.float64).mean(0).tolist()
        for name in SCORES
    }
