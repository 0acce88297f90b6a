"""Layers of a transformers model that stay as they are: the model's own attention, in blocks of rows.

Windows, chunks, learned sinks, biases: whatever a layer does besides, its own eager function knows. It takes a mask of
all pairs, though, which is quadratic in the prompt; here each block of rows gets its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_OWN_MASK = "the model, or a static cache, computes with the attention mask itself: its attention can't be replaced"


# Rows of a mask that are looked at at once.
_CHECKED_ROWS = 256


class Visibility:
    """The mask of a kind of layers, not made yet: transformers' rule for it, of which a block of rows can be made."""

    def __init__(self, **arguments: Any) -> None:
        """Keeps what transformers would make the mask of.

        Args:
            arguments: Of a mask function of transformers' ``AttentionMaskInterface``.
        """
        # A static cache counts on in the tensor that it gives as offset: what counts is now.
        now = {name: int(arguments.get(name, 0)) for name in ("q_offset", "kv_offset")}
        self._arguments = {**arguments, **now}

    @property
    def first(self) -> int:
        """Place of the first row among the keys."""
        first: int = self._arguments["q_offset"] - self._arguments["kv_offset"]
        return first

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether rows see all keys up to their own, and no others."""
        # Heavy.
        from transformers.masking_utils import causal_mask_function

        if self._arguments.get("mask_function", causal_mask_function) is causal_mask_function:
            return True
        # By what it does: a window longer than the prompt hides nothing, nor do overlays for images without any.
        rows, keys = self.shape[2:]
        for start in range(0, rows, _CHECKED_ROWS):
            stop = min(start + _CHECKED_ROWS, rows)
            block = self.block(start, stop)
            causal = torch.arange(keys, device=block.device) <= self.first + torch.arange(
                start, stop, device=block.device
            ).unsqueeze(1)
            if not torch.equal(block == 0, causal.expand(block.shape)):
                return False
        return True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As the mask's would be: [batch, 1, rows, keys]."""
        return self._arguments["batch_size"], 1, self._arguments["q_length"], self._arguments["kv_length"]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """The rows [start, stop) of the mask as eager attention takes it, [batch, 1, rows, keys]: 0 or the least."""
        # Heavy.
        from transformers.masking_utils import eager_mask

        offset = self._arguments["q_offset"] + start
        given = {**self._arguments, "q_length": stop - start, "q_offset": offset, "allow_is_bidirectional_skip": False}
        mask: torch.Tensor = eager_mask(**given)
        return mask

    def to(self, *_: Any, **__: Any) -> Visibility:
        """Itself: it has no device. Libraries that move a model's inputs ask for this."""
        return self

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(torch.Tensor, name):
            raise ValueError(_OWN_MASK)
        raise AttributeError(name)

    def __getitem__(self, _: Any) -> Any:
        raise ValueError(_OWN_MASK)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise ValueError(_OWN_MASK)


def visibility(*, attention_mask: torch.Tensor | None = None, **arguments: Any) -> Visibility:
    """Registered with ``AttentionMaskInterface``."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask hides tokens: padded batches are not supported; pass prompts of one length")
    return Visibility(**arguments)


def forward(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, *, block_rows: int, **given: Any
) -> torch.Tensor:
    """A layer's own attention: [batch, heads, rows, head_size] to [batch, rows, heads, head_size].

    Args:
        module: The attention module.
        q: Queries.
        k: Keys.
        v: Values.
        mask: A ``Visibility``, or what else the model made: a tensor, or None for all pairs.
        block_rows: Rows that are computed at once.
        given: Everything else that the module gives its attention function.
    """
    own, num_rows, num_keys = own_attention(module), q.shape[2], k.shape[2]
    if mask is None:
        out: torch.Tensor = own(module, q, k, v, None, dropout=0.0, **given)[0]
        return out

    if num_keys > mask.shape[3]:
        raise ValueError(_OWN_MASK)
    biases = {
        name: item
        for name, item in given.items()
        if isinstance(item, torch.Tensor) and item.shape[-2:] == (num_rows, num_keys)
    }

    def block(start: int, stop: int) -> torch.Tensor:
        low, high = 0, num_keys
        if isinstance(mask, Visibility):
            part = mask.block(start, stop)[..., :high]
            # Windows are short: no work on keys that no row of the block sees.
            seen = (part == 0).flatten(0, 2).any(0).nonzero()
            low, high = int(seen[0]), int(seen[-1]) + 1
        else:
            part = mask[:, :, start:stop]
        cut = {name: item[..., start:stop, low:high] for name, item in biases.items()}
        q_rows, keys, values = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
        rows: torch.Tensor = own(module, q_rows, keys, values, part[..., low:high], dropout=0.0, **{**given, **cut})[0]
        return rows

    parts = []
    for start in range(0, num_rows, block_rows):
        stop = min(start + block_rows, num_rows)
        # Made again in the backward pass: else the whole map would be kept for it.
        keep = not torch.is_grad_enabled()
        parts.append(block(start, stop) if keep else checkpoint(block, start, stop, use_reentrant=False))
    return torch.cat(parts, dim=1)


def own_attention(module: Any) -> Any:
    """The eager attention function of the file that a module is of."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
