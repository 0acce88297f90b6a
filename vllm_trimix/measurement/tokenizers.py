"""A model's tokenizer, or why there is none that could make prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tokenizer_config.json", "vocab.json", "spiece.model")
_WORDS = "The grass is green, the sky is blue, and number {} waits for {} at the old bridge. "


def load_tokenizer(model: str, *, tokenizer: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or another one in its place.

    Args:
        model: HF id or path.
        tokenizer: Another HF id or path, for models that come without one.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        ValueError: There is none, it can't be read, or texts get no tokens from it.
    """
    # Heavy.
    from transformers import AutoTokenizer

    source = tokenizer or model
    where = "--tokenizer: " if tokenizer else ""
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(_why_not(source, where, error)) from None
    _check(found, source, where)
    return found


def _why_not(source: str, where: str, error: Exception) -> str:
    """One line: what is missing, and what helps."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if "trust_remote_code" in str(error):
        return f"{where}{source}: its tokenizer comes as code; --trust-remote-code runs it"
    return _missing(source, where) or f"{where}{source}: its tokenizer can't be loaded: {reason}; {_hint(where)}"


def _missing(source: str, where: str) -> str | None:
    """Says so where a folder has no tokenizer at all."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).exists() for name in _FILES):
        return None
    return f"{where}{source} holds no tokenizer ({', '.join(_FILES[:3])}); {_hint(where)}"


def _hint(where: str) -> str:
    return "name another folder or HF id" if where else "name one by --tokenizer (HF id or path)"


def _check(tokenizer: Any, source: str, where: str) -> None:
    """Refuses a tokenizer whose texts never get longer: no prompt would ever be long enough.

    Raises:
        ValueError: Naming what it did.
    """
    short, long = ("".join(_WORDS.format(number, 7 * number) for number in range(count)) for count in (4, 64))
    try:
        tokens = [len(tokenizer(text, verbose=False).input_ids) for text in (short, long)]
    except Exception as error:
        raise ValueError(f"{where}{source}: its tokenizer fails on a plain text: {error}; {_hint(where)}") from None
    if tokens[1] < 2 * tokens[0] or tokens[1] < 64:
        # transformers makes an empty one where a folder has none.
        raise ValueError(
            _missing(source, where)
            or f"{where}{source}: its tokenizer makes {tokens[0]} tokens of {len(short)} characters and {tokens[1]} of "
            f"{len(long)}: texts don't get longer, so that no prompt can be made; is it complete? {_hint(where)}"
        )
