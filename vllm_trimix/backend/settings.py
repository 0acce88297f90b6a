"""The resolved settings of an engine: written once in the front end, read in every process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import vllm.envs as envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_trimix.backend.names import ENTRY, RESOLVED, misnamed_entry
from vllm_trimix.backend.namespaces import SALT_AWARE_CONNECTORS, unsalted_connector
from vllm_trimix.config.entry import Resolved, TrimixConfig
from vllm_trimix.config.layer_types import type_reason
from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.resolve import resolve
from vllm_trimix.config.shallow import COMPILED_CPU_MIN_SEQ_LEN, DEFAULT_MIN_SEQ_LEN
from vllm_trimix.kernels import cpp_sparse
from vllm_trimix.untrusted import quoted

logger = init_logger("vllm.vllm_trimix")

_SPARSE_CONFIG = "sparse_attention_config.json"
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")


def resolve_into(vllm_config: Any) -> None:
    """Validates the ``trimix`` entry against the model and stores what runs in ``additional_config``.

    There it reaches every worker and is part of the compile hash. A configuration that already holds resolved
    settings (a copy that vLLM made for a draft model or a test) is left alone.

    Raises:
        ValueError: Naming the value, the limit and the fix.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        raise ValueError(
            f"TRIMIX reads --additional-config as a JSON object; got {type(additional).__name__}. "
            'Pass e.g. \'{"trimix": {"starting_layer": 16}}\''
        )
    if RESOLVED in additional:
        _check_copy(additional)
        return
    if vllm_config.model_config is None:
        return
    _check_place(additional)
    _check_model(vllm_config)
    _check_features(vllm_config)
    model_config = vllm_config.model_config
    hf_config = model_config.hf_config
    resolved = resolve(
        additional.get(ENTRY),
        model=model_config.model,
        num_layers=model_config.get_total_num_hidden_layers(),
        model_entry=getattr(hf_config, ENTRY, None),
        # Files name them in many ways, and some differ by layer: vLLM has read them.
        num_heads=model_config.model_arch_config.total_num_attention_heads,
        min_seq_len=_min_seq_len(),
        text_config=model_config.hf_text_config,
    )
    _check_layers(resolved.layers, model_config, "trimix.layers")
    if resolved.shallow is not None:
        _check_layers(resolved.shallow.layers, model_config, "trimix.shallow.layers")
        _check_connector(vllm_config)
        for note in resolved.shallow.notes:
            logger.info_once("TRIMIX head file %s: %s", resolved.shallow.source, note)
    _check_dense_backend(resolved)
    vllm_config.additional_config = {**additional, RESOLVED: resolved.model_dump(mode="json")}


def _check_place(additional: dict[str, Any]) -> None:
    """Refuses an entry that stands where nobody reads it; beside a right one, it may be another plugin's."""
    misnamed = misnamed_entry(additional)
    loose = [key for key in additional if key in TrimixConfig.model_fields]
    if misnamed is not None:
        message = f"additional_config.{misnamed}: TRIMIX reads its entry as '{ENTRY}'; write {{\"{ENTRY}\": {{...}}}}"
    elif loose:
        own = json.dumps({key: additional[key] for key in loose}, default=str)
        own = own if len(own) <= 200 else "{...}"
        message = (
            f"additional_config: {', '.join(loose)} stand beside the '{ENTRY}' entry, where TRIMIX doesn't read them; "
            f'write them into it: {{"{ENTRY}": {own}}}'
        )
    else:
        return
    if ENTRY not in additional:
        raise ValueError(message)
    logger.warning_once("%s. It is ignored.", message)


def _check_copy(additional: dict[str, Any]) -> None:
    """Refuses resolved settings that no front end wrote: workers would trip over them."""
    try:
        Resolved.model_validate(additional[RESOLVED])
    except ValueError:
        raise ValueError(
            f"additional_config.{RESOLVED} is internal, and {quoted(additional[RESOLVED])} is not what TRIMIX writes "
            f"there; remove it, and write {ENTRY} instead"
        ) from None


def of(vllm_config: Any) -> Resolved:
    """The settings of this engine, as resolved in the front end."""
    return _parse(json.dumps(vllm_config.additional_config[RESOLVED], sort_keys=True))


@functools.lru_cache(maxsize=8)
def _parse(text: str) -> Resolved:
    return Resolved.model_validate_json(text)


def current() -> Resolved:
    """The settings of the engine whose configuration is current in this process."""
    return of(get_current_vllm_config())


def _check_model(vllm_config: Any) -> None:
    model_config = vllm_config.model_config
    name = model_config.model
    if model_config.use_mla:
        raise ValueError(
            f"TRIMIX does not support MLA models ({name}): their cache holds compressed keys. "
            "Choose an MLA backend, or leave --attention-backend unset"
        )
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"TRIMIX does not support encoder-decoder models ({name}): they have no long causal prefill. "
            "Leave --attention-backend unset"
        )
    if getattr(model_config, "is_attention_free", False):
        raise ValueError(f"TRIMIX needs attention layers; {name} has none. Leave --attention-backend unset")
    if model_config.runner_type == "pooling":
        raise ValueError(
            f"TRIMIX does not support pooling models ({name}): they read every prompt row. "
            "Leave --attention-backend unset"
        )
    if getattr(model_config.hf_text_config, "dual_chunk_attention_config", None):
        raise ValueError(_dual_chunk(name))
    kv_dtype = vllm_config.cache_config.cache_dtype
    if kv_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"TRIMIX does not support --kv-cache-dtype {kv_dtype}; choose one of {', '.join(KV_CACHE_DTYPES)}"
        )


