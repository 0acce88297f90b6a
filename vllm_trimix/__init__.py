"""vLLM-TriMix: the TriangleMix prefill pattern as an attention backend of vLLM."""

__version__ = "0.1.0"
