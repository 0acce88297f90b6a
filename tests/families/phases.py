"""What is done with a family, each in a process of its own that is forked from one which has imported vLLM already."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Here, so that the server imports it once.
import torch
import transformers
import vllm
import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_model_runner
from safetensors.torch import save_file
from torch._inductor import cpu_vec_isa
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

from vllm_trimix.backend import impl as backend_impl
from vllm_trimix.backend import requests
from vllm_trimix.hf_attention import use_triangle

# Each engine would ask it in a process of its own.
cpu_vec_isa.valid_vec_isa_list()
SEED = 7
# Their values are rates, gains and short filters: drawn at large they blow up or die out.
_LEFT_ALONE = re.compile(
    r"norm[^.]*\.weight$|conv|A_log|A\b|dt_|\bD\b|sink|bias|scale|decay|lambda|alpha|inv_freq|rotary"
)
_ATTENTION = re.compile(r"self_attn")
_EMBEDDING = re.compile(r"embed|wte|wpe")


def start(phase: str, job: dict[str, Any], folder: str) -> None:
    """Runs one phase: the log goes to FOLDER/PHASE.log, the result, or the error, to FOLDER/PHASE.json."""
    log = os.open(f"{folder}/{phase}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("env", {}))
    phases: dict[str, Callable[[dict[str, Any]], Any]] = {
        "make": make,
        "stock": engine,
        "trimix": engine,
        "truth": truth,
        "preview": foretell,
    }
    try:
        found = {"result": phases[phase](job)}
    except Exception as error:
        traceback.print_exc()
        found = {"error": type(error).__name__, "message": str(error)}
    Path(folder, f"{phase}.part").write_text(json.dumps(found))
    Path(folder, f"{phase}.part").rename(Path(folder, f"{phase}.json"))
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and process groups behind that hold up an orderly end.
    os._exit(0)


def draw(model: torch.nn.Module, std: float, attention_std: float) -> None:
    """Fills the matrices of a model with numbers so large that attention matters; its norms become ones."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not _LEFT_ALONE.search(name) and parameter.is_floating_point():
            # Small embeddings, or a model that ties them to its head would only repeat the last token.
            scale = std / 4 if _EMBEDDING.search(name) else attention_std if _ATTENTION.search(name) else std
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(drawn.to(parameter.dtype))


def make(job: dict[str, Any]) -> None:
    """Writes the checkpoint, made by the class of transformers, beside the config.json as it stands."""
    model, weights = Path(job["model"]), Path(job["model"], "weights")
    if (model / "params.json").exists():
        _make_mistral(model, job["std"])
        return
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(model), dtype=torch.float32
    )
    draw(made, *job["std"])
    made.to(getattr(torch, job["dtype"])).save_pretrained(weights)
    for path in weights.glob("*.safetensors*"):
        path.rename(model / path.name)
    shutil.rmtree(weights)


def _make_mistral(model: Path, stds: tuple[float, float]) -> None:
    """Writes consolidated.safetensors, with Mistral's own names."""
    params = json.loads((model / "params.json").read_text())
    dim, hidden, heads = params["dim"], params["hidden_dim"], params["n_heads"] * params["head_dim"]
    kv_heads = params["n_kv_heads"] * params["head_dim"]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"attention.wq": (heads, dim), "attention.wk": (kv_heads, dim), "attention.wv": (kv_heads, dim)}
    shapes |= {"attention.wo": (dim, heads), "attention_norm": (dim,), "ffn_norm": (dim,)}
    shapes |= {"feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden), "feed_forward.w3": (hidden, dim)}
    named: dict[str, tuple[int, ...]]
    named = {f"layers.{layer}.{name}": shape for layer in range(params["n_layers"]) for name, shape in shapes.items()}
    named |= {"tok_embeddings": (params["vocab_size"], dim), "output": (params["vocab_size"], dim), "norm": (dim,)}
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        f"{name}.weight": torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * stds[0]
        for name, shape in named.items()
    }
    save_file(tensors, model / "consolidated.safetensors")


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a real engine over the waves; one without weights in a file gets drawn ones."""
    DummyModelLoader.load_weights = lambda _, model, __: _draw_dummy(model, *job["std"])
    # A process apart looks at the class of the model, lest it touch a GPU here; it takes seconds to begin.
    registry._run_in_subprocess = lambda look: look()
    counted = _count_layer_rows()
    llm = vllm.LLM(**job["engine"])
    waves = []
    for wave in job["waves"]:
        params = [
            vllm.SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                logprobs=request.get("logprobs", 0),
                ignore_eos=True,
                detokenize=False,
                extra_args=request.get("extra_args"),
            )
            for request in wave
        ]
        outputs = llm.generate([{"prompt_token_ids": each["prompt"]} for each in wave], params, use_tqdm=False)
        answers = [(request, output.outputs[0]) for request, output in zip(wave, outputs, strict=True)]
        waves.append(
            [
                {
                    "tokens": list(answer.token_ids),
                    "logprobs": [
                        step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)
                    ],
                    **({"first": _by_token(answer.logprobs[0])} if request.get("logprobs") == -1 else {}),
                }
                for request, answer in answers
            ]
        )
    rows: Counter[str] = sum((Counter(step.stats.snapshot()) for step in requests.all_steps()), Counter())
    return {"waves": waves, "rows": dict(rows), "layer_rows": dict(counted)}


def _by_token(step: Any) -> list[float]:
    """The log-probabilities of all tokens, by their numbers."""
    return [step[token].logprob for token in range(len(step))]


def _draw_dummy(model: torch.nn.Module, std: float, attention_std: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.01)
    draw(model, std, attention_std)


def _count_layer_rows() -> Counter[str]:
    """Rows that our kernel computed, by the name of vLLM's attention layer."""
    counted: Counter[str] = Counter()
    original = backend_impl.TrimixImpl._forward_cpu

    def forward(self: Any, layer: Any, query: Any, kv_cache: Any, step: Any, output: Any) -> None:
        original(self, layer, query, kv_cache, step, output)
        counted[layer.layer_name] += step.num_rows

    backend_impl.TrimixImpl._forward_cpu = forward  # type: ignore[method-assign]
    return counted


def foretell(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``doctor`` says of models: the start-up line, and why it is unsure of it, or the refusal."""
    # Heavy, and only needed here.
    from vllm_trimix.backend.preview import preview

    registry._run_in_subprocess = lambda look: look()
    found = []
    for model, flags in job["models"]:
        try:
            seen = preview(model, {"trimix": {"starting_layer": 0, "min_prompt_len": 0}}, flags)
            found.append({"line": seen.line, "unsure": seen.unsure, "refused": ""})
        except Exception as error:
            found.append({"line": "", "unsure": None, "refused": str(error)})
    return found


@torch.no_grad()
def truth(job: dict[str, Any]) -> list[dict[str, list[float]]]:
    """Of each answer, the log-probabilities of its tokens by Hugging Face: dense, and under the mask."""
    config = transformers.AutoConfig.from_pretrained(job["model"], **job["config"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = [{"dense": _logprobs(model, answer)} for answer in job["answers"]]
    if job["layers"]:
        settings = use_triangle(model, layers=job["layers"], **job["pattern"])
    for answer, logprobs in zip(job["answers"], found, strict=True):
        if job["layers"]:
            settings.prompt_len = len(answer["prompt"])
        logprobs["masked"] = _logprobs(model, answer) if job["layers"] else logprobs["dense"]
    return found


def _logprobs(model: Any, answer: dict[str, list[int]]) -> list[float]:
    prompt, tokens = answer["prompt"], answer["tokens"]
    logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
