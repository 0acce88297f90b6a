"""All suites."""

from __future__ import annotations

from vllm_trimix.evaluation.suite import Suite
from vllm_trimix.evaluation.suites.agreement import AGREEMENT
from vllm_trimix.evaluation.suites.long import LONG
from vllm_trimix.evaluation.suites.niah import NIAH
from vllm_trimix.evaluation.suites.ppl import PPL
from vllm_trimix.evaluation.suites.retrieval import RETRIEVAL
from vllm_trimix.evaluation.suites.ruler import RULER

SUITES: dict[str, Suite] = {suite.name: suite for suite in (RULER, NIAH, RETRIEVAL, PPL, AGREEMENT, LONG)}
