"""Evaluation: the same prompts through several configurations of the real engine, compared task by task."""
