"""A small Llama trained from scratch to answer questions about records; minutes on one CPU core.

Training starts at documents of a few records and lengthens them as they are learnt. At first the loss stays where
guessing among the stated values leaves it; after some hundred steps the model finds how to look a key up, and the
longer documents follow quickly.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_trimix.demo.checkpoint import refuse_foreign, write_checkpoint
from vllm_trimix.demo.misalignment import answer_accuracy
from vllm_trimix.demo.trained_spec import MIN_RECORDS, QUESTIONS, TrainedSpec, tokens_of
from vllm_trimix.demo.trained_task import ASK, draw_document, make_trained_prompt, trained_vocabulary
from vllm_trimix.demo.vocabulary import BOS, EOS

MIN_ACCURACY = 0.98

_WARM_UP = 100
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_MEMORY = 0.9  # Of the running accuracy.
_LEARNT = 0.9
_LEARNT_LAST = 0.95
_HELD_OUT = 128
# With embeddings as small as the projections, the layers' outputs drown the tokens and the lookup is not found.
_INIT_STD = 0.07
_EMBEDDING_STD = 1.0
_NO_TARGET = -1


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    Attributes:
        step: Steps done.
        records: Of the documents of this step.
        accuracy: Running, of the answers.
    """

    step: int
    records: int
    accuracy: float


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: ``LlamaForCausalLM`` in fp32 on the CPU, its weights rounded to bf16.
        steps: Of training.
        accuracy: By records, on held-out prompts.
    """

    model: Any
    steps: int
    accuracy: dict[int, float]


def make_trained_model(
    directory: Path,
    spec: TrainedSpec,
    *,
    seed: int,
    device: str = "cpu",
    command: str = "",
    on_step: Callable[[Progress], None] | None = None,
) -> Trained:
    """Trains a model and writes its checkpoint, or nothing where the training is interrupted or fails.

    Args:
        directory: New, empty, or an earlier model of this package.
        spec: Shape and settings.
        seed: Of the weights and the documents.
        device: ``cpu`` or ``cuda``, for the training.
        command: Kept in provenance.json.
        on_step: Called after each step.

    Raises:
        ValueError: The directory holds something else, or the training failed.
    """
    refuse_foreign(directory)
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Made before the training, so that a place that can't be written to is found out at once.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as aside:
        start = time.monotonic()
        trained = train(spec, seed=seed, device=device, on_step=on_step)
        provenance = {
            "accuracy": {f"{records} records": share for records, share in trained.accuracy.items()},
            "command": command,
            "date": datetime.date.today().isoformat(),
            "device": device,
            "seconds": round(time.monotonic() - start),
            "seed": seed,
            "settings": dataclasses.asdict(spec),
            "steps": trained.steps,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        made = Path(aside, "model")
        _write(made, spec, trained.model, provenance)
        if directory.exists():
            for path in made.iterdir():
                path.replace(directory / path.name)
        else:
            made.rename(directory)
    return trained


def _write(directory: Path, spec: TrainedSpec, model: Any, provenance: dict[str, Any]) -> None:
    # Heavy, and vLLM or transformers brings it.
    from safetensors.torch import save_file

    words = trained_vocabulary(spec.keys)
    write_checkpoint(directory, config_of(spec), generator="make-trained-model", words=words)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def config_of(spec: TrainedSpec) -> dict[str, Any]:
    """Contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": spec.head_size,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": _INIT_STD,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_positions,
        "mlp_bias": False,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-5,
        # Readers differ in where they look.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(trained_vocabulary(spec.keys)),
    }


