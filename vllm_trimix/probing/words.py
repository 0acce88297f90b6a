"""What a probe found, in sentences: on the console and in its report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from vllm_trimix.config.layers import format_layers
from vllm_trimix.probing.choice import MAX_LOSS, MIN_CONTROL, prompts_needed, upper_bound
from vllm_trimix.probing.outcome import Outcome, Tried

STOCK = {
    "no_attention": "no attention",
    "sliding_window": "a sliding window of their own",
    "chunked_attention": "chunked attention",
    "learned_sinks": "learned sinks",
    "position_bias": "a position bias",
    "not_decoder": "no causal attention",
    "kv_sharing": "another layer's keys and values",
}


def layers(count: int) -> str:
    """A number of layers."""
    return "1 layer" if count == 1 else f"{count} layers"


def console(outcome: Outcome) -> Iterator[str]:
    """What the command says when it is done."""
    yield f"triangle layers: {format_layers(outcome.chosen) or 'none'} ({count(outcome)})"
    if outcome.stock:
        yield stock_sentence(outcome)
    yield from screened(outcome)
    yield from verdict(outcome)


def count(outcome: Outcome) -> str:
    """How many layers are chosen, of how many."""
    able = len(outcome.orders[outcome.settings.orders[0]])
    layers = able + len(outcome.stock)
    within = f"{able} that can be, in a model of " if outcome.stock else ""
    return f"{len(outcome.chosen)} of {within}{layers}"


def stock_sentence(outcome: Outcome) -> str:
    """Which layers can't be triangle layers, and why."""
    stock = outcome.stock
    groups = (
        (format_layers([layer for layer in stock if stock[layer] == reason]), reason)
        for reason in dict.fromkeys(stock.values())
    )
    return "Layers without a choice: " + "; ".join(f"{layers} ({STOCK[reason]})" for layers, reason in groups) + "."


def screened(outcome: Outcome) -> Iterator[str]:
    """Which tasks the model does densely, and what that leads to."""
    if outcome.screened:
        yield f"Asked densely: {', '.join(item.words for item in outcome.screened)}."
    if outcome.reference == "own":
        none = "No task is solved: the" if outcome.screened else "The"
        yield f"{none} reference is the model's own dense answer; losses are divergences from it."


def verdict(outcome: Outcome) -> Iterator[str]:
    """What is proven, and what more prompts would do."""
    if not outcome.proven:
        yield (
            f"Nothing is proven, so there is no preset: with distant keys hidden from all rows of all layers these "
            f"answers lose {outcome.control:.3f} nats, less than {MIN_CONTROL:g}. They don't need distant keys. Take "
            "prompts that do (--prompts, --documents)."
        )
        return
    order = outcome.settings.orders[0]
    for tried in outcome.tried:
        if tried.order == order:
            yield from failed(tried, order=outcome.orders[order])
    if outcome.chosen:
        lengths = " and ".join(map(str, outcome.settings.lengths))
        yield f"This holds at {lengths} tokens; nothing longer was asked (--lengths)."
    else:
        yield "No layer can be a triangle layer without a loss on these prompts, so there is no preset."


def failed(tried: Tried, *, order: list[int]) -> Iterator[str]:
    """The smallest set that failed at a length: whether more prompts could have allowed it."""
    too_many = [k for k in sorted(tried.losses) if tried.bound(k) > MAX_LOSS]
    if not too_many:
        return
    k = too_many[0]
    # Of loss and divergence the one that failed it; one layer loses, several lose.
    both = (("lose", "loses", tried.losses[k]), ("diverge by", "diverges by", tried.kl[k]))
    several, one, losses = max(both, key=lambda item: upper_bound(item[2]))
    what = f"{layers(k)} ({format_layers(sorted(order[:k]))}) {one if k == 1 else several}"
    loss = f"{what} {statistics.fmean(losses):.4f} nats at {tried.length} tokens"
    needed = prompts_needed(losses)
    if needed is None:
        yield f"{loss}: no number of prompts would allow {'it' if k == 1 else 'them'}."
    else:
        yield (
            f"{loss}, at most {upper_bound(losses):.4f}: about {max(needed, len(losses) + 1)} held-out prompts instead "
            f"of {len(losses)} would allow {'it' if k == 1 else 'them'}, if that stays so (--samples, --time-budget)."
        )
