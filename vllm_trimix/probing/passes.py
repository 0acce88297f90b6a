"""What a model answers with some layers in triangle; what lies below the first of them is computed once a sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_trimix.hf_attention import install
from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.gradient import Sample, answer_logits, replaced_forward


@dataclass(frozen=True)
class Quality:
    """How well a sample's answer is predicted.

    Attributes:
        logprob: Log-probability of the answer, natural log, summed over its tokens.
        correct: Whether every token of it is the likeliest.
        kl: Divergence of the answer's distributions from the dense ones, KL(dense || now) over the whole vocabulary,
            teacher-forced, in nats, summed over its tokens.
        kl_first: The same of the first token alone.
    """

    logprob: float
    correct: bool
    kl: float = 0.0
    kl_first: float = 0.0


class TriangleModel:
    """A model whose triangle layers can be set, for comparing layer sets; use as a context.

    Layer sets of one sample, one after the other, share its dense pass: layers below the first triangle layer give back
    what they gave there. Where a model keeps anything else between its layers, every pass is a whole one.
    """

    def __init__(self, model: Any, pattern: Triangle) -> None:
        self._model, self._pattern = model, pattern
        self._layers = list(hf_layers.layer_list(model))
        self._sample: Sample | None = None
        self._dense = torch.empty(0)
        self._outputs: list[Any] = []
        self._reuses: bool | None = None

    def __enter__(self) -> TriangleModel:
        self._settings = install(self._model, layers=[], pattern=self._pattern)
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.remove()
        self._forget()

    @property
    def stock(self) -> dict[int, str]:
        """Layers that can't be triangle layers, with the reason."""
        return self._settings.stock

    @property
    def reuses(self) -> bool:
        """Whether passes of one sample share what lies below their first triangle layer; known after the first."""
        return bool(self._reuses)

    @torch.no_grad()
    def quality(self, sample: Sample, layers: Iterable[int], *, pattern: Triangle | None = None) -> Quality:
        """Teacher-forced quality of a sample's answer with these layers in triangle.

        Args:
            sample: Prompt and answer. Ask all sets of one sample together.
            layers: Indices; those that stay stock change nothing.
            pattern: Another triangle than the model's.
        """
        if sample != self._sample:
            self._begin(sample)
        chosen = frozenset(layers) - self.stock.keys()
        if not chosen:
            return _quality(self._dense, self._dense, sample)
        return _quality(self._dense, self._under(sample, chosen, pattern or self._pattern), sample)

    def _begin(self, sample: Sample) -> None:
        """The dense pass, which records what every layer gives."""
        self._forget()
        hooks = []
        if self._reuses is not False:
            self._outputs = [None] * len(self._layers)
            hooks = [layer.register_forward_hook(partial(self._record, at)) for at, layer in enumerate(self._layers)]
        try:
            self._settings.layers, self._settings.prompt_len = frozenset(), len(sample.prompt)
            self._dense = _log_probabilities(self._model, sample)
        finally:
            for hook in hooks:
                hook.remove()
        self._sample = sample
        if self._reuses is None:
            self._reuses = self._can_reuse(sample)
        if not self._reuses:
            self._outputs = []

    def _can_reuse(self, sample: Sample) -> bool:
        """Whether a pass that begins in the middle ends like the whole one."""
        try:
            with self._beginning_at(len(self._layers) // 2):
                again = _log_probabilities(self._model, sample)
        except Exception:
            # Whatever a model misses that its lower layers would have left for the upper ones.
            return False
        return torch.allclose(again, self._dense, rtol=1e-3, atol=1e-3)

    def _under(self, sample: Sample, layers: frozenset[int], pattern: Triangle) -> torch.Tensor:
        settings, before = self._settings, self._settings.pattern
        settings.layers, settings.pattern, settings.prompt_len = layers, pattern, len(sample.prompt)
        try:
            with self._beginning_at(min(layers) if self._outputs else 0):
                return _log_probabilities(self._model, sample)
        finally:
            settings.layers, settings.pattern = frozenset(), before

    @contextlib.contextmanager
    def _beginning_at(self, first: int) -> Iterator[None]:
        """Layers below the first give back what they gave densely."""
        with contextlib.ExitStack() as stack:
            for layer, output in zip(self._layers[:first], self._outputs, strict=False):
                stack.enter_context(replaced_forward(layer, partial(_give, output)))
            yield

    def _record(self, index: int, module: Any, arguments: Any, output: Any) -> None:
        self._outputs[index] = output

    def _forget(self) -> None:
        self._sample, self._dense, self._outputs = None, torch.empty(0), []


def _give(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _log_probabilities(model: Any, sample: Sample) -> torch.Tensor:
    """[answer tokens, vocabulary], fp64, natural log."""
    return torch.log_softmax(answer_logits(model, sample).double(), dim=-1)


def _quality(dense: torch.Tensor, now: torch.Tensor, sample: Sample) -> Quality:
    answer = torch.tensor(sample.answer, device=now.device)
    logprob = now.gather(1, answer[:, None]).sum()
    correct = (now.argmax(-1) == answer).all()
    if now is dense:
        return Quality(float(logprob), bool(correct))
    kl = (dense.exp() * (dense - now)).sum(-1)
    return Quality(float(logprob), bool(correct), max(0.0, float(kl.sum())), max(0.0, float(kl[0])))


@torch.no_grad()
def answer_quality(model: Any, sample: Sample) -> Quality:
    """Teacher-forced quality of a sample's answer, under the attention that the model has now; no divergence."""
    now = _log_probabilities(model, sample)
    return _quality(now, now, sample)


@torch.no_grad()
def own_answer(model: Any, prompt: tuple[int, ...], *, tokens: int) -> tuple[int, ...]:
    """The model's own greedy answer, up to where it ends it.

    Args:
        model: A causal language model of transformers, under the attention that it has now.
        prompt: Token ids.
        tokens: The most that it may have.

    Raises:
        ValueError: It answers nothing at all.
    """
    given = torch.tensor([prompt], device=model.device)
    # As plain as greedy can be: a model's own settings may punish repetition.
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    said = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, pad_token_id=0, **plain
    )
    answer = tuple(said[0, len(prompt) :].tolist())
    if not answer:
        raise ValueError(f"the model answers nothing to a prompt of {len(prompt)} tokens")
    return answer
