"""The server of sites that own their data: it learns who they are from them, and holds no rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from time import monotonic, sleep
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedcore.errors import FedcoreError
from fedcore.federation.row_counts import RowCounts
from fedcore.training.site_settings import SITE_NAME
from fedcore.transports.flower import recipe_strategy
from fedcore.transports.flower.messages import ReplyInfo
from fedcore.transports.flower.recipe_strategy import MOST_SILENCES, RecipeStrategy
from fedcore.transports.flower.reply_metrics import (
    EXAMPLES,
    metric_of,
    read_metrics,
    read_row_counts,
)

_MOST = 1 << 53


class SiteStrategy(RecipeStrategy):
    """The server of a recipe whose ``data.source`` is ``"sites"``.

    The first round begins once ``round.expected`` sites are there, or ``round.quorum`` of them
    after ``round.patience`` seconds. A site that comes later takes part in the next round; one
    whose name another node bears is refused until that node is gone. Weights are what sites say of
    their training rows.

    Args:
        as for :class:`~fedcore.transports.flower.recipe_strategy.RecipeStrategy`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rows: dict[str, int | None] = {}

    @property
    def quorum(self) -> int:
        """``round.quorum``, or all that are expected."""
        rounds = self._experiment.recipe.round
        assert rounds.expected is not None
        return rounds.quorum or rounds.expected

    def weight_of(self, client: str, reported: float) -> float:
        """The training rows that the site says it has, or their tokens.

        Raises:
            FedcoreError: that is not a number of them.
        """
        if not _counts(reported):
            by = self._experiment.recipe.round.weighting
            raise FedcoreError(f"it reports {reported:g} {by}, which is not a number of them")
        return reported

    def _population(self, connected: Collection[str]) -> tuple[str, ...]:
        """The sites that are connected."""
        return tuple(sorted(connected))

    def _examples(self, replies: Mapping[str, RecordDict]) -> Mapping[str, int | None]:
        said = metric_of(replies, EXAMPLES)
        self._rows |= {name: int(rows) for name, rows in said.items() if _counts(rows)}
        return {name: self._rows.get(name) for name in {*self._rows, *self._sampled}}

    def _rows_of(self, replies: Mapping[str, RecordDict]) -> Mapping[str, RowCounts]:
        said: dict[str, RowCounts] = {}
        for client, content in replies.items():
            try:
                counts = read_row_counts(read_metrics(content))
            except FedcoreError as error:
                self._observer.message(f"{client}: {error}")
                continue
            if counts is not None:
                said[client] = counts
        return said

    def _problem_of(self, name: str) -> str | None:
        return None if SITE_NAME.fullmatch(name) else "which cannot be the name of a site"

    def _named(self, grid: Grid, claims: Mapping[int, ReplyInfo]) -> dict[str, int]:
        """As for other clients, of as many sites as the recipe's ``clients`` at most."""
        most = self._experiment.recipe.most_clients
        names, fits = set(self._names.values()), dict(claims)
        for node, reply in claims.items():
            names.add(reply.client)
            if most is not None and len(names) > most:
                names.discard(reply.client)
                del fits[node]
                self._strangers.add(node)
                self._observer.message(
                    f"node {node} says it is {reply.client}, and clients = {most} sites are there"
                )
        return super()._named(grid, fits)

    def _meet(self, grid: Grid) -> None:
        """Ask every new node who it is, until enough sites are there.

        Later rounds wait for a quorum too, and no longer than ``round.patience`` seconds.
        """
        rounds, first = self._experiment.recipe.round, not self.states
        assert rounds.expected is not None
        began, said = monotonic(), -1
        while True:
            connected = set(grid.get_node_ids())
            self._free_rivals(connected)
            new = sorted(connected - self._known())
            if not first:
                new = [node for node in new if self._silent[node] < MOST_SILENCES]
            if new:
                self._introduce(grid, new)
            here = len(self._nodes(grid))
            late = monotonic() - began >= rounds.patience
            if here >= (rounds.expected if first and not late else self.quorum):
                if here < rounds.expected and first:
                    self._observer.message(
                        f"the run starts with {here} of {rounds.expected} expected sites"
                    )
                return
            if late and not first:
                return
            if here != said:
                self._observer.message(
                    f"{here} of {rounds.expected} expected sites are there; at least "
                    f"{self.quorum} are needed"
                )
                said = here
            sleep(recipe_strategy.POLL)


def _counts(value: float) -> bool:
    """Whether ``value`` can be how many rows or tokens a site has."""
    return 1 <= value <= _MOST and value == int(value)
