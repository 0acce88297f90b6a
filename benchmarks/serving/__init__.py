"""TRIMIX against stock vLLM as servers: what is served, how it is asked, and what came of it."""
