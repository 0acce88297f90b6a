"""Per-request admission in the front end: validates ``vllm_xargs.trimix`` and separates prefix-cache namespaces.

Keys and values of a triangle layer's successors differ between triangle and dense prefill, so requests that stay dense
by their own wish (opt-out) or nature (they read prompt rows) must not share cached blocks with the others. Their
``cache_salt`` is prefixed, and the decision is stamped into ``extra_args`` for the workers to obey. Triangle requests
and prompts below the threshold share a namespace, so that chats keep their cache from turn to turn.

With dynamic patterns in the shallow layers, the cached keys depend on the patterns too: all requests that use them
share a namespace that carries a fingerprint of the configuration, those that asked for the triangle alone have another.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_trimix.backend import compat, settings
from vllm_trimix.backend.names import ALLOWED, DENSE_KEY, KEY, reads_prompt_rows, uses_trimix
from vllm_trimix.backend.namespaces import RESERVED, namespace, unsalted_connector
from vllm_trimix.untrusted import quoted

BEAM_REQUESTS = (
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
)

_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def install() -> None:
    """Installs both hooks; called where a TRIMIX configuration is made."""
    compat.wrap_once(InputProcessor, "__init__", _registered)
    compat.wrap_once(InputProcessor, "process_inputs", _admitted)
    compat.wrap_once(SamplingParams, "_verify_args", _verified)
    # Beam search makes its own SamplingParams, without extra_args.
    for module, name in BEAM_REQUESTS:
        with contextlib.suppress(ImportError):
            compat.wrap_once(getattr(importlib.import_module(module), name), "to_beam_search_params", _beam)


def check_extra_args(extra_args: dict[str, Any] | None) -> None:
    """Validates a request's own arguments.

    Raises:
        VLLMValidationError: HTTP 400; names the value and the allowed ones.
    """
    if not extra_args:
        return
    if not isinstance(extra_args, dict):
        raise VLLMValidationError(
            f"vllm_xargs: {quoted(extra_args)} is not an object of arguments", parameter="vllm_xargs"
        )
    for key in extra_args:
        # Whatever begins with our name was meant for us: a typo must not be an opt-out that nobody obeys.
        if key != KEY and str(key)[: len(KEY)].lower() == KEY:
            what = "is internal" if key == DENSE_KEY else "is unknown"
            raise VLLMValidationError(
                f"vllm_xargs.{quoted(key)[1:-1]} {what}; use vllm_xargs.{KEY} with 'on', 'triangle' or 'off'",
                parameter="vllm_xargs",
            )
    value = extra_args.get(KEY, "on")
    if not isinstance(value, str) or value not in ALLOWED:
        raise VLLMValidationError(
            f"vllm_xargs.{KEY}: {quoted(value)} is not valid; "
            "allowed values: 'on' (default), 'triangle' (shallow layers dense), 'off' (all dense)",
            parameter="vllm_xargs",
            value=quoted(value),
        )


def dense_reason(params: Any, *, resumable: bool, prompt_logprobs: str) -> str | None:
    """Why a request needs the dense namespace, or None."""
    if not hasattr(params, "extra_args"):
        return "pooling"
    if (params.extra_args or {}).get(KEY) == "off":
        return "opt_out"
    if prompt_logprobs == "dense" and reads_prompt_rows(params):
        return "prompt_logprobs"
    if resumable:
        return "streaming_input"
    return None


def _registered(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if uses_trimix(vllm_config):
            _engines.add(self)

    return __init__


def _admitted(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, resumable: bool = False, **kwargs: Any
    ) -> Any:
        if self not in _engines:
            return original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)
        check_extra_args(getattr(params, "extra_args", None))
        request = original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)
        _refuse_reserved_salt(request.cache_salt)
        resolved = settings.of(self.vllm_config)
        reason = dense_reason(params, resumable=resumable, prompt_logprobs=resolved.prompt_logprobs)
        salt = namespace(resolved, reason, getattr(params, "extra_args", None))
        if salt is not None:
            request.cache_salt = salt if request.cache_salt is None else f"{salt}:{request.cache_salt}"
        if reason is not None:
            _refuse_unsalted_connector(self.vllm_config, reason)
            if request.sampling_params is not None:
                # A new dict: the user's own may be shared by many requests.
                extra_args = request.sampling_params.extra_args or {}
                request.sampling_params.extra_args = {**extra_args, DENSE_KEY: reason}
        return request

    return process_inputs


def _verified(original: Callable[..., Any]) -> Callable[..., Any]:
    def _verify_args(self: Any) -> None:
        original(self)
        if _engines:
            check_extra_args(self.extra_args)

    return _verify_args


def _beam(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _engines:
            check_extra_args(self.vllm_xargs)
            choice = (self.vllm_xargs or {}).get(KEY, "on")
            if choice != "on":
                raise VLLMValidationError(
                    f"vllm_xargs.{KEY} {quoted(choice)} can't be combined with use_beam_search: beam search makes "
                    "requests of its own, without extra arguments. Leave one of them out",
                    parameter="vllm_xargs",
                )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _refuse_reserved_salt(cache_salt: str | None) -> None:
    """A triangle request that carried the dense namespace's salt would fill it with keys of a triangle prefill."""
    for salt in RESERVED:
        if cache_salt is not None and cache_salt.startswith(salt):
            raise VLLMValidationError(
                f"cache_salt {quoted(cache_salt)} starts with {salt!r}, which TRIMIX keeps for requests of its own "
                "choice; choose another salt",
                parameter="cache_salt",
            )


def _refuse_unsalted_connector(vllm_config: Any, reason: str) -> None:
    name = unsalted_connector(vllm_config)
    if name is None:
        return
    raise VLLMValidationError(
        f"this request must prefill densely ({reason}), but KV connector {name} may hand it keys and values of a "
        "triangle prefill: it is not known to honour cache_salt. Send it to a server without that connector",
        parameter="vllm_xargs" if reason == "opt_out" else None,
    )
