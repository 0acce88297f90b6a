"""All suites."""

from __future__ import annotations

from vllm_trimix.evaluation.suites.base import Suite
from vllm_trimix.evaluation.suites.niah import NIAH
from vllm_trimix.evaluation.suites.retrieval import RETRIEVAL

SUITES: dict[str, Suite] = {suite.name: suite for suite in (NIAH, RETRIEVAL)}
