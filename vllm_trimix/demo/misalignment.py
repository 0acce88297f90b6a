"""What the triangle in some or all layers does to a trained model: the answer at the end, and recall inside the prompt.

The triangle keeps what the last rows see, so the answer survives; rows in the middle lose what lies outside their
window, though the model was trained with it (TriangleMix, arXiv 2507.21526). Only models of ``trained_task`` are
meant: their vocabulary is read off the model's size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_trimix.demo.trained_task import Repeat, TrainedPrompt, trained_vocabulary
from vllm_trimix.demo.vocabulary import BOS, SPECIALS
from vllm_trimix.patterns.triangle import Triangle

_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Scores:
    """Shares of right predictions, each against the prompt's own truth.

    Attributes:
        answer: Of the question's answers.
        recall: Of the values of repeated keys, teacher-forced, wherever they stand.
        hidden_recall: Of those alone whose every earlier statement the triangle hides from them.
    """

    answer: float
    recall: float
    hidden_recall: float


def answer_accuracy(model: Any, prompts: Sequence[TrainedPrompt], pattern: Triangle | None = None) -> float:
    """Share of prompts that are answered right.

    Args:
        model: ``LlamaForCausalLM``, on any device.
        prompts: All of one length.
        pattern: The mask of every layer; None for dense.
    """
    ids = _ids(model)
    answers = torch.tensor([ids[prompt.answer] for prompt in prompts])
    return _share(predictions(model, prompts, pattern)[:, -1] == answers)


def misalignment(
    model: Any, prompts: Sequence[TrainedPrompt], pattern: Triangle, *, layers: Collection[int] | None = None
) -> dict[str, Scores]:
    """Scores with dense layers, under the triangle, and streaming (the triangle without dense last rows).

    Args:
        model: ``LlamaForCausalLM``, on any device.
        prompts: All of one length, with repeats both hidden by the triangle and not.
        pattern: The triangle, small enough to hide something.
        layers: Those under the pattern, the others stay dense; None for all.

    Raises:
        ValueError: The triangle hides no repeat of these prompts.
    """
    ids = _ids(model)
    recalled = [(row, repeat) for row, prompt in enumerate(prompts) for repeat in prompt.repeats]
    hidden = torch.tensor([_is_hidden(repeat, prompts[row].tokens, pattern) for row, repeat in recalled])
    if not hidden.any():
        raise ValueError(
            f"pattern: {pattern} hides no repeat in prompts of {prompts[0].tokens} tokens; choose a smaller one"
        )
    rows = torch.tensor([row for row, _ in recalled])
    positions = torch.tensor([repeat.position for _, repeat in recalled])
    values = torch.tensor([ids[repeat.value] for _, repeat in recalled])
    answers = torch.tensor([ids[prompt.answer] for prompt in prompts])
    scores = {}
    for name, mask in {"dense": None, "triangle": pattern, "streaming": replace(pattern, last_n=0)}.items():
        predicted = predictions(model, prompts, mask, layers=layers)
        right = predicted[rows, positions] == values
        scores[name] = Scores(
            answer=_share(predicted[:, -1] == answers),
            recall=_share(right),
            hidden_recall=_share(right[hidden]),
        )
    return scores


@torch.no_grad()
def predictions(
    model: Any, prompts: Sequence[TrainedPrompt], pattern: Triangle | None, *, layers: Collection[int] | None = None
) -> torch.Tensor:
    """The likeliest next token at every position, teacher-forced, [prompts, tokens]."""
    ids = _ids(model)
    device = next(model.parameters()).device
    tokens = torch.tensor([[ids[word] for word in (BOS, *prompt.prompt.split())] for prompt in prompts], device=device)
    length = tokens.shape[1]
    positions = torch.arange(length, device=device)
    dense = _bias(positions[:, None] >= positions, model.dtype)
    masked = dense if pattern is None else _bias(pattern.mask(positions, positions, length), model.dtype)
    found = []
    with _dense_elsewhere(model, dense, layers):
        for part in tokens.split(max(1, _BATCH_TOKENS // length)):
            logits = model(input_ids=part, attention_mask=masked.expand(len(part), -1, -1, -1), use_cache=False).logits
            found.append(logits.argmax(-1).cpu())
    return torch.cat(found)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, [1, 1, queries, keys]."""
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return bias[None, None]


@contextmanager
def _dense_elsewhere(model: Any, dense: torch.Tensor, layers: Collection[int] | None) -> Iterator[None]:
    """Gives the layers that are not among these another mask than the model's."""

    def replace_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": dense.expand_as(kwargs["attention_mask"])}

    others = [] if layers is None else [layer for i, layer in enumerate(model.model.layers) if i not in layers]
    hooks = [layer.register_forward_pre_hook(replace_mask, with_kwargs=True) for layer in others]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _share(right: torch.Tensor) -> float:
    return right.sum().item() / right.numel()


def _ids(model: Any) -> dict[str, int]:
    keys = (model.config.vocab_size - len(SPECIALS) - 1) // 2
    return {word: index for index, word in enumerate(trained_vocabulary(keys))}


def _is_hidden(repeat: Repeat, prompt_len: int, pattern: Triangle) -> bool:
    """Whether the repeat's row sees no earlier statement of its value."""
    return not pattern.mask(torch.tensor([repeat.position]), torch.tensor(repeat.earlier), prompt_len).any()
