"""What a run reports to whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Observer:
    """Receives a run's progress; this one is silent, subclasses show what they like."""

    def message(self, text: str) -> None:
        """Something a person should know."""

    def preparing(self, what: str) -> None:
        """A preparation step begins."""

    def run_started(self, rounds: int, done: int) -> None:
        """The run has ``rounds`` rounds, of which ``done`` are complete already."""

    def round_started(self, round: int, clients: int, steps: int) -> None:
        """A round begins, with this many clients and local steps in total."""

    def client_started(self, client_id: str) -> None:
        """A client begins its local training."""

    def step_done(self, loss: float) -> None:
        """A client made a step."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is complete and saved."""

    def answers_counted(self, what: str, done: int, total: int) -> None:
        """Of what a model is asked, so many rows are done."""
