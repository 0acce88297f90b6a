"""Answers on disk, one JSON line each as they come, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation.sample import METRICS, Measure, Sample


@dataclass(frozen=True)
class Answer:
    """What one configuration said to one sample, and all that is needed to report it.

    Attributes:
        configuration: Name of the configuration.
        settings: Hash of the configuration's entry.
        sample: Name of the sample.
        digest: Of the sample.
        task, length, index, depth, measure, references, source, comparable: The sample's.
        prompt_tokens: Of the prompt.
        text: The answer.
        score: 0 to 1, or nats a token for perplexity; None for agreement, which needs the dense answer, and for errors.
        seconds: To the first token, None where it wasn't measured.
        tokens: Of the answer, for agreement and long answers.
        likeliest: For each of them the likeliest tokens and their log-probabilities, for agreement.
        error: Why there is no answer.
    """

    configuration: str
    settings: str
    sample: str
    digest: str
    task: str
    length: int
    index: int
    depth: float | None
    measure: str
    references: tuple[str, ...]
    source: str
    comparable: bool
    prompt_tokens: int
    text: str = ""
    score: float | None = None
    seconds: float | None = None
    tokens: tuple[int, ...] = ()
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: str | None = None


def answer_of(configuration: str, settings: str, sample: Sample, said: dict[str, Any]) -> Answer:
    """Puts a sample and what was said to it together, scored.

    Args:
        configuration: Its name.
        settings: Hash of its entry.
        sample: What was asked.
        said: ``error``, or some of ``text``, ``seconds``, ``nll``, ``tokens``, ``likeliest``.
    """
    score = None
    if "error" not in said:
        if sample.measure == Measure.PERPLEXITY:
            score = said["nll"]
        elif sample.measure == Measure.ANSWER:
            score = METRICS[sample.metric](sample.spoken(said["text"]), sample.references)
    return Answer(
        configuration=configuration,
        settings=settings,
        sample=sample.name,
        digest=sample.digest,
        task=sample.task,
        length=sample.length,
        index=sample.index,
        depth=sample.depth,
        measure=str(sample.measure),
        references=sample.references,
        source=sample.source,
        comparable=sample.comparable,
        prompt_tokens=len(sample.prompt),
        text=said.get("text", ""),
        score=score,
        seconds=said.get("seconds"),
        tokens=tuple(said.get("tokens", ())),
        likeliest=tuple(tuple((int(token), float(value)) for token, value in row) for row in said.get("likeliest", ())),
        error=said.get("error"),
    )


class Answers:
    """The answers in a folder: ``answers.jsonl``, its first line what they are of.

    Attributes:
        facts: What each configuration ran, where that is known; a later run's take the place of an earlier's.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        """Reads what an earlier call left. Nothing is written before there is something to keep.

        Args:
            folder: It need not exist.
            about: What must be the same for answers to belong together, plain JSON.

        Raises:
            ValueError: The file is of another evaluation, or none of ours.
        """
        self._path = folder / "answers.jsonl"
        self._found: dict[tuple[str, str], Answer] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._header = json.dumps(about) + "\n"
        self._begun = self._path.exists()
        if not self._begun:
            return
        lines = self._path.read_text(encoding="utf-8").split("\n")
        try:
            before = json.loads(lines[0])
            entries = [json.loads(line) for line in lines[1:-1] if line]
            answers = [parse(entry) for entry in entries if "facts" not in entry]
            self.facts = {entry["configuration"]: entry["facts"] for entry in entries if "facts" in entry}
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ValueError(
                f"--output: {self._path} holds no answers of an evaluation; choose another folder, or remove it"
            ) from None
        if not any(answer.error is None for answer in answers):
            # Nothing that could be mixed up: what failed may be tried again in another way.
            self._begun, self.facts = False, {}
            return
        if before != about:
            changed = [key for key in about if before.get(key) != about[key]]
            raise ValueError(
                f"--output: {self._path} is of an evaluation with another {', '.join(changed)}; choose another folder, "
                "or remove it"
            )
        if lines[-1]:
            # Torn by a power cut or a kill: the line that was being written goes.
            self._path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
        for answer in answers:
            self._found[answer.configuration, answer.sample] = answer

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._found.values())

    def check_settings(self, configuration: str, settings: str) -> None:
        """Refuses to mix two configurations of one name.

        Raises:
            ValueError: There are answers of this name under other settings.
        """
        for answer in self:
            if answer.configuration == configuration and answer.settings != settings and answer.error is None:
                raise ValueError(
                    f"--output: {self._path} has answers of another configuration named {configuration!r}; choose "
                    "another folder or another name"
                )

    def has(self, configuration: str, sample: Sample) -> bool:
        """Whether this very sample was answered."""
        found = self._found.get((configuration, sample.name))
        return found is not None and found.error is None and found.digest == sample.digest

    def put_facts(self, configuration: str, facts: dict[str, Any]) -> None:
        """Keeps what a configuration ran."""
        self.facts[configuration] = facts
        self._append([json.dumps({"configuration": configuration, "facts": facts})])

    def put(self, answers: list[Answer]) -> None:
        """Keeps answers; a later one to the same sample takes the place of the earlier."""
        lines = []
        for answer in answers:
            self._found[answer.configuration, answer.sample] = answer
            # Empty fields say nothing.
            lines.append(
                json.dumps({key: value for key, value in asdict(answer).items() if value not in (None, (), "")})
            )
        self._append(lines)

    def _append(self, lines: list[str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a" if self._begun else "w", encoding="utf-8") as file:
            file.write("".join(["" if self._begun else self._header, *(f"{line}\n" for line in lines)]))
        self._begun = True


def parse(entry: dict[str, Any]) -> Answer:
    """An answer from its line; what was left out as empty is empty.

    Raises:
        TypeError: Keys are missing, or others than an answer's.
    """
    for key in ("references", "tokens"):
        entry[key] = tuple(entry.get(key, ()))
    entry["likeliest"] = tuple(
        tuple((int(token), float(value)) for token, value in row) for row in entry.get("likeliest", ())
    )
    entry.setdefault("depth", None)
    return Answer(**entry)
