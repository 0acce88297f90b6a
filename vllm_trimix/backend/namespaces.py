"""Namespaces of the prefix cache: which requests may share cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm.envs as envs

from vllm_trimix.backend.names import KEY
from vllm_trimix.config.entry import Resolved
from vllm_trimix.untrusted import quoted

SALT = "trimix-dense"
TRIANGLE_SALT = "trimix-triangle"
DYNAMIC_SALT = "trimix-dynamic"
RESERVED = (SALT, TRIANGLE_SALT, DYNAMIC_SALT)
"""What no user's own salt may begin with."""

# Connectors that move blocks between two requests of one id (NIXL), key them by vLLM's own salted hashes (offloading,
# the simple one too), or pass the salt on (LMCache, multi-process).
SALT_AWARE_CONNECTORS = (
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
    "LMCacheMPConnector",
)

# It hands every block to each of its members, and takes blocks from any.
_MULTI = "MultiConnector"
_JUDGED = ("kv_connector", "kv_connector_extra_config", "kv_connector_module_path")
# What has members of members of members is no configuration that anyone serves.
_MAX_DEPTH = 8


def namespace(resolved: Resolved, reason: str | None, extra_args: dict[str, Any] | None) -> str | None:
    """The prefix-cache namespace of a request, or None for the common one.

    Args:
        resolved: What runs.
        reason: Why the request is dense, or None.
        extra_args: The request's own arguments.
    """
    if reason is not None:
        return SALT
    if resolved.shallow is None:
        return None
    return TRIANGLE_SALT if (extra_args or {}).get(KEY) == "triangle" else f"{DYNAMIC_SALT}-{resolved.fingerprint}"


def unsalted_connector(vllm_config: Any) -> str | None:
    """The engine's KV connector if it is not known to honour ``cache_salt``, else None.

    A ``MultiConnector`` honours it if all of its members do; the name is then the first member's that doesn't.
    """
    offloading = _offloading_connector(getattr(vllm_config, "cache_config", None))
    if offloading is not None:
        return _unsalted({"kv_connector": offloading}, 0)
    transfer = vllm_config.kv_transfer_config
    if getattr(transfer, "kv_connector", None) is None:
        return None
    return _unsalted({key: getattr(transfer, key, None) for key in _JUDGED}, 0)


def _offloading_connector(cache_config: Any) -> str | None:
    """What ``--kv-offloading-size`` becomes: vLLM puts it in the place of any other after this is first asked."""
    if getattr(cache_config, "kv_offloading_size", None) is None:
        return None
    if cache_config.kv_offloading_backend == "lmcache":
        return "LMCacheMPConnector"
    return "SimpleCPUOffloadConnector" if envs.VLLM_USE_SIMPLE_KV_OFFLOAD else "OffloadingConnector"


def _unsalted(connector: Mapping[str, Any], depth: int) -> str | None:
    name, extra, module = (connector.get(key) for key in _JUDGED)
    if module:
        # A class of somebody else's, whatever it is called.
        return f"{name} of {module}"
    if name != _MULTI:
        return None if name in SALT_AWARE_CONNECTORS else str(name)
    members = extra.get("connectors") if isinstance(extra, dict) else None
    if not isinstance(members, list) or not members or depth == _MAX_DEPTH:
        return _MULTI
    for member in members:
        found = _unsalted(member, depth + 1) if isinstance(member, dict) else quoted(member)
        if found is not None:
            return found if found.startswith(_MULTI) else f"{_MULTI} with {found}"
    return None
