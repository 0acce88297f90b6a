"""Asks a model under layer sets; every answer is computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import material
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.probing.material import Known, Material
from vllm_trimix.probing.passes import Quality, TriangleModel, own_answer
from vllm_trimix.probing.saved import Saved


class Asked(NamedTuple):
    """A prompt with what it is held against.

    Attributes:
        name: Among the saved results.
        sample: Prompt and answer.
    """

    name: str
    sample: Sample


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]


class Asking:
    """A model that is asked; a context, in which its layers can be set.

    Attributes:
        known: What it can be asked, after ``find_out``.
    """

    known: Known

    def __init__(self, model: Any, pattern: Triangle, saved: Saved) -> None:
        self._model, self._pattern, self._saved = model, pattern, saved

    def __enter__(self) -> Asking:
        self._triangle = TriangleModel(self._model, self._pattern).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._triangle.__exit__()

    @property
    def reuses(self) -> bool:
        """Whether sets of one prompt share passes."""
        return self._triangle.reuses

    def find_out(
        self,
        asked: Material,
        progress: Callable[[str, int, int], None],
        timed: Callable[[Mapping[int, float]], None],
    ) -> Known:
        """What the model can be asked, by asking it; see ``material.find_out``."""

        def is_right(name: str, sample: Sample) -> bool:
            return self.quality(Asked(name, sample), ()).correct

        self.known = material.find_out(asked, is_right=is_right, progress=progress, timed=timed)
        return self.known

    def asked(self, what: str, length: int, count: int) -> list[Asked]:
        """Prompts for a purpose, with the right answers or the model's own."""
        found = []
        for index, sample in enumerate(self.known.material.draw(what, length, count)):
            name = f"{what} {length} {index}"
            if self.known.reference == "own":
                say = partial(self._say, sample.prompt)
                sample = Sample(sample.prompt, tuple(self._saved.get(f"{name} answer", say)["tokens"]))
            found.append(Asked(name, sample))
        return found

    def quality(self, one: Asked, layers: Iterable[int], *, pattern: Triangle | None = None) -> Quality:
        """A set's quality. All sets of a prompt are best asked one after the other."""
        chosen = sorted(layers)
        key = f"{one.name} under {'streaming ' if pattern else ''}{','.join(map(str, chosen))}"
        return Quality(**self._saved.get(key, partial(self._triangle.quality, one.sample, chosen, pattern=pattern)))

    def loss(self, one: Asked, now: Quality) -> float:
        """Nats that an answer loses: of its log-probability where it is known to be right, else its divergence."""
        return now.kl if self.known.reference == "own" else self.quality(one, ()).logprob - now.logprob

    def _say(self, prompt: tuple[int, ...]) -> _Answer:
        return _Answer(own_answer(self._model, prompt, tokens=material.OWN_TOKENS))
