"""RULER's prompts from lm-evaluation-harness's own generators, seeded, quiet, and within the length.

lm-eval sizes a prompt by ``len(tokenizer(text).input_ids)`` and forgets some of what is sent: the answer's beginning, a
chat template, for ``fwe`` the answer itself. It gets a tokenizer that counts those in. Its limits and choices that
depend on the length see the nominal one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

from vllm_trimix.evaluation import making, reach
from vllm_trimix.evaluation.making import Asked
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, Unavailable

ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# For joints where two texts make more tokens together, and for the names that vt's example gets anew.
_SPARE = (8, 40, 160)
# Squad's and HotpotQA's addresses are defaults of lm-eval's functions.
_QA = {"qa_1": "read_squad", "qa_2": "read_hotpotqa"}
_NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat"},
    "niah_single_2": {"type_haystack": "essay"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"type_haystack": "essay", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", "num_needle_q": 4},
}


def check_installed() -> None:
    """Raises Unavailable, with the extra's name, where lm-eval is missing."""
    missing = [name for name in ("lm_eval", "wonderwords", "nltk", "datasets") if not importlib.util.find_spec(name)]
    if missing:
        raise Unavailable(f"RULER's tasks need {', '.join(missing)}: pip install 'vllm-trimix[eval]'")


def samples(context: Context, task: str, length: int, count: int) -> list[Sample]:
    """Samples of one of the thirteen tasks.

    Raises:
        Unavailable: lm-eval is missing, or the task's data can't be had.
        ValueError: The length leaves no room.
    """
    check_installed()
    kind = task.partition("_")[0]
    answer = ANSWER_TOKENS[kind]
    with reach.silence():
        generate = _generator(task, kind)
    for spare in _SPARE:
        tokenizer = _Counting(context, kind, spare)
        with reach.silence(), _counted(context, kind, count), _seeded(f"{context.seed} {task} {length}"):
            try:
                documents = generate(tokenizer, length, count)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{task}: {length} tokens leave no room: {error}") from None
        delimiter = "\n\n" if kind == "cwe" else " "
        made = [
            Sample(
                task,
                length,
                document["index"],
                making.tokens_of(
                    context,
                    Asked(document["input"], (), document["gen_prefix"], delimiter=delimiter),
                ),
                tuple(document["outputs"]),
                metric="any" if kind == "qa" else "all",
                max_tokens=answer,
                source=f"lm-eval {version('lm_eval')}",
                comparable=True,
            )
            for document in documents
        ]
        # In short texts there may be no words to count.
        told = all(
            doc["outputs"] and (kind == "qa" or all(o in doc["input"] for o in doc["outputs"])) for doc in documents
        )
        if told and all(len(sample.prompt) + answer <= length for sample in made):
            return made
    raise ValueError(f"{task}: {length} tokens leave no room; take a longer one")


class _Counting:
    """What lm-eval takes for the tokenizer: it only counts."""

    def __init__(self, context: Context, kind: str, spare: int) -> None:
        self._tokenizer, self._kind = context.tokenizer, kind
        self._more = spare + (ANSWER_TOKENS["fwe"] if kind == "fwe" else 0)
        if context.chat:
            self._more += len(making.tokens_of(context, Asked("a", ())))

    def __call__(self, text: str) -> SimpleNamespace:
        tokens = self._count(text)
        if self._kind == "niah":
            # The answer begins with the question's words.
            tokens += self._count(text[text.rindex("\n") + 1 :])
        elif self._kind == "qa":
            tokens += self._count(" Answer:")
        return SimpleNamespace(input_ids=range(tokens + self._more))

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False).input_ids)


