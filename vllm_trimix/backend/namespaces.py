"""Namespaces of the prefix cache: which requests may share cached keys and values."""

from __future__ import annotations

from typing import Any

from vllm_trimix.backend.names import KEY
from vllm_trimix.config.entry import Resolved

SALT = "trimix-dense"
TRIANGLE_SALT = "trimix-triangle"
DYNAMIC_SALT = "trimix-dynamic"
RESERVED = (SALT, TRIANGLE_SALT, DYNAMIC_SALT)
"""What no user's own salt may begin with."""

# Connectors that move blocks between two requests of one id (NIXL), key them by vLLM's own salted hashes (offloading),
# or pass the salt on (LMCache, multi-process).
SALT_AWARE_CONNECTORS = (
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "LMCacheMPConnector",
)


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
    """The engine's KV connector if it is not known to honour ``cache_salt``, else None."""
    name = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    return None if name is None or name in SALT_AWARE_CONNECTORS else str(name)
