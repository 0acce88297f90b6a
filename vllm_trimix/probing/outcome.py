"""What decides a probe, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.choice import MIN_CONTROL, upper_bound
from vllm_trimix.probing.gradient import Objective
from vllm_trimix.probing.material import Reference
from vllm_trimix.probing.screening import Screened

Method = Literal["gradient", "ablation", "both"]


@dataclass(frozen=True)
class Settings:
    """What decides a probe's figures; a stopped probe goes on only under the same.

    Attributes:
        model: As the user named it.
        pattern: The triangle's parameters.
        method: Which rankings are made; with ``both`` sets of either are tried.
        score: Gradient score that ranks.
        objective: What the gradient is of.
        num_random: Random orders to compare with.
        seed: Of prompts and random orders.
        lengths: Of prompts, in tokens, ascending.
        prompts: Hash of what else decides the prompts.
        scored: Prompts that rank.
        samples: Held-out prompts of each length; the most where there is a time budget.
        dtype: Of weights and activations.
        device: Where it runs.
    """

    model: str
    pattern: Triangle
    method: Method
    score: str
    objective: Objective
    num_random: int
    seed: int
    lengths: tuple[int, ...]
    prompts: str
    scored: int
    samples: int
    dtype: str
    device: str

    @property
    def orders(self) -> tuple[str, ...]:
        """The rankings that are made; the first one chooses."""
        return ("gradient", "ablation") if self.method == "both" else (self.method,)


@dataclass(frozen=True)
class Plan:
    """What was decided by the time that passes take; kept, so that going on repeats it.

    Attributes:
        samples: Held-out prompts of each length.
        seconds: That they were expected to take.
    """

    samples: int
    seconds: float


@dataclass(frozen=True)
class Tried:
    """Layer sets on held-out prompts.

    Attributes:
        order: Which ranking they are the first layers of.
        length: Of the prompts, in tokens.
        losses: k -> what each answer's log-probability lost, in nats; the model's own dense answers are no right ones,
            and have their divergence here too.
        kl: k -> each answer's divergence from the dense one, in nats.
        correct: k -> share of the answers that stay the likeliest; 0 is dense.
    """

    order: str
    length: int
    losses: dict[int, list[float]] = field(default_factory=dict)
    kl: dict[int, list[float]] = field(default_factory=dict)
    correct: dict[int, float] = field(default_factory=dict)

    def bound(self, k: int) -> float:
        """What answers lose on average, at most (95%): of log-probability, or as divergence, whichever is more."""
        return max(upper_bound(self.losses[k]), upper_bound(self.kl[k]))


@dataclass(frozen=True)
class Outcome:
    """What a probe found.

    Attributes:
        settings: As it ran.
        reference: What answers are held against: the right ones, or the model's own dense ones.
        screened: The tasks that were tried.
        plan: How many prompts, and the time that was expected.
        scores: Mean gradient scores: score -> [layer][section]; None without that ranking.
        ablation: [layer][sample], divergence of an answer from the dense one with this layer alone in triangle, in
            nats; None without that ranking.
        ablation_losses: The same passes: nats that the answer's log-probability loses.
        stock: Layers that stay as they are by the model's own design, never in a set, with the reason.
        orders: Ranking -> layers, the least important first.
        correlations: Order -> its rank correlation with the measured divergence; empty without that ranking.
        curve: Ranking -> k -> mean loss of the prompts that ranked, or mean divergence where that is more.
        control: Nats lost by those with distant keys hidden from all rows of all layers.
        tried: Sets on held-out prompts, by length and ranking.
        compared: Other orders -> divergences with their first k layers on the first held-out prompts, k being the
            choice's.
        logprobs: [sample], the dense answers' log-probability, of the shortest length.
        chosen: Triangle layers; empty where nothing is proven.
        kept: Ranking -> how many layers it would choose.
    """

    settings: Settings
    reference: Reference
    screened: tuple[Screened, ...]
    plan: Plan
    scores: dict[str, list[list[float]]] | None
    ablation: list[list[float]] | None
    ablation_losses: list[list[float]] | None
    stock: dict[int, str]
    orders: dict[str, list[int]]
    correlations: dict[str, float]
    curve: dict[str, dict[int, float]]
    control: float
    tried: list[Tried]
    compared: dict[str, list[float]]
    logprobs: list[float]
    chosen: list[int]
    kept: dict[str, int]

    @property
    def proven(self) -> bool:
        """Whether the prompts could have shown a loss: without distant keys their answers are lost."""
        return self.control >= MIN_CONTROL
