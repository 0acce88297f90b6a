"""What a suite is, and what it may use to make its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation.sample import Sample

PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""RULER's, in tokens."""


class Unavailable(Exception):
    """A task whose data can't be had here; the text says why and what would help."""


@dataclass(frozen=True)
class Context:
    """What a task makes its prompts from.

    Attributes:
        tokenizer: The model's, of transformers.
        language: Key of ``languages.LANGUAGES``.
        seed: Of all random choices; with task, length and index it names a prompt.
        chat: Whether prompts are a user's turn in the model's chat template.
        template_arguments: The user's, of the chat template; thinking is off without any.
        depths: Where answers lie, 0 to 1, for tasks that vary it.
        prompts: The user's file of prompts, for ``agreement``.
        documents: The user's long texts, for ``agreement``.
        text: The user's text file, for ``ppl``.
        thought_end: What ends the thought that answers begin with; empty where they begin with none.
        made: Told how many samples of a task and length there are so far.
        notes: What the makers have to tell the user, e.g. what was left out; see ``note``.
    """

    tokenizer: Any
    language: str = "english"
    seed: int = 42
    chat: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    depths: tuple[float, ...] = ()
    prompts: Path | None = None
    documents: tuple[Path, ...] = ()
    text: Path | None = None
    thought_end: str = ""
    made: Callable[[int], None] = field(default=lambda count: None, compare=False)
    notes: list[str] = field(default_factory=list, compare=False)

    def note(self, text: str) -> None:
        """Adds to the notes what isn't among them."""
        if text not in self.notes:
            self.notes.append(text)


MakeSamples = Callable[[Context, int, int], list[Sample]]
"""Samples of one task, given the context, the nominal length and how many (of each depth).

Raises ``Unavailable`` where its data can't be had, and ValueError where the length leaves no room.
"""


@dataclass(frozen=True)
class Suite:
    """A named set of tasks.

    Attributes:
        name: As the command line takes it.
        summary: One line for ``--help``.
        tasks: Language -> task -> how its samples are made; a language's tasks are those that can be said in it.
        lengths: Nominal lengths by default, those that the model can take.
        samples: Of each task and length by default.
        depths: Where answers lie by default.
        entry: Keys that the ``trimix`` entry of every configuration needs for it.
    """

    name: str
    summary: str
    tasks: Mapping[str, Mapping[str, MakeSamples]]
    lengths: tuple[int, ...] = PUBLISHED_LENGTHS
    samples: int = 100
    depths: tuple[float, ...] = ()
    entry: Mapping[str, Any] = field(default_factory=dict)
