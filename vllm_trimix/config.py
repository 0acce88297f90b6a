"""The ``trimix`` configuration: what users may write, and what runs.

Users write ``--additional-config '{"trimix": {...}}'``. ``TrimixConfig`` is that, validated; ``resolve`` merges it
with a preset and the model's facts into the ``Resolved`` settings that every process obeys. Nothing here knows vLLM.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_trimix.layers import check_size, parse_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.presets import find_preset
from vllm_trimix.shallow import DEFAULT_MIN_SEQ_LEN, Shallow, merged_shallow, resolve_shallow
from vllm_trimix.untrusted import MAX_TOKENS, check_object, quoted, read_json, reason

DenseBackend = Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_ATTN"]

# Twice the largest break-even of the `vllm-trimix calibrate` runs under benchmarks/results, as a margin for machines
# that are not among them, rounded up to a power of two; a test compares them.
DEFAULT_MIN_PROMPT_LEN = 4096

MAX_INTERVAL = 86400.0
"""Seconds between two lines of the log: a day. Far longer waits overflow the platform's clock."""

MAX_PRESET_BYTES = 2**24
"""Of a preset file; those that the probe writes have some ten thousand."""

MAX_BASES = 16
"""Presets that build on one another."""


class ConfigurationError(Exception):
    """A server that can't start as configured. No ValueError: vLLM would wrap that in a report of its own."""


class TrimixConfig(BaseModel):
    """What users write under ``trimix``. Every key is optional; unset keys come from the preset.

    Attributes:
        starting_layer: First triangle layer; short for ``layers: "N-<last>"``.
        layers: Triangle layers, e.g. ``"5,7,10,15-35"`` or ``[5, 7]``; global indices. Empty: none.
        n_init: Sink keys, in tokens; 0 means no sinks.
        n_local: Local window, in tokens, counting the query itself.
        last_n: Dense last prompt rows, in tokens; 0 means none (the A-shape).
        min_prompt_len: Prompts shorter than this (in tokens) stay dense.
        preset: Name of a shipped preset, or path of a preset file, which may build on another by ``base``.
        dense_backend: The stock backend to build on; unset means the platform's own choice.
        prompt_logprobs: What requests that read prompt rows measure: stock vLLM ("dense") or the mask ("triangle").
        stats_log_interval: Seconds between the log lines that say what ran; 0 turns them off.
        shallow: A dynamic pattern for layers outside the triangle set, see ``vllm_trimix.shallow``; ``"dense"`` for
            none, where the preset has one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    starting_layer: int | None = Field(default=None, ge=0)
    layers: str | list[int | str] | None = None
    n_init: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    n_local: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    last_n: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    min_prompt_len: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    preset: str | None = Field(default=None, min_length=1)
    dense_backend: DenseBackend | None = None
    prompt_logprobs: Literal["dense", "triangle"] = "dense"
    stats_log_interval: float = Field(default=10.0, ge=0, le=MAX_INTERVAL)
    shallow: dict[str, Any] | Literal["dense"] | None = None


class Resolved(BaseModel):
    """What runs: complete, validated, plain JSON, the same in every process of the server.

    Attributes:
        layers: Triangle layers, global indices, ascending.
        num_layers: Layers of the model.
        source: Where the layers came from, e.g. ``config``, ``preset:NAME`` or ``preset:FILE+BASE``.
        shallow: What runs in layers outside the triangle set; None: they are dense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...]
    num_layers: int
    n_init: int
    n_local: int
    last_n: int
    min_prompt_len: int
    dense_backend: DenseBackend | None
    prompt_logprobs: Literal["dense", "triangle"]
    stats_log_interval: float
    source: str
    shallow: Shallow | None = None

    @property
    def triangle(self) -> Triangle:
        """The pattern's parameters."""
        return Triangle(n_init=self.n_init, n_local=self.n_local, last_n=self.last_n)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides which keys a row sees."""
        masks = self.model_dump_json(exclude={"dense_backend", "prompt_logprobs", "stats_log_interval", "source"})
        return hashlib.sha256(masks.encode()).hexdigest()[:16]


def parse_config(raw: object) -> TrimixConfig:
    """Validates the user's ``trimix`` entry.

    Raises:
        ValueError: Naming each bad key, its value, the limit and the nearest valid key.
    """
    if not isinstance(raw, dict):
        raise ValueError(
            f'trimix: expected a JSON object such as {{"starting_layer": 16}}, got {type(raw).__name__} {quoted(raw)}'
        )
    check_object(raw, "trimix")
    check_size(raw.get("layers"), where="trimix.layers")
    try:
        config = TrimixConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(raw, item) for item in _distinct(error))) from None
    if config.starting_layer is not None and config.layers is not None:
        raise ValueError(
            f"trimix: starting_layer ({quoted(config.starting_layer)}) and layers ({quoted(config.layers)}) "
            "are two spellings of one setting; keep one"
        )
    return config


def _distinct(error: ValidationError) -> list[dict[str, Any]]:
    """One error a key: pydantic reports every branch of a union."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        found.setdefault(str(item["loc"][0]), dict(item))
    return list(found.values())


