"""What a run says, for tests to read."""

from __future__ import annotations

from fedcore.experiments.observer import Observer


class Messages(Observer):
    """Keeps in ``texts`` what a person should know."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)
