"""Suites: named sets of tasks."""