def _explain(raw: dict[str, Any], item: dict[str, Any]) -> str:
    key = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        valid = list(TrimixConfig.model_fields)
        near = difflib.get_close_matches(key[:100], valid, n=1, cutoff=0.5)
        # n_last is the published kernel's own spelling of last_n.
        hint = "last_n" if key == "n_last" else near[0] if near else None
        did_you_mean = f"; did you mean '{hint}'?" if hint else ""
        return f"unknown key {quoted(key)} in trimix config{did_you_mean} (valid: {', '.join(valid)})"
    if key == "layers":
        return f'trimix.layers: {quoted(raw[key])} is not a layer list; write e.g. "16-31", "5,7,10,15-35" or [5, 7]'
    if key == "shallow":
        return f'trimix.shallow: {quoted(raw[key])} is not valid: write e.g. {{"pattern": "flexprefill"}}, or "dense"'
    message = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"trimix.{key}: {quoted(raw[key])} is not valid: should be {message}"


def resolve(
    raw: object,
    *,
    model: str,
    num_layers: int,
    model_entry: object = None,
    num_heads: int | None = None,
    min_seq_len: int = DEFAULT_MIN_SEQ_LEN,
) -> Resolved:
    """Merges the user's entry with a preset into what runs.

    A preset is, in this order: ``preset`` in the entry (name or file), the ``trimix`` entry of the model's own
    config.json, a shipped preset for exactly this HF id. A preset file may be an overlay: its key ``base`` names
    another preset, whose keys its own win over. Keys in the user's entry win over both. A ``shallow`` entry that names
    neither a pattern nor a head file changes keys of the one below it; any other takes its place.

    Args:
        raw: The user's ``trimix`` entry; None when there is none.
        model: The model as the user named it (HF id or path).
        num_layers: Layers of the model.
        model_entry: The ``trimix`` entry of the model's config.json, or None.
        num_heads: Query heads of a layer, of all devices together; None where a head file can't be used.
        min_seq_len: Default of ``shallow.min_seq_len`` on this machine.

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
        raise ValueError(
            f"TRIMIX has no preset for model {quoted(model)} and will not guess its layers. `vllm-trimix probe` finds "
            'them and writes a preset: {"trimix": {"preset": FILE}}; or set them, e.g. --additional-config '
            f"'{{\"trimix\": {{\"starting_layer\": {num_layers // 2}}}}}' (README, 'Choosing layers')"
        )

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


def is_preset_file(name: str, folder: Path = Path()) -> bool:
    """Whether a preset's name means a file, seen from ``folder``, rather than a shipped preset."""
    return name.endswith(".json") or (folder / name).is_file()


