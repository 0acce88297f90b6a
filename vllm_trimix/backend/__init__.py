"""The vLLM side: the only folder that imports vLLM."""
