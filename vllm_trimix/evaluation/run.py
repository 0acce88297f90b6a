"""Asks every configuration every sample, and keeps what was said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_trimix.evaluation.answers import Answers, answer_of
from vllm_trimix.evaluation.askers import Asker, Lost
from vllm_trimix.evaluation.configurations import Configuration
from vllm_trimix.evaluation.prompts import Prompts
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.measurement.engine_process import EngineDied

_MAKING = "making prompts"
_MAX_FAILURES = 10
"""Failures in a row after which a configuration is given up: the reason is not the prompt."""


@dataclass
class Outcome:
    """What a run left besides the answers.

    Attributes:
        failures: Why a configuration was given up, by configuration.
        samples: Names of all samples of the run, and their digests.
    """

    failures: dict[str, str] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)


def run(
    configurations: Sequence[Configuration],
    prompts: Prompts,
    answers: Answers,
    *,
    start: Callable[[Configuration], Asker],
    concurrency: int,
    progress: Callable[[str, int, int], None],
) -> Outcome:
    """Asks what is not answered yet.

    Args:
        configurations: Stock first.
        prompts: The samples.
        answers: Where answers go, and what is known already.
        start: Starts who answers for a configuration.
        concurrency: Samples asked at the same time.
        progress: Told the configuration, the samples done and how many there are.

    Raises:
        ValueError: Something the user got wrong.
        EngineDied: The first engine ended before it was ready.
    """
    outcome = Outcome()
    for configuration in configurations:
        answers.check_settings(configuration.name, configuration.settings)
    ready: dict[str, Asker] = {}
    try:
        _make(prompts, outcome, progress, lambda: _start_first(configurations, answers, start, ready))
    except BaseException:
        for asker in ready.values():
            asker.__exit__(*sys.exc_info())
        raise
    total = len(outcome.samples)
    for configuration in configurations:
        missing = total - sum(
            answer.sample in outcome.samples
            and outcome.samples[answer.sample] == answer.digest
            and answer.error is None
            for answer in answers
            if answer.configuration == configuration.name
        )
        progress(configuration.name, total - missing, total)
        if not missing:
            continue
        try:
            with ready.pop(configuration.name, None) or start(configuration) as asker:
                _ask(asker, configuration, prompts, answers, concurrency, progress, total - missing, total)
        except (EngineDied, Lost) as error:
            outcome.failures[configuration.name] = str(error)
        else:
            answers.put_facts(configuration.name, asker.facts)
    return outcome


def _make(
    prompts: Prompts, outcome: Outcome, progress: Callable[[str, int, int], None], made_first: Callable[[], None]
) -> None:
    """Makes all samples, and says so when the first are there."""
    cells = list(prompts.cells())
    total = len(cells) * prompts.expected
    for cell in cells:
        done = len(outcome.samples)

        def made(count: int, done: int = done, total: int = total) -> None:
            progress(_MAKING, min(done + count, total), total)

        made(0)
        found = {sample.name: sample.digest for sample in prompts.samples(cell, made=made)}
        outcome.samples.update(found)
        total += len(found) - prompts.expected
        progress(_MAKING, len(outcome.samples), total)
        if found and not done:
            made_first()


def _start_first(
    configurations: Sequence[Configuration],
    answers: Answers,
    start: Callable[[Configuration], Asker],
    ready: dict[str, Asker],
) -> None:
    """Starts the first configuration before minutes of work: a model or a flag that is wrong shows now."""
    first = configurations[0]
    if not any(answer.configuration == first.name and answer.error is None for answer in answers):
        ready[first.name] = start(first)


def _ask(
    asker: Asker,
    configuration: Configuration,
    prompts: Prompts,
    answers: Answers,
    concurrency: int,
    progress: Callable[[str, int, int], None],
    done: int,
    total: int,
) -> None:
    failures = 0
    for cell in prompts.cells():
        wanted = [sample for sample in prompts.samples(cell) if not answers.has(configuration.name, sample)]
        for begin in range(0, len(wanted), concurrency):
            batch = wanted[begin : begin + concurrency]
            try:
                said = asker.ask(batch)
            except (EngineDied, Lost) as error:
                _put(answers, configuration, batch, [{"error": str(error)}] * len(batch))
                raise
            _put(answers, configuration, batch, said)
            for answer in said:
                failures = failures + 1 if "error" in answer else 0
            if failures >= _MAX_FAILURES:
                raise Lost(f"{failures} prompts in a row failed, the last: {said[-1]['error']}")
            done += len(batch)
            progress(configuration.name, done, total)


def _put(
    answers: Answers, configuration: Configuration, batch: Sequence[Sample], said: Sequence[dict[str, Any]]
) -> None:
    answers.put(
        [
            answer_of(configuration.name, configuration.settings, sample, answer)
            for sample, answer in zip(batch, said, strict=True)
        ]
    )