def _load_preset(config: TrimixConfig, model: str, model_entry: object) -> tuple[TrimixConfig | None, str]:
    if config.preset is not None:
        preset, name = _named_preset(config.preset, where="trimix.preset", folder=Path(), above=())
        return preset, f"preset:{name}"
    if model_entry is not None:
        return _preset_config(model_entry, "the model's config.json entry 'trimix'"), "model"
    entry = find_preset(model)
    return (None, "config") if entry is None else (_preset_config(entry, f"preset {quoted(model)}"), f"preset:{model}")


def _named_preset(name: str, *, where: str, folder: Path, above: tuple[Path, ...]) -> tuple[TrimixConfig, str]:
    """Loads a preset and, for an overlay, what it builds on.

    Args:
        name: A shipped preset, or a file seen from ``folder``.
        where: The setting that names it, for errors.
        above: The overlays that led here, outermost first.

    Returns:
        The merged preset, and its name with those of its bases, e.g. ``mine.json+Qwen/Qwen3-8B``.
    """
    try:
        is_file, path = is_preset_file(name, folder), folder / name
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {quoted(name)} is no path: {reason(error)}") from None
    if not is_file:
        shipped = find_preset(name)
        if shipped is None:
            raise ValueError(f"{where}: {quoted(name)} is neither a shipped preset nor a file; shipped: {_shipped()}")
        return _preset_config(shipped, f"preset {name!r}"), name
    chain = (*above, real)
    if real in above:
        raise ValueError(
            f"{where}: {' -> '.join(quoted(item.name)[1:-1] for item in chain)} is a circle; "
            'one of them must name its "layers" instead of a "base"'
        )
    if len(chain) > MAX_BASES:
        raise ValueError(f"{where}: {quoted(name)} is one preset too many: at most {MAX_BASES} build on one another")
    label = f"preset file {quoted(str(path))}"
    entry = read_json(path, f"{where}: cannot read {quoted(str(path))}", max_bytes=MAX_PRESET_BYTES)
    entry = _with_own_files(entry, real.parent)
    if not isinstance(entry, dict) or "base" not in entry:
        return _preset_config(entry, label), path.name
    base = entry["base"]
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{label}: base: {quoted(base)} is not valid: should be a shipped preset or the path of a preset file"
        )
    own = _preset_config({key: value for key, value in entry.items() if key != "base"}, label)
    # Read at its real place, so that a link to an overlay still finds the base beside it.
    below, below_name = _named_preset(base, where=f"{label}: base", folder=real.parent, above=chain)
    return _overlaid(own, below), f"{path.name}+{below_name}"


def _with_own_files(entry: object, folder: Path) -> object:
    """A preset file's entry, with the head file that it names seen from its own folder."""
    if isinstance(entry, dict):
        shallow = entry.get("shallow")
        if isinstance(shallow, dict) and isinstance(shallow.get("heads"), str):
            return {**entry, "shallow": {**shallow, "heads": str(folder / shallow["heads"])}}
    return entry


def _overlaid(own: TrimixConfig, below: TrimixConfig) -> TrimixConfig:
    """The keys of ``below``, with those that ``own`` sets in their place."""
    mine = {key: value for key, value in own if value is not None}
    kept = {key: value for key, value in below if value is not None}
    if "layers" in mine or "starting_layer" in mine:
        # Two spellings of one setting.
        kept.pop("layers", None)
        kept.pop("starting_layer", None)
    shallow = merged_shallow(own.shallow, below.shallow)
    return TrimixConfig.model_validate({**kept, **mine, **({} if shallow is None else {"shallow": shallow})})


def _shipped() -> str:
    from vllm_trimix.presets import preset_names

    return ", ".join(preset_names())


def _preset_config(entry: object, name: str) -> TrimixConfig:
    """A preset is what a model needs, plus ``provenance`` and ``models``, which only people and the search read."""
    settings = entry
    if isinstance(entry, dict):
        settings = {key: value for key, value in entry.items() if key not in ("provenance", "models")}
        server_keys = [key for key in ("preset", "prompt_logprobs", "stats_log_interval") if key in settings]
        if server_keys:
            raise ValueError(
                f"{name}: {server_keys[0]!r} is a setting of the server, not of a model; move it to trimix"
            )
    try:
        return parse_config(settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
