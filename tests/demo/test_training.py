"""Training makes another model like the committed one; the command writes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.demo.trained_model import LENGTHS, MODEL, ROOT, SPEC, held_out, load
from vllm_trimix.cli.main import main
from vllm_trimix.demo import trained
from vllm_trimix.demo.misalignment import answer_accuracy
from vllm_trimix.demo.trained_spec import QUESTIONS, SIZES, repeats_of, tokens_of
from vllm_trimix.demo.trained_task import trained_vocabulary

# Training.


@pytest.fixture(scope="session")
def retrained() -> Path:
    """A model trained here, once for each state of the code that makes it."""
    sources = sorted((ROOT / "vllm_trimix/demo").glob("trained*.py"))
    versions = f"{torch.__version__} {json.loads((MODEL / 'provenance.json').read_text())['command']}"
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + versions.encode()).hexdigest()
    directory = ROOT / f"build/cache/trained-{state[:16]}"
    if not directory.exists():
        assert main(["make-trained-model", str(directory), "--size", "small", "--seed", "0", "--device", "cpu"]) == 0
    return directory


# Two minutes alone; a busy machine may take ten times as long.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("records", LENGTHS)
def test_training_from_scratch_reaches_the_same(retrained: Path, records: int) -> None:
    assert answer_accuracy(load(retrained), held_out(records)) >= 0.98


def test_a_batch_asks_for_what_was_stated() -> None:
    spec = dataclasses.replace(SPEC, batch=9)
    tokens, targets, answers = trained.draw_batch(random.Random(0), spec, 12)
    words = trained_vocabulary(spec.keys)
    assert tokens.shape == (9, tokens_of(12, QUESTIONS) + 1)
    for ids, aims, asked in zip(tokens.tolist(), targets.tolist(), answers.tolist(), strict=True):
        text = [words[index] for index in ids]
        assert text[0] == "<s>"
        stated: dict[str, str] = {}
        repeats = []
        for i in range(1, len(text) - 1):
            if text[i][0] != "k":
                at_answer = text[i - 2] == "?"
                assert aims[i] == (words.index("</s>") if at_answer else -1)
            elif text[i] in stated:
                assert words[aims[i]] == stated[text[i]] == text[i + 1]
                repeats.append(text[i - 1] == "?")
            else:
                stated[text[i]] = text[i + 1]
                assert aims[i] == -1
            assert asked[i] == (text[i - 1] == "?")
        assert len(stated) == 12
        assert (repeats.count(False), repeats.count(True)) == (repeats_of(12), QUESTIONS)


def test_batches_shrink_with_their_documents() -> None:
    shapes = [trained.draw_batch(random.Random(0), SPEC, records)[0].shape for records in (4, 48, 96)]
    assert shapes[0][0] == SPEC.batch > shapes[2][0]
    assert all(batch * (tokens - 1) <= SPEC.batch_tokens for batch, tokens in shapes)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_trains_a_step(size: str) -> None:
    spec = dataclasses.replace(SIZES[size], batch=2, steps_limit=1)
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"steps_limit: 1 is too few: accuracy 0.00 at 4 of {spec.records} records"):
        trained.train(spec, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_seed_decides() -> None:
    spec = dataclasses.replace(SPEC, batch=2, steps_limit=3)
    seen: dict[tuple[int, int], list[float]] = {}
    for seed, run in ((0, 0), (0, 1), (1, 0)):
        weights: list[torch.Tensor] = []
        torch.manual_seed(run)
        model = trained._new_model(spec, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch = trained.draw_batch(random.Random(f"train {seed}"), spec, 4)
        trained._step(model, optimizer, list(batch))
        weights = [parameter.detach().double().sum() for parameter in model.parameters()]
        seen[seed, run] = torch.stack(weights).tolist()
    assert seen[0, 0] == seen[0, 1] != seen[1, 0]


# The command.


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that is over at once."""

    def train(spec: Any, *, seed: int, device: str, on_step: Any) -> trained.Trained:
        on_step(trained.Progress(1, 4, 0.5))
        return trained.Trained(trained._new_model(spec, seed).bfloat16().float(), 7, {4: 0.25})

    monkeypatch.setattr(trained, "train", train)


@pytest.mark.usefixtures("untrained")
def test_command_writes_a_model_and_replaces_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "new" / "model"
    options = ["--records", "40", "--steps-limit", "50", "--device", "cpu"]
    for seed in ("3", "4"):
        assert main(["make-trained-model", str(directory), "--seed", seed, *options]) == 0
        assert capsys.readouterr().out == f"{directory}: 7 steps; accuracy 0.250 at 4 records\n"
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    assert {path.name for path in directory.iterdir()} == {path.name for path in MODEL.iterdir()}
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["command"].endswith("--size small --seed 4 --records 40 --steps-limit 50")
    spec = dataclasses.replace(SPEC, records=40, steps_limit=50)
    assert provenance["settings"] == dataclasses.asdict(spec)
    wanted = trained._new_model(spec, 4).bfloat16().state_dict()
    stored = load(directory, torch.bfloat16).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in wanted.items())


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, "_step", interrupt)
    assert main(["make-trained-model", str(tmp_path / "model")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_bad_result_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-trained-model", str(tmp_path / "model"), "--steps-limit", "2", "--device", "cpu"]) == 2
    assert "error: steps_limit: 2 is too few: accuracy 0.00 at 4 of 96 records" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"seed: training ended at an accuracy of 0.0\d\d at \d+ records, below 0.98"):
        trained._checked(trained._new_model(SPEC, 0), dataclasses.replace(SPEC, records=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--records 3", "records: 3 is outside 4-128, the keys of this size; choose e.g. 96"),
        ("--records 129", "records: 129 is outside 4-128, the keys of this size; choose e.g. 96"),
        ("--size large --records 2049", "records: 2049 is outside 4-2048, the keys of this size; choose e.g. 1536"),
        ("--steps-limit 0", "steps_limit: 0 is too few; choose at least 1"),
    ],
)
def test_errors(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-trained-model", str(tmp_path / "model"), *options.split()]) == 2
    assert re.fullmatch(f"vllm-trimix: error: {message}\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the error is about")
def test_cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-trained-model", str(tmp_path / "model"), "--device", "cuda"]) == 2
    assert "device: 'cuda' is not available here; choose cpu" in capsys.readouterr().err


def test_a_real_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["make-trained-model", str(tmp_path)]) == 2
    assert "holds files that are not a demo model; choose a new directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