def train(
    spec: TrainedSpec, *, seed: int, device: str = "cpu", on_step: Callable[[Progress], None] | None = None
) -> Trained:
    """Trains a model from scratch.

    Args:
        spec: Shape and settings.
        seed: Of the weights and the documents.
        device: ``cpu`` or ``cuda``.
        on_step: Called after each step.

    Raises:
        ValueError: The steps were too few, or the result is below ``MIN_ACCURACY``.
    """
    model = _new_model(spec, seed).to(device)
    rng = random.Random(f"train {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=_WEIGHT_DECAY)
    longest, accuracy, learnt_at, step = MIN_RECORDS, 0.0, None, 0
    while learnt_at is None or step < learnt_at + spec.cool_down:
        if step == spec.steps_limit:
            raise ValueError(
                f"steps_limit: {step} is too few: accuracy {accuracy:.2f} at {longest} of {spec.records} records; "
                "allow more steps, or try another seed"
            )
        rate = spec.learning_rate * min(1.0, (step + 1) / _WARM_UP)
        if learnt_at is None:
            records = longest
        else:
            rate *= 1 - (step - learnt_at) / spec.cool_down
            records = rng.randint(MIN_RECORDS, spec.records)
        for group in optimizer.param_groups:
            group["lr"] = rate
        right = _step(model, optimizer, [part.to(device) for part in draw_batch(rng, spec, records)])
        accuracy = _MEMORY * accuracy + (1 - _MEMORY) * right
        step += 1
        if on_step is not None:
            on_step(Progress(step, records, accuracy))
        if learnt_at is None and longest < spec.records and accuracy > _LEARNT:
            longest = min(spec.records, longest + max(4, longest // 16 * 4))
            accuracy *= _LEARNT
        elif learnt_at is None and accuracy > _LEARNT_LAST:
            learnt_at = step
    model = model.to("cpu", torch.bfloat16).float().eval()
    return Trained(model, step, _checked(model, spec))


def _new_model(spec: TrainedSpec, seed: int) -> Any:
    # Heavy, and vLLM or transformers brings it.
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config_of(spec) | {"dtype": "float32", "torch_dtype": None}))
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=_EMBEDDING_STD)
    return model.float().train()


def draw_batch(rng: random.Random, spec: TrainedSpec, records: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws the documents of one step, all of one length.

    Returns:
        Token ids, [batch, tokens]; what to predict at each, -1 for nothing; which of these are answers, boolean.
    """
    words = trained_vocabulary(spec.keys)
    bos, eos, ask = (words.index(word) for word in (BOS, EOS, ASK))
    ids, targets = [], []
    for _ in range(max(1, min(spec.batch, spec.batch_tokens // tokens_of(records, QUESTIONS)))):
        document, owners = draw_document(rng, records=records, keys=spec.keys)
        wanted = []
        for place, owner in enumerate(owners):
            wanted += [document[2 * place + 1] if owner in owners[:place] else _NO_TARGET, _NO_TARGET]
        for place in rng.choices(range(len(owners)), k=QUESTIONS):
            key, value = document[2 * place : 2 * place + 2]
            document += [ask, key, value]
            # After an answer a reply ends, though here the next question follows.
            wanted += [_NO_TARGET, value, eos]
        ids.append([bos, *document])
        targets.append([_NO_TARGET, *wanted])
    # The answer's row is the key after a question mark.
    tokens, aims = torch.tensor(ids), torch.tensor(targets)
    answers = torch.zeros_like(aims, dtype=torch.bool)
    answers[:, 1:] = tokens[:, :-1] == ask
    return tokens, aims, answers


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> float:
    """One update; returns the share of right answers before it."""
    tokens, targets, answers = batch
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    aimed = targets != _NO_TARGET
    logits, wanted = model.lm_head(hidden[aimed]), targets[aimed]
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    return float((logits.argmax(-1) == wanted)[answers[aimed]].float().mean())


def _checked(model: Any, spec: TrainedSpec) -> dict[int, float]:
    """Accuracy at a few lengths.

    Raises:
        ValueError: It is below ``MIN_ACCURACY``.
    """
    accuracy = {}
    for records in sorted({max(MIN_RECORDS, spec.records * part // 4) for part in range(1, 5)}):
        prompts = [make_trained_prompt(records=records, seed=seed, keys=spec.keys) for seed in range(_HELD_OUT)]
        accuracy[records] = answer_accuracy(model, prompts)
    worst = min(accuracy, key=lambda records: accuracy[records])
    if accuracy[worst] < MIN_ACCURACY:
        raise ValueError(
            f"seed: training ended at an accuracy of {accuracy[worst]:.3f} at {worst} records, below {MIN_ACCURACY}; "
            "try another one"
        )
    return accuracy
