"""Engines in processes of their own, which commands start, ask and end (``measurement/engine_process.py``)."""
