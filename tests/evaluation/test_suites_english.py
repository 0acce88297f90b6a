"""Suites in English that need neither network nor lm-eval: lengths, depths, texts as published, one right answer."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import ENGLISH
from vllm_trimix.evaluation import documents, haystack, reach
from vllm_trimix.evaluation.making import Write, fill
from vllm_trimix.evaluation.sample import METRICS, Measure, Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Unavailable
from vllm_trimix.evaluation.suites import ruler
from vllm_trimix.evaluation.suites.registry import SUITES

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
LENGTH = 2500
OWN_RULER = (
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "qa_1", "qa_2"),
)


def _own(task: str) -> MakeSamples:
    return lambda context, length, count: ruler.own(context, task, length, count)


MAKERS: dict[str, MakeSamples] = {
    **{f"ruler-{task}": _own(task) for task in OWN_RULER},
    **{
        f"{suite}-{t}": m
        for suite in ("niah", "retrieval", "agreement")
        for t, m in SUITES[suite].tasks[ENGLISH].items()
    },
}
# Tokens of the largest unit of each: a sentence, two documents, a pair, a line.
UNITS = {"qa_1": 260, "qa_2": 520, "kv_retrieval": 120, "prompts": 120}


def context(**fields: Any) -> Context:
    return Context(tokenizers.english(tokenizers.TEMPLATE if fields.get("chat") else None), **fields)


def text_of(sample: Sample) -> str:
    text: str = tokenizers.english().decode(sample.prompt)
    return text


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_prompt_and_answer_fill_the_length(name: str, chat: bool, capfd: pytest.CaptureFixture[str]) -> None:
    samples = MAKERS[name](context(chat=chat, depths=(0.0, 0.5)), LENGTH, 3)
    task = name.partition("-")[2]
    assert len(samples) == (6 if name == "niah-needle" else 3)
    for sample in samples:
        used = len(sample.prompt) + sample.max_tokens
        assert LENGTH - UNITS.get(task, 60) < used <= LENGTH
        text = text_of(sample)
        assert text.startswith("<s><user>") is chat
        assert text.count("<s>") == text.count("<assistant>") == int(chat)
        # Stated once, or twice as published, or in a pair.
        stated = 2 if task in ("passkey", "number_string") else 1
        assert all(text.lower().count(reference.lower()) == stated for reference in sample.references)
        assert sample.measure == Measure.AGREEMENT or sample.references
        if sample.references:
            assert METRICS[sample.metric](f" {' and '.join(sample.references)}.", sample.references) == 1.0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_names_each_prompt(name: str) -> None:
    make = MAKERS[name]
    few, more = (make(context(depths=(0.5,)), LENGTH, count) for count in (1, 4))
    assert few == more[:1]
    assert make(context(depths=(0.0, 0.5)), LENGTH, 1)[-1:] == few
    assert len({sample.prompt for sample in [*more, *make(context(depths=(0.5,), seed=43), LENGTH, 4)]}) == 8


def test_a_base_model_has_no_turns() -> None:
    with pytest.raises(ValueError, match="--chat-template: the model's tokenizer has no chat template"):
        MAKERS["niah-needle"](Context(tokenizers.english(), chat=True), LENGTH, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_no_room(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w+: 90 tokens leave no room: the shortest prompt has \d+"):
        MAKERS[name](context(), 90, 1)


def test_needles_lie_at_their_depth() -> None:
    samples = SUITES["niah"].tasks[ENGLISH]["needle"](context(), LENGTH, 2)
    assert [sample.depth for sample in samples] == [tenth / 10 for tenth in range(11) for _ in range(2)]
    for sample in samples:
        body = text_of(sample).partition("\n")[2].rpartition("\nWhat is")[0]
        needle = re.search(r"One of the special magic numbers for [\w-]+ is: (\d{7})\. ?", body)
        assert needle is not None
        assert needle[1] == sample.references[0]
        before, after = body[: needle.start()], body[needle.end() :]
        assert sample.depth is not None
        # In characters, sentences being of several lengths.
        assert abs(len(before) / (len(before) + len(after)) - sample.depth) < 0.05
        assert (before == "") is (sample.depth == 0)
        assert (after == "") is (sample.depth == 1)


def test_prompts_as_published() -> None:
    def one(suite: str, task: str) -> tuple[str, str]:
        [sample] = SUITES[suite].tasks[ENGLISH][task](context(depths=(0.5,)), LENGTH, 1)
        return text_of(sample), sample.references[0]

    text, key = one("retrieval", "passkey")
    body = text.removeprefix(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n"
    ).removesuffix("\n\nWhat is the pass key?\n\nThe pass key is")
    assert body.replace(NOISE, "") == f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    assert re.fullmatch(r"\d{5}", key)

    text, key = one("retrieval", "number_string")
    body = text.removeprefix(
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n"
    ).removesuffix("\n\nWhat is the sequence of digits?\n\nThe sequence of digits is")
    assert (
        body.replace(NOISE, "") == f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
    )
    assert re.fullmatch(r"\d{10}", key)

    text, value = one("retrieval", "kv_retrieval")
    head, _, rest = text.partition("\n\nJSON data:\n")
    data, _, tail = rest.partition("\n\n")
    assert head == "Extract the value corresponding to the specified key in the JSON object below."
    [gold] = [key for key, found in json.loads(data).items() if found == value]
    assert tail == f'Key: "{gold}"\nThe value associated with the specified key is: '

    text, value = one("niah", "needle")
    asked = re.search(r"for ([\w-]+) mentioned in the provided text\?", text)
    assert asked is not None
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    )
    assert text.endswith(
        f"\nWhat is the special magic number for {asked[1]} mentioned in the provided text? The special magic number "
        f"for {asked[1]} mentioned in the provided text is"
    )
    assert f"One of the special magic numbers for {asked[1]} is: {value}." in text


def test_several_needles() -> None:
    text = text_of(ruler.own(context(), "niah_multiquery", LENGTH, 1)[0])
    stated = dict(re.findall(r"magic numbers for ([\w-]+) is: (\d{7})\.", text))
    assert len(stated) == 4
    sample = ruler.own(context(), "niah_multiquery", LENGTH, 1)[0]
    query = re.findall(r"numbers for (.+) mentioned in the provided text are$", text)[0].split("The special magic ")[-1]
    asked = query.replace("numbers for ", "").replace("and ", "").split(", ")
    assert tuple(stated[key] for key in asked) == sample.references
    text = text_of(ruler.own(context(), "niah_multivalue", LENGTH, 1)[0])
    assert len(set(re.findall(r"magic numbers for ([\w-]+) is: \d{7}\.", text))) == 1
    assert len(ruler.own(context(), "niah_multivalue", LENGTH, 1)[0].references) == 4
    assert len(ruler.own(context(), "niah_multikey_1", LENGTH, 1)[0].references) == 1
    assert re.search(
        r"magic uuids for [\w-]+ is: [0-9a-f-]{36}\.", text_of(ruler.own(context(), "niah_single_3", LENGTH, 1)[0])
    )


def test_two_hops_join_two_documents() -> None:
    for sample in ruler.own(context(), "qa_2", LENGTH, 5):
        text = text_of(sample)
        person = re.findall(r"In which province was (.+) born\? Answer:$", text)[0]
        town = re.findall(rf"{person} was born in (\w+) in", text)
        assert len(town) == 1
        assert re.findall(rf"{town[0]} is a town in the province of (\w+)\.", text) == list(sample.references)
        found = text.split("\n\nDocument ")
        assert not any(person in document and sample.references[0] in document for document in found)


def test_many_documents_have_different_names() -> None:
    write: Write = documents.two_hop()
    text = write("seed", 1500, None).text
    for pattern in (r"(\w+) is a town", r"province of (\w+)", r"Document \d+:\n(\w+ \w+)\n"):
        names = re.findall(pattern, text)
        assert len(names) == len(set(names)) == 1500
    places = set()
    for seed in range(20):
        text = write(str(seed), 40, None).text
        person = re.findall(r"was (.+) born\?$", text)[0]
        places.add(text[: text.index(person)].count("\n\nDocument "))
    assert len(places) > 10


def test_texts_grow_by_units() -> None:
    for write in (haystack.needles(), documents.one_hop()):
        long, short = write("s", 30, 1.0).text, write("s", 10, 1.0).text
        assert len(long) > 2 * len(short)
        assert short[200:500] in long


def test_making_long_prompts_reads_few_tokens() -> None:
    read = []
    tokenizer = tokenizers.english()

    class Counting:
        bos_token = chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            encoded = tokenizer(text, **options)
            read.append(len(encoded.input_ids))
            return encoded

    fill(Context(Counting()), "needle", 20_000, 3, haystack.needles(), least=4, max_tokens=128)
    assert sum(read) < 3 * 8 * 20_000


def test_windows_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(haystack.prose(random.Random(1), 1000)))
    ids = tuple(tokenizers.english()(path.read_text()).input_ids)
    given = context(text=path)
    samples = SUITES["ppl"].tasks[ENGLISH]["documents"](given, 1000, 5)
    assert [sample.prompt for sample in samples] == [ids[start : start + 999] for start in range(0, 5 * 999, 999)]
    assert {(s.max_tokens, s.measure, s.references) for s in samples} == {(1, Measure.PERPLEXITY, ())}
    assert given.notes == []
    whole = len(ids) // 999
    assert len(SUITES["ppl"].tasks[ENGLISH]["documents"](given, 1000, 50)) == whole
    assert given.notes == [f"documents: the text holds {whole} windows of 1000 tokens, not 50"]
    with pytest.raises(ValueError, match="documents: the text has fewer than 100000 tokens"):
        SUITES["ppl"].tasks[ENGLISH]["documents"](given, 100_000, 1)


def test_books_are_read_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    books = [f"{name} " * size for name, size in (("acorn", 2000), ("badger", 10), ("cedar", 900))]
    monkeypatch.setattr(reach, "dataset", lambda *names: books)
    samples = SUITES["ppl"].tasks[ENGLISH]["documents"](context(), 400, 4)
    first = [tokenizers.english().decode(sample.prompt).split()[0] for sample in samples]
    assert first[:2] == ["acorn", "cedar"]
    assert samples[0].source == "datasets emozilla/pg19-test"


def test_no_network_asks_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(reach, "dataset", reach.once(lambda *names: 1 / 0))
    with pytest.raises(Unavailable, match="documents: division by zero; give a text of your own: --text FILE"):
        SUITES["ppl"].tasks[ENGLISH]["documents"](context(), 400, 1)


def test_what_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    calls = []

    def load(name: str) -> str:
        calls.append(name)
        print("noise")
        if name == "bad":
            raise OSError("refused\nand more")
        return name

    loaded = reach.once(load)
    for _ in range(2):
        assert loaded("good") == "good"
        with pytest.raises(Unavailable, match=r"^refused$"):
            loaded("bad")
    assert calls == ["good", "bad"]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reach.reachable.cache_clear()
    monkeypatch.setattr(reach.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked though offline"))
    assert not reach.reachable("https://example.org/offline")


def test_reachable_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # It answers 501 to HEAD: somebody is there.
    assert reach.reachable(f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()
    reach.reachable.cache_clear()
    assert not reach.reachable(f"http://127.0.0.1:{server.server_port}/")


def test_the_users_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["one two", "a longer prompt " * 100, "three"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = context(prompts=path)
    samples = SUITES["agreement"].tasks[ENGLISH]["prompts"](given, 100, 10)
    assert [(sample.index, text_of(sample)) for sample in samples] == [(0, "one two"), (2, "three")]
    assert given.notes == [f"prompts: 1 of 3 in {path} are longer than 100 tokens"]
    assert [s.index for s in SUITES["agreement"].tasks[ENGLISH]["prompts"](given, 100, 1)] == [0]
    with pytest.raises(ValueError, match=r"prompts: 16 tokens hold none of .*: the shortest and its answer take 1"):
        SUITES["agreement"].tasks[ENGLISH]["prompts"](given, 16, 1)


def test_agreement_is_a_mixture() -> None:
    texts = [text_of(sample) for sample in MAKERS["agreement-prompts"](context(), LENGTH, 4)]
    ends = [text.splitlines()[-2:] for text in texts]
    assert ends[1][0].startswith("What is the special magic number for ")
    assert ends[2][0].startswith("Summarise the text")
    assert all(end[0].startswith("What is the value of this key?") for end in (ends[0], ends[3]))