def _dual_chunk(name: str) -> str:
    """What to do about a model with dual chunk attention, which vLLM can't serve any more (0.32, 0.33)."""
    line = (
        f"TRIMIX does not support dual chunk attention, which {name} asks for. Serve it with full attention: "
        "--hf-overrides '{\"dual_chunk_attention_config\": null}'"
    )
    if Path(name, _SPARSE_CONFIG).exists() or not Path(name).is_dir():
        line += f", from a folder without {_SPARSE_CONFIG} (vLLM fails on the two together)"
    return line


def _check_features(vllm_config: Any) -> None:
    """Refuses what the plan can't follow."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    asked = {
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--decode-context-parallel-size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
        "adaptive verification of draft tokens": getattr(speculative, "enable_adaptive_verification", False),
        "VLLM_USE_RUST_FRONTEND (it admits requests without opt-out and namespaces)": getattr(
            envs, "VLLM_USE_RUST_FRONTEND", False
        ),
        "R-SWA models": getattr(vllm_config.model_config, "rswa_window", None) is not None,
    }
    found = [name for name, on in asked.items() if on]
    if found:
        raise ValueError(f"TRIMIX does not support {', '.join(found)}. Turn it off, or leave --attention-backend unset")


def _check_dense_backend(resolved: Resolved) -> None:
    forced = resolved.dense_backend
    if forced is not None and current_platform.is_cpu() != (forced == "CPU_ATTN"):
        raise ValueError(
            f"trimix.dense_backend: {forced!r} does not run on this platform ({current_platform.device_name}); "
            "remove it to build on the platform's own backend"
        )


def _min_seq_len() -> int:
    """From which length on dynamic patterns are taken to pay on this machine."""
    compiled = current_platform.is_cpu() and cpp_sparse.is_available()
    return COMPILED_CPU_MIN_SEQ_LEN if compiled else DEFAULT_MIN_SEQ_LEN


def _check_connector(vllm_config: Any) -> None:
    """Refuses to share keys that a dynamic pattern computed through a store that can't tell them from others."""
    name = unsalted_connector(vllm_config)
    if name is not None:
        raise ValueError(
            f"trimix.shallow: KV connector {name} is not known to honour cache_salt, and would mix keys of different "
            f"patterns; remove one of them, or use one of {', '.join(SALT_AWARE_CONNECTORS)}"
        )


def _check_layers(layers: tuple[int, ...], model_config: Any, where: str) -> None:
    """Refuses a set in which no layer can be sparse; an empty set is the user's own choice."""
    ineligible = ineligible_layers(model_config)
    if layers and ineligible.keys() >= set(layers):
        full = [layer for layer in range(model_config.get_total_num_hidden_layers()) if layer not in ineligible]
        reasons = {ineligible[layer] for layer in layers}
        fix = f"eligible: {format_layers(full)}"
        if not full:
            fix = "no layer of this model is eligible. Leave --attention-backend unset"
            if reasons == {"sliding_window"}:
                fix += (
                    f", or serve it without its window of {model_config.get_sliding_window()} tokens: "
                    "--disable-sliding-window, which limits the context to that"
                )
        raise ValueError(
            f"{where}: {format_layers(layers)} all stay stock in {model_config.model} ({', '.join(sorted(reasons))}); "
            + fix
        )


def ineligible_layers(model_config: Any) -> dict[int, str]:
    """Layers that the configuration says stay stock by the model's own design, global index to reason.

    Less than the built model tells, but known before it is built, and of other pipeline stages.
    """
    text_config = model_config.hf_text_config
    windowed = is_window(model_config.get_sliding_window(), model_config.max_model_len)
    for key in ("layer_types", "layers_block_type"):
        kinds = getattr(text_config, key, None)
        if kinds:
            reasons = {index: _type_reason(str(kind), windowed) for index, kind in enumerate(kinds)}
            return {index: reason for index, reason in reasons.items() if reason is not None}
    if windowed and getattr(text_config, "use_sliding_window", True) and not _mixes_windows(text_config):
        return dict.fromkeys(range(model_config.get_total_num_hidden_layers()), "sliding_window")
    return {}


def is_window(size: Any, max_model_len: int) -> bool:
    """Whether a sliding window hides anything: one no shorter than the context is full attention."""
    return size is not None and int(size) < max_model_len


def _mixes_windows(text_config: Any) -> bool:
    """Whether a configuration says, by a key of its own, that not all layers have the window."""
    return any(
        isinstance(value, list | str | int) and value and ("pattern" in key or "interleave" in key)
        for key, value in vars(text_config).items()
    )


def _type_reason(kind: str, windowed: bool) -> str | None:
    """Why a layer of this Hugging Face ``layer_types`` entry stays stock, or None."""
    reason = type_reason(kind)
    return None if reason == "sliding_window" and not windowed else reason
