"""vLLM's entry points: make the name TRIMIX known in this process."""

from __future__ import annotations

import contextlib
import logging


def register_name() -> None:
    """Makes the name known before anything is configured; group ``vllm.platform_plugins``.

    General plugins load when an engine's arguments are made. That is too late for Python code that makes an
    ``AttentionConfig`` of its own. Platform plugins are asked while vLLM is imported; None says that this is none.
    """
    with contextlib.suppress(Exception):
        # vLLM's own import may fail; it says so itself.
        from vllm_trimix.backend.registration import register_member

        register_member()


def register() -> None:
    """Registers the backend; group ``vllm.general_plugins``. Idempotent.

    Never raises, because an exception here kills every vLLM command.
    """
    try:
        # vLLM's own import may fail.
        from vllm_trimix.backend.registration import register_trimix

        register_trimix()
    except Exception:
        logging.getLogger("vllm.vllm_trimix").exception("TRIMIX could not be registered; other backends are unaffected")
