"""Who answers: an engine that is started for one configuration, or a server that runs already."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, Protocol

from vllm_trimix.evaluation.configurations import STOCK, TRIMIX, Configuration
from vllm_trimix.evaluation.sample import NUM_LOGPROBS, Measure, Sample
from vllm_trimix.measurement.engine_process import EngineProcess
from vllm_trimix.measurement.hardware import this_machine

_ENGINE = "vllm_trimix.backend.engines.evaluation"
_ROWS = re.compile(r"TRIMIX rows: (triangle=\d+ dynamic=\d+ .*)")
_START_LINE = re.compile(r"TRIMIX: (layers=.*)")
# What else the engine reads of a prompt.
_READ: dict[Measure, dict[str, Any]] = {
    Measure.PERPLEXITY: {"nll": True},
    Measure.AGREEMENT: {"logprobs": NUM_LOGPROBS},
}
# Until what the last request ran is in the log.
_SETTLE_SECONDS = 1.2


class Lost(Exception):
    """Nobody is there to answer any more."""


class Asker(Protocol):
    """Answers samples under one configuration; a context manager."""

    facts: dict[str, Any]
    """What ran, for the results; complete when the context is left."""

    def __enter__(self) -> Asker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def ask(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Asks samples, all at the same time; what ``answer_of`` takes for each.

        Raises:
            Lost: The engine or the server is gone.
        """


class EngineAsker:
    """An engine of one configuration in a process of its own."""

    def __init__(self, configuration: Configuration, *, model: str, flags: list[str], max_model_len: int) -> None:
        """Starts it.

        Raises:
            ValueError: The model, the flags or the entry are wrong.
            EngineDied: It ended.
        """
        stock = configuration.entry is None
        job = {
            "model": model,
            "flags": [*flags, *configuration.flags],
            "trimix": configuration.entry,
            "max_model_len": max_model_len,
            "max_logprobs": NUM_LOGPROBS,
        }
        # Stock is vLLM without the plugin, not the plugin at rest.
        environment = {"VLLM_PLUGINS": _other_plugins()} if stock else {}
        self._configuration = configuration
        self._process = EngineProcess(_ENGINE, job, environment=environment)
        try:
            self.facts = self._process.wait_ready()["ready"]
        except BaseException as error:
            self._process.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> EngineAsker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._configuration.entry is not None and kind is None:
            time.sleep(_SETTLE_SECONDS)
            log = self._process.log
            found = _START_LINE.search(log)
            self.facts["start_line"] = found[1] if found else None
            self.facts["rows"] = _rows(log)
        self._process.__exit__(kind, error, trace)

    def ask(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """As ``Asker.ask``; an engine that died is told from its log."""
        prompts = [
            {
                "tokens": sample.prompt,
                "max_tokens": sample.max_tokens,
                "special_tokens": bool(sample.thought_end),
                "keep_tokens": sample.keeps_tokens,
                **_READ.get(sample.measure, {}),
            }
            for sample in samples
        ]
        answers: list[dict[str, Any]] = self._process.ask({"prompts": prompts})["answers"]
        return answers


def _other_plugins() -> str:
    """vLLM's plugins without this one."""
    allowed = os.environ.get("VLLM_PLUGINS")
    names = [point.name for point in entry_points(group="vllm.general_plugins")]
    return ",".join(name for name in names if name != "trimix" and (allowed is None or name in allowed.split(",")))


def _rows(log: str) -> dict[str, int]:
    """Query rows by class, over the whole log."""
    rows: Counter[str] = Counter()
    for line in _ROWS.findall(log):
        pairs = dict(item.split("=", 1) for item in line.split())
        rows.update({key: int(pairs[key]) for key in ("triangle", "dynamic", "last_n", "decode", "cached", "dense")})
        if pairs["reasons"] != "none":
            rows.update({key: int(value) for key, value in (item.split(":") for item in pairs["reasons"].split(","))})
    return dict(rows)


def connect(url: str, model: str | None) -> tuple[Any, str]:
    """A client of a server that runs TRIMIX, and the model's name there.

    Args:
        url: E.g. ``http://localhost:8000``.
        model: As the server calls it; None for the only one that it has.

    Raises:
        ValueError: Nobody answers, no such model, or a server without TRIMIX.
    """
    # Of the extra `eval`.
    import openai

    base = url.rstrip("/").removesuffix("/v1")
    # Not repeated: a repeated request's time would be that of two.
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=_key(), max_retries=0, timeout=3600)
    try:
        served = [entry.id for entry in client.models.list()]
        if model is not None and model not in served:
            raise ValueError(f"--served: {url} serves {', '.join(served)}, not {model!r}; name one of them")
        model = model or served[0]
        _check_plugin(client, url, model)
    except openai.OpenAIError as error:
        raise ValueError(f"--server: {url}: {_reason(error)}") from None
    return client, model


