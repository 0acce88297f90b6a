"""vLLM's entry point (group ``vllm.general_plugins``): makes the name TRIMIX known in this process."""

from __future__ import annotations

import logging


def register() -> None:
    """Registers the backend. Idempotent; never raises, because an exception here kills every vLLM command."""
    try:
        # vLLM's own import may fail.
        from vllm_trimix.backend.registration import register_trimix

        register_trimix()
    except Exception:
        logging.getLogger("vllm.vllm_trimix").exception("TRIMIX could not be registered; other backends are unaffected")