def _generator(task: str, kind: str) -> Callable[[Any, int, int], list[dict[str, Any]]]:
    """What makes documents, given the tokenizer, the length and how many."""
    if kind == "niah":
        return _niah(task)
    module = _module(kind)
    if kind == "qa":
        return _qa(task, module)
    if kind == "fwe":

        def coded(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
            _check_least(tokenizer, length, "fwe", lambda: module.TEMPLATE)
            return module.sys_kwext(tokenizer, length, num_samples=count)

        return coded
    if kind == "cwe":

        def words(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
            _check_least(tokenizer, length, "cwe", lambda: module.generate_input_output(10, length)[1])
            return module.sys_word_pair_random(count, length, tokenizer=tokenizer)

        return words

    def chains(tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
        make = module.sys_vartrack_w_noise_random
        # 500 is lm-eval's number; where words take many tokens it has no room for the smallest example.
        least = _longest(tokenizer, lambda: module.generate_input_output(5, 1, 4, is_icl=True)[0])
        room = max(500, least + ANSWER_TOKENS["vt"])
        [example] = make(tokenizer=tokenizer, num_samples=1, max_seq_length=room, incremental=5)
        shown = example["input"] + " " + " ".join(example["outputs"]) + "\n\n"
        _check_least(tokenizer, length, "vt", lambda: module.generate_input_output(10, 1, 4)[0] + shown)
        return make(tokenizer=tokenizer, num_samples=count, max_seq_length=length, icl_example=example)

    return chains


def _check_least(tokenizer: Any, length: int, kind: str, make: Callable[[], str]) -> None:
    """Where its smallest prompts are too long, lm-eval would try for ever."""
    needed = _longest(tokenizer, make) + ANSWER_TOKENS[kind]
    if needed > length:
        raise ValueError(f"the shortest prompt and its answer take up to {needed}")


def _longest(tokenizer: Any, make: Callable[[], str]) -> int:
    """Tokens that texts of a size take at most, of many: a tenth more than of a few."""
    return max(len(tokenizer(make()).input_ids) for _ in range(10)) * 11 // 10


def _niah(task: str) -> Callable[[Any, int, int], list[dict[str, Any]]]:
    prepare, template = _module("niah").prepare_niah, _module("niah").TEMPLATE
    options = {"type_needle_k": "words", "type_needle_v": "numbers", **_NIAH[task]}
    haystack = _haystack(options["type_haystack"])
    return lambda tokenizer, length, count: prepare.generate_samples(
        haystack, tokenizer, max_seq_length=length, template=template, num_samples=count, **options
    )


def _haystack(kind: str) -> Any:
    return _essays() if kind == "essay" else _module("niah").prepare_niah.get_haystack(type_haystack=kind)


@reach.once
def _essays() -> list[str]:
    """Paul Graham's, as words."""
    prepare = _module("niah").prepare_niah
    # lm-eval would fetch these itself, but it may try for long.
    reach.dataset("baber/paul_graham_essays", "train", "text")
    try:
        prepare.nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        address = prepare.nltk.downloader.Downloader.DEFAULT_URL
        if not reach.reachable(address) or not prepare.nltk.download("punkt_tab", quiet=True):
            raise Unavailable(f"nltk's punkt_tab, which splits the essays, can't be fetched: {address}") from None
    words: list[str] = prepare.get_haystack(type_haystack="essay")
    return words


def _qa(task: str, module: ModuleType) -> Callable[[Any, int, int], list[dict[str, Any]]]:
    questions, documents = _questions(task)
    return lambda tokenizer, length, count: module.generate_samples(
        tokenizer, documents, questions, max_seq_length=length, num_samples=count
    )


@reach.once
def _questions(task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A published data set's questions and documents."""
    read = getattr(_module("qa"), _QA[task])
    address = inspect.signature(read).parameters["url"].default
    if not reach.reachable(address):
        raise Unavailable(f"{address} can't be reached")
    found: tuple[list[dict[str, Any]], list[str]] = read()
    return found


@cache
def _module(kind: str) -> Any:
    """One of lm-eval's, imported when it is needed: that takes seconds, and tries to fetch data."""
    # nltk and some of what lm-eval imports draw or seed.
    with _kept():
        # Of the extra `eval`.
        import nltk

        download = nltk.download
        nltk.download = lambda *_, **__: False
        try:
            module = importlib.import_module(f"lm_eval.tasks.ruler.{kind}_utils")
            if kind == "niah":
                prepare = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
                module.prepare_niah = prepare  # type: ignore[attr-defined]
        finally:
            nltk.download = download
    return module


@contextmanager
def _counted(context: Context, kind: str, count: int) -> Iterator[None]:
    """Tells how many documents there are so far, in place of lm-eval's own bar."""
    module = _module(kind).prepare_niah if kind == "niah" else _module(kind)
    bar = module.tqdm

    def counted(numbers: Sequence[int], *_: Any, **__: Any) -> Iterator[int]:
        for place, number in enumerate(numbers, start=1):
            yield number
            # The example of vt has a bar of its own.
            if len(numbers) == count:
                context.made(place)

    module.tqdm = counted
    try:
        yield
    finally:
        module.tqdm = bar


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seeds every generator that lm-eval draws from, and leaves them as they were."""
    # Of the extra `eval`.
    import numpy

    own = _module("cwe").RNG
    with _kept():
        state = own.getstate()
        random.seed(seed)
        numpy.random.seed(random.getrandbits(32))
        own.seed(seed)
        try:
            yield
        finally:
            own.setstate(state)


@contextmanager
def _kept() -> Iterator[None]:
    """Leaves the process's generators as they were."""
    # Of the extra `eval`.
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
