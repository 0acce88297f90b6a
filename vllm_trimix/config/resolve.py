"""The user's entry, a preset and the model's facts merged into what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN, Resolved, TrimixConfig, parse_config
from vllm_trimix.config.identity import known_id, proposal
from vllm_trimix.config.layers import parse_layers
from vllm_trimix.config.preset_files import named_preset, preset_config
from vllm_trimix.config.presets import find_preset
from vllm_trimix.config.shallow import DEFAULT_MIN_SEQ_LEN, merged_shallow, resolve_shallow
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.untrusted import quoted


def resolve(
    raw: object,
    *,
    model: str,
    num_layers: int,
    model_entry: object = None,
    num_heads: int | None = None,
    min_seq_len: int = DEFAULT_MIN_SEQ_LEN,
    text_config: Any = None,
) -> Resolved:
    """Merges the user's entry with a preset into what runs.

    A preset is, in this order: ``preset`` in the entry (name or file), the ``trimix`` entry of the model's own
    config.json, a shipped preset for the id that the model has or is cached under. A preset file may be an overlay: its
    key ``base`` names another preset, whose keys its own win over. Keys in the user's entry win over both. A
    ``shallow`` entry that names neither a pattern nor a head file changes keys of the one below it; any other takes its
    place.

    Args:
        raw: The user's ``trimix`` entry; None when there is none.
        model: The model as the user named it (HF id or path).
        num_layers: Layers of the model.
        model_entry: The ``trimix`` entry of the model's config.json, or None.
        num_heads: Query heads of a layer, of all devices together; None where a head file can't be used.
        min_seq_len: Default of ``shallow.min_seq_len`` on this machine.
        text_config: The model's configuration of its text part, of transformers: what a refusal proposes a preset by.

    Raises:
        ValueError: Bad entry, unreadable preset, layers outside the model, or no way to know the layers.
    """
    config = parse_config({} if raw is None else raw)
    preset, source = _load_preset(config, model, model_entry)
    if config.layers is not None:
        layers, source = parse_layers(config.layers, num_layers=num_layers), "config"
    elif config.starting_layer is not None:
        if config.starting_layer >= num_layers:
            raise ValueError(
                f"trimix.starting_layer: {quoted(config.starting_layer)} is outside this model's "
                f"{num_layers} layers (0-{num_layers - 1})"
            )
        layers, source = tuple(range(config.starting_layer, num_layers)), "config"
    elif preset is not None and preset.layers is not None:
        layers = parse_layers(preset.layers, num_layers=num_layers)
    elif preset is not None and preset.starting_layer is not None:
        layers = parse_layers(f"{preset.starting_layer}-{num_layers - 1}", num_layers=num_layers)
    elif config.preset is not None:
        raise ValueError(
            f"trimix.preset: {quoted(config.preset)} names no layers for this model's {num_layers}; "
            'add "layers" to it, or "base" with the preset that it builds on'
        )
    else:
        raise ValueError(_unknown(model, num_layers, text_config))

    def setting(key: str, default: Any) -> Any:
        for candidate in (config, preset):
            value = getattr(candidate, key, None)
            if value is not None:
                return value
        return default

    return Resolved(
        layers=layers,
        num_layers=num_layers,
        n_init=setting("n_init", Triangle.n_init),
        n_local=setting("n_local", Triangle.n_local),
        last_n=setting("last_n", Triangle.last_n),
        min_prompt_len=setting("min_prompt_len", DEFAULT_MIN_PROMPT_LEN),
        dense_backend=setting("dense_backend", None),
        prompt_logprobs=config.prompt_logprobs,
        stats_log_interval=config.stats_log_interval,
        source=source,
        shallow=resolve_shallow(
            merged_shallow(config.shallow, None if preset is None else preset.shallow),
            triangle_layers=layers,
            num_layers=num_layers,
            num_heads=num_heads,
            last_n=setting("last_n", Triangle.last_n),
            min_seq_len=min_seq_len,
        ),
    )


def _load_preset(config: TrimixConfig, model: str, model_entry: object) -> tuple[TrimixConfig | None, str]:
    if config.preset is not None:
        preset, name = named_preset(config.preset, where="trimix.preset", folder=Path(), above=())
        return preset, f"preset:{name}"
    if model_entry is not None:
        return preset_config(model_entry, "the model's config.json entry 'trimix'"), "model"
    known = known_id(model)
    if known is None:
        return None, "config"
    return preset_config(find_preset(known), f"preset {quoted(known)}"), f"preset:{known}"


def _unknown(model: str, num_layers: int, text_config: Any) -> str:
    """Why a model without a preset is refused, and what to do: nothing here may contradict a preset."""
    found = None if text_config is None else proposal(text_config)
    return (
        f"TRIMIX has no preset for model {quoted(model)} and will not guess its layers. {f'{found}. ' if found else ''}"
        '`vllm-trimix probe` finds the layers and writes a preset: {"trimix": {"preset": FILE}}; or choose some of '
        f"0-{num_layers - 1} yourself, as trimix.layers or trimix.starting_layer (README, 'Choosing layers')"
    )