def _check_plugin(client: Any, url: str, model: str) -> None:
    """A stock server takes no notice of the opt-out: both configurations would be one, and look lossless."""
    # Of the extra `eval`.
    import openai

    wrong = {"vllm_xargs": {"trimix": "vllm-trimix-eval"}}
    try:
        client.completions.create(model=model, prompt="a", max_tokens=1, extra_body=wrong)
    except openai.BadRequestError as error:
        if "trimix" not in str(error):
            raise
    else:
        raise ValueError(
            f"--server: {url} doesn't run TRIMIX: start it with --attention-backend TRIMIX, or leave --server out"
        )


def _surroundings(url: str) -> dict[str, Any]:
    """Hardware and versions, as far as a server's address and answers tell."""
    # Of the extra `eval`.
    import httpx

    parts = httpx.URL(url)
    hardware = this_machine() if parts.host in ("127.0.0.1", "localhost", "::1") else f"the server {parts.host}"
    try:
        version = httpx.get(parts.join("/version"), timeout=10).json()["version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        version = "unknown"
    return {"hardware": hardware, "versions": {"vllm": str(version)}}


class ServerAsker:
    """A running server; the configuration is what its requests ask for."""

    def __init__(self, configuration: Configuration, *, url: str, model: str | None) -> None:
        """Finds the server's model.

        Args:
            configuration: ``stock`` or ``trimix``.
            url: E.g. ``http://localhost:8000``.
            model: As the server calls it; None for the only one that it has.

        Raises:
            ValueError: Nobody answers, or no such model.
        """
        self._wants = {STOCK: "off", TRIMIX: "on"}[configuration.name]
        self._client, self._model = connect(url, model)
        self.facts: dict[str, Any] = {"server": url, "served": self._model, "resolved": None, **_surroundings(url)}

    def __enter__(self) -> ServerAsker:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """As ``Asker.ask``; a request that the server refuses is answered with the key ``error``."""
        with ThreadPoolExecutor(len(samples)) as pool:
            return list(pool.map(self._ask, samples))

    def _ask(self, sample: Sample) -> dict[str, Any]:
        # Of the extra `eval`.
        import openai

        # A namespace of its own: no answer may come from rows that another rule computed.
        extra: dict[str, Any] = {"vllm_xargs": {"trimix": self._wants}, "cache_salt": uuid.uuid4().hex}
        if sample.thought_end:
            # It may be a special token.
            extra["skip_special_tokens"] = False
        if sample.keeps_tokens:
            extra["return_token_ids"] = True
        asked: dict[str, Any] = {
            "model": self._model,
            "prompt": list(sample.prompt),
            "max_tokens": sample.max_tokens,
            "temperature": 0,
        }
        try:
            if sample.measure == Measure.PERPLEXITY:
                return self._nll(asked, extra)
            if sample.measure == Measure.AGREEMENT:
                return self._likeliest(asked, extra)
            return self._answer(asked, extra)
        except openai.APIConnectionError as error:
            raise Lost(_reason(error)) from None
        except openai.OpenAIError as error:
            return {"error": _reason(error)}

    def _answer(self, asked: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        start, seconds, text = time.perf_counter(), None, ""
        tokens: list[int] = []
        for part in self._client.completions.create(**asked, stream=True, extra_body=extra):
            if seconds is None:
                seconds = time.perf_counter() - start
            text += "".join(choice.text or "" for choice in part.choices)
            tokens += [token for choice in part.choices for token in getattr(choice, "token_ids", None) or ()]
        return {"text": text, "seconds": seconds, "tokens": tokens}

    def _nll(self, asked: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        completion = self._client.completions.create(**asked, extra_body={**extra, "prompt_logprobs": 0})
        rows = getattr(completion.choices[0], "prompt_logprobs")[1:]  # noqa: B009
        scored = [row[str(token)]["logprob"] for token, row in zip(asked["prompt"][1:], rows, strict=True)]
        return {"nll": -sum(scored) / len(scored)}

    def _likeliest(self, asked: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        extra = {**extra, "return_tokens_as_token_ids": True, "return_token_ids": True}
        completion = self._client.completions.create(**asked, logprobs=NUM_LOGPROBS, extra_body=extra)
        choice = completion.choices[0]
        assert choice.logprobs is not None
        rows = choice.logprobs.top_logprobs or []
        likeliest = [
            [[int(token.removeprefix("token_id:")), round(value, 5)] for token, value in row.items()] for row in rows
        ]
        return {"text": choice.text, "tokens": getattr(choice, "token_ids"), "likeliest": likeliest}  # noqa: B009


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"


def _reason(error: Exception) -> str:
    """The server's own words where it has some."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    status = getattr(error, "status_code", None)
    text = " ".join(str(message or (json.dumps(body) if body else error)).split())[:400]
    return f"HTTP {status}: {text}" if status else text
