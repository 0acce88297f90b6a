"""Runs programs of stages: their command line, the schedule, the processes around a stage, and what is taken home."""
