"""Makes ``--attention-backend TRIMIX`` known, in every process, and routes its selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum

# Nothing else of this package: a process with another backend pays for what is imported here.
from vllm_trimix.backend import compat
from vllm_trimix.backend.names import CLASS_PATH, ENTRY, NAME, RESOLVED, misplaced, uses_trimix

# Under vLLM's logger namespace, so that its handlers and level apply.
logger = init_logger("vllm.vllm_trimix")


def register_trimix() -> None:
    """Adds the backend's name and routes its selection. Idempotent.

    On an untested vLLM the name stays known, and selecting it fails with one clear line.
    """
    register_member()
    # Detects the platform: only once vLLM asks for plugins.
    from vllm.platforms import current_platform

    platform = type(current_platform)
    compat.wrap_once(platform, "check_and_update_config", _checked_config)
    if compat.unsupported_reason() is None:
        compat.wrap_once(platform, "get_attn_backend_cls", _composed_backend)


def register_member() -> None:
    """Adds the backend's name. Idempotent."""
    if NAME in AttentionBackendEnum.__members__:
        return
    if hasattr(AttentionBackendEnum, "register"):
        member = AttentionBackendEnum.register(NAME, CLASS_PATH)
    else:
        # Before 0.32 members can't be registered; the name must still be known to be refused clearly.
        member = object.__new__(AttentionBackendEnum)
        member._name_, member._value_ = NAME, CLASS_PATH
        AttentionBackendEnum._member_map_[NAME] = member
        AttentionBackendEnum._value2member_map_[CLASS_PATH] = member
        AttentionBackendEnum._member_names_.append(NAME)
    # Looked up on the instance by copyreg; the default would unpickle by value, unknown in a fresh process.
    member.__reduce_ex__ = lambda protocol: (restore_member, ())


def restore_member() -> AttentionBackendEnum:
    """Unpickles the member in a process where plugins have not been loaded yet."""
    register_member()
    return AttentionBackendEnum[NAME]


def _checked_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        selected = uses_trimix(vllm_config)
        if selected and (reason := compat.unsupported_reason()):
            raise _configuration_error(reason)
        original(cls, vllm_config)
        if selected:
            # Heavy: only where TRIMIX runs.
            from vllm_trimix.backend import admission, settings

            try:
                settings.resolve_into(vllm_config)
            except ValueError as error:
                raise _configuration_error(str(error)) from None
            admission.install()
        elif _ignored_entry(vllm_config.additional_config):
            logger.warning_once(
                "additional_config has a 'trimix' entry, but the attention backend is not TRIMIX; it is ignored. "
                "Add --attention-backend TRIMIX to use it."
            )
        elif (name := misplaced(vllm_config.additional_config)) is not None:
            logger.warning_once(
                "additional_config.%s: TRIMIX doesn't read it there: it reads the entry 'trimix', and needs "
                "--attention-backend TRIMIX.",
                name,
            )

    return check_and_update_config


def _configuration_error(reason: str) -> Exception:
    # Heavy, likewise: pydantic.
    from vllm_trimix.config.entry import ConfigurationError

    return ConfigurationError(reason)


def _ignored_entry(additional: Any) -> bool:
    """Whether a ``trimix`` entry was written for nothing; a draft model's copy of a TRIMIX configuration is not."""
    return isinstance(additional, dict) and ENTRY in additional and RESOLVED not in additional


def _composed_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if getattr(selected_backend, "name", None) != NAME:
            return str(original(cls, selected_backend, attn_selector_config, num_heads))
        # Heavy, likewise.
        from vllm_trimix.backend import attention, settings

        forced = settings.current().dense_backend
        dense = AttentionBackendEnum[forced] if forced else None
        return attention.compose(original(cls, dense, attn_selector_config, num_heads))

    return get_attn_backend_cls
