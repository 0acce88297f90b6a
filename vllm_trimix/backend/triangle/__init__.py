"""The ways to compute a step's triangle rows on CUDA, one a file, behind one interface (``prefill``)."""
