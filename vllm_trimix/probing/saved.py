"""Results of finished work on disk, so that a stopped command goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Saved:
    """Results in a JSON file; keys name the work."""

    def __init__(self, path: Path, settings: Any, *, what: str) -> None:
        """Reads what an earlier call left.

        Args:
            path: The file.
            settings: A dataclass with what decides the results.
            what: The work in a word, for errors.

        Raises:
            ValueError: The file is of work with other settings, or none of ours.
        """
        # As JSON gives them back: tuples are lists there.
        self._path, self._settings = path, json.loads(json.dumps(asdict(settings)))
        self._results: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text())
                before, results = found["settings"], found["results"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"--output: {path} holds no results of a {what}; choose another folder, or remove it"
                ) from None
            if before != self._settings:
                changed = [key for key, value in self._settings.items() if before.get(key) != value]
                raise ValueError(
                    f"--output: {path} is of a {what} with another {', '.join(changed)}; choose another folder, or "
                    "remove it"
                )
            self._results = results

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Key -> result, a dataclass's fields."""
        return self._results

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def get(self, key: str, work: Callable[[], Any]) -> dict[str, Any]:
        """The result of this work, a dataclass's fields; done now unless it was before."""
        if key not in self._results:
            self.put(key, work())
        return self._results[key]

    def put(self, key: str, result: Any) -> None:
        """Keeps a result, a dataclass; the file is whole at any time."""
        self._results[key] = asdict(result)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self._settings, "results": self._results}))
        part.replace(self._path)
