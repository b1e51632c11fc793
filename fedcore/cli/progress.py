"""A run's progress as a person sees it: a bar for the rounds, one for the steps of the round."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedcore.experiments.observer import Observer
from fedcore.federation.measures import ACCURACY, Measure
from fedcore.federation.records import Round
from fedcore.reports.formatting import rate


class ProgressDisplay(Observer):
    """Bars on a terminal, plain lines elsewhere; use it as a context manager."""

    def __init__(self, console: Console, title: str = "", measure: Measure = ACCURACY) -> None:
        self._console = console
        self._measure = measure
        self._title = title
        self._clients = 0
        self._seen = 0
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", justify="left", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._bars.add_task("preparing", total=None)
        self._steps = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, style="dim", highlight=False, markup=False)

    def preparing(self, what: str) -> None:
        """Say what is being prepared."""
        self._bars.update(self._rounds, description=f"preparing {what}")
        if not self._console.is_terminal:
            self.message(f"preparing {what}")

    def run_started(self, rounds: int, done: int) -> None:
        """Start the bar of the rounds."""
        self._bars.update(
            self._rounds, description=f"{self._title} rounds", total=rounds, completed=done
        )

    def round_started(self, round: int, clients: int, steps: int) -> None:
        """Start the bar of the round's steps."""
        self._clients, self._seen = clients, 0
        self._bars.reset(self._steps, total=steps, visible=True, description="training")

    def client_started(self, client_id: str) -> None:
        """Show which client trains now."""
        self._seen += 1
        self._bars.update(self._steps, description=f"{client_id} ({self._seen} of {self._clients})")

    def step_done(self, loss: float) -> None:
        """Advance the bar of the round's steps."""
        self._bars.advance(self._steps)

    def answers_counted(self, what: str, done: int, total: int) -> None:
        """Show how many answers are there."""
        self._bars.update(self._steps, description=what, completed=done, total=total, visible=True)
        if not done and not self._console.is_terminal:
            self.message(f"asking {what}")

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Advance the bar of the rounds and print one line of the round."""
        self._bars.advance(self._rounds)
        last, measure = Round.model_validate(record), self._measure
        loss, quality = last.train_loss, last.quality(measure)
        parts = [f"{self._title} round {last.index:>3}"]
        parts.append("train loss  -   " if loss is None else f"train loss {loss:.3f}")
        if quality is not None:
            parts.append(f"held-out {measure.name} {quality:.3f}, loss {rate(last.loss)}")
        parts += _spent(last)
        parts += [f"{d.client} dropped: {d.reason}" for d in last.dropped]
        parts += last.flags
        self.message("   ".join(part.strip() for part in parts))


def _spent(last: Round) -> list[str]:
    """What has been spent so far: the largest epsilon of an example, that of a whole client."""
    spent = []
    if last.privacy is not None and last.privacy.largest is not None:
        spent.append(f"largest epsilon {last.privacy.largest[1]:.2f}")
    if last.central_privacy is not None and last.central_privacy.epsilon is not None:
        spent.append(f"central epsilon {last.central_privacy.epsilon:.2f}")
    return spent
