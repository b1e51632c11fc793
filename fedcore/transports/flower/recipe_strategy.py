"""FedLoRA for the clients of a recipe: they are known by name, and every round is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter, sleep
from typing import Any

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedcore.data.rows import Ranks
from fedcore.errors import FedcoreError, printable
from fedcore.experiments.evaluation import Score, evaluates, score
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import check_local
from fedcore.experiments.record import ClientReports, round_record
from fedcore.experiments.round import sample_clients
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment
from fedcore.experiments.traffic import added, downlink, uplink
from fedcore.federation.diagnostics import ModuleDiagnosis, diagnose
from fedcore.federation.server_round import ClosedRound
from fedcore.federation.state import ServerState
from fedcore.methods.base import Broadcast
from fedcore.transports.flower.messages import ReplyInfo
from fedcore.transports.flower.reply_metrics import METRICS
from fedcore.transports.flower.strategy import FedLoRA, wait_for_nodes

# A node that never says who it is delays only so many rounds.
_MOST_SILENCES = 3

_MOST_THREADS = 1 << 16
_POLL = 1.0


class RecipeStrategy(FedLoRA):
    """The server of a recipe: samples its clients by name and writes a run folder's records.

    Args:
        experiment: what the recipe builds; the server evaluates with it and trains nothing.
        folder: where states and records go; None keeps nothing.
        observer: receives every round's record.
        patience: seconds after which a node that has not named its client is asked again, and for
            which clients are waited for once as many nodes as clients have been asked.

    Attributes:
        states: those after each round of this process.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder | None = None,
        observer: Observer | None = None,
        patience: float = 60.0,
    ) -> None:
        check_local(experiment.recipe, "Flower")
        rounds = experiment.recipe.round
        super().__init__(
            experiment.method,
            on_invalid=rounds.on_invalid,
            send="changed",
            allow_identical_uploads=rounds.allow_identical_uploads,
            weighting=rounds.weighting,
            max_growth=rounds.max_growth,
            largest_share=rounds.largest_share,
            adapter_config=experiment.adapter_config,
            base=experiment.base,
            allow=experiment.recipe.model.allow,
            plain_clients=False,
            seed=experiment.recipe.seed,
            fraction_evaluate=0.0,
        )
        self._experiment = experiment
        self._run_folder = folder
        self._observer = observer or Observer()
        self._patience = patience
        self.states: list[ServerState] = []
        self._names: dict[int, str] = {}
        self._strangers: set[int] = set()
        self._silent: Counter[int] = Counter()
        self._rivals: dict[int, str] = {}
        self._sampled: tuple[str, ...] = ()
        self._began = 0.0
        self._save_seconds = 0.0

    def choose(self, grid: Grid) -> dict[int, str]:
        """The nodes of the recipe's sample; the first round waits until every client is there."""
        everyone = set(self._experiment.trainers)
        self._meet(grid, everyone if not self._names else set())
        self._sampled = sample_clients(self._experiment, self.state.round)
        self._observer.round_started(self.state.round, len(self._sampled), 0)
        self._began = perf_counter()
        connected = set(grid.get_node_ids())
        node_of = {name: node for node, name in self._names.items() if node in connected}
        return {node_of[name]: name for name in self._sampled if name in node_of}

    def ranks_of(self, node: int, client: str) -> Ranks | None:
        """The recipe's."""
        return self._experiment.ranks.get(client)

    def weight_of(self, client: str, reported: float) -> float:
        """The number of examples in the client's part of the partition.

        Raises:
            FedcoreError: the client reports another one.
        """
        examples = self._experiment.held[client]
        if reported != examples:
            raise FedcoreError(
                f"it reports {reported:g} examples, and the partition gives it {examples}"
            )
        return float(examples)

    def record(self, closed: ClosedRound, replies: Mapping[str, RecordDict]) -> dict[str, Any]:
        """The same record as a local run's, without times that a server cannot know."""
        experiment, before, cohort = self._experiment, self.state, closed.cohort
        seconds = {"train": perf_counter() - self._began, "save": self._save_seconds}
        started = perf_counter()
        modules: list[ModuleDiagnosis] = []
        able = self.method.capabilities
        factors = able.uploads == "factors" and not able.personalised
        if experiment.recipe.evaluation.diagnostics and factors:
            previous = Broadcast(before.layout, before.row)
            complete = self.method.completed(cohort, previous)
            modules = diagnose(
                complete, closed.result, previous, self.method.family, experiment.offset
            )
        seconds["diagnose"] = perf_counter() - started
        started = perf_counter()
        measured = not able.personalised and evaluates(experiment, before.round)
        outcome = score(experiment, closed.state) if measured else Score()
        seconds["evaluate"] = perf_counter() - started
        names = ("train-loss", "local-accuracy", "local-loss")
        absent = set(self._sampled) - {who.client for who in self._asked.values()}
        dropped = {d.client_id: d.reason for d in cohort.dropped}
        dropped |= dict.fromkeys(absent, "no node of it is connected")
        record = round_record(
            experiment,
            before.round,
            outcome,
            ClientReports(*(_reported(replies, name) for name in names)),
            sampled=self._sampled,
            dropped=dropped,
            flags=closed.flags,
            up=uplink(experiment, before, cohort.layout, closed.reported),
            down=downlink(experiment, before, self._sampled),
            seconds=seconds,
            modules=modules,
        )
        return record.plain()

    def keep(self, after: ServerState) -> ServerState:
        """Add the traffic and write state and record to the run folder."""
        record = after.record
        traffic = added(after.traffic, record["bytes_up"], record["bytes_down"])
        state = replace(after, traffic=traffic)
        if self._run_folder is not None:
            started = perf_counter()
            self._run_folder.save(state)
            self._save_seconds = perf_counter() - started
        self.states.append(state)
        self._observer.round_finished(record)
        return state

    def _meet(self, grid: Grid, wanted: set[str]) -> None:
        """Ask every new node who it is, and again where it is slow, until all of ``wanted`` are
        known, or as many nodes as are wanted have been asked and the patience is over.
        """
        connected = set(wait_for_nodes(grid, max(1, len(wanted))))
        free = {name for node, name in self._names.items() if node not in connected}
        self._rivals = {node: name for node, name in self._rivals.items() if name not in free}
        waited = 0.0
        while True:
            new = [node for node in sorted(grid.get_node_ids()) if node not in self._known()]
            if not wanted:
                new = [node for node in new if self._silent[node] < _MOST_SILENCES]
            if new:
                self._introduce(grid, new)
            missing = sorted(wanted - set(self._names.values()))
            if not missing:
                return
            self._observer.message(f"waiting for {len(missing)} clients, first {missing[0]}")
            while (connected := set(grid.get_node_ids())) <= self._known():
                if len(connected) >= len(wanted) and waited >= self._patience:
                    self._observer.message(f"the run starts without {', '.join(missing)}")
                    return
                sleep(_POLL)
                waited += _POLL

    def _known(self) -> set[int]:
        return set(self._names) | self._strangers | set(self._rivals)

    def _introduce(self, grid: Grid, nodes: list[int]) -> None:
        """Learn whose nodes these are; what a node answers cannot end the run."""
        answers = self._asked_who(grid, nodes)
        claims: dict[int, ReplyInfo] = {}
        for node in nodes:
            reply = answers.get(node)
            if reply is None:
                self._silent[node] += 1
            elif isinstance(reply, str):
                self._observer.message(reply)
                self._strangers.add(node)
            else:
                claims[node] = reply
        self._compare_threads(self._named(grid, claims))

    def _asked_who(self, grid: Grid, nodes: list[int]) -> dict[int, ReplyInfo | str]:
        """Node to its answer who it is, or to what is wrong with that; silent ones are left out."""
        if not nodes:
            return {}
        questions = [
            Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node)
            for node in nodes
        ]
        answers: dict[int, ReplyInfo | str] = {}
        for answer in grid.send_and_receive(questions, timeout=self._patience):
            node = answer.metadata.src_node_id
            if answer.has_error():
                answers[node] = f"a node does not say who it is: {printable(answer.error.reason)}"
                continue
            try:
                reply = ReplyInfo.read(answer.content)
                name, count = reply.client, reply.threads
            except Exception as error:
                answers[node] = f"node {node} answers with nonsense ({type(error).__name__})"
                continue
            if name not in self._experiment.trainers:
                answers[node] = f"a node says it is {printable(name)!r}, which the recipe lacks"
            elif not 0 <= count <= _MOST_THREADS:
                answers[node] = f"node {node} says it computes on an impossible number of threads"
            else:
                answers[node] = reply
        return answers

    def _named(self, grid: Grid, claims: Mapping[int, ReplyInfo]) -> dict[str, int]:
        """Note whose nodes these are; returns client to threads of those that are new.

        A node that was started anew comes under another number, and holds nothing yet. Nobody takes
        the place of a node that still answers to its name.
        """
        connected = set(grid.get_node_ids())
        holders = {name: node for node, name in self._names.items()}
        asked = {holders[reply.client] for reply in claims.values() if reply.client in holders}
        answers = self._asked_who(grid, sorted(asked & connected))
        threads: dict[str, int] = {}
        for node, reply in claims.items():
            name, holder = reply.client, holders.get(reply.client)
            answer = answers.get(holder) if holder is not None else None
            if isinstance(answer, ReplyInfo) and answer.client == name:
                self._observer.message(
                    f"node {node} says it is {name}, as node {holder} does, which keeps the name"
                )
                self._rivals[node] = name
                continue
            if holder is not None:
                del self._names[holder]
            self._names[node], holders[name], answers[node] = name, node, reply
            self._forget(name)
            threads[name] = reply.threads
        return threads

    def _compare_threads(self, threads: Mapping[str, int]) -> None:
        """Say which clients compute on other threads than the server; 0 is of one that gave none.

        Args:
            threads: client to the number that it sent.
        """
        here = torch.get_num_threads()
        others = sorted(name for name, count in threads.items() if count not in (0, here))
        if others:
            self._observer.message(
                f"threads differ: {here} on the server, {threads[others[0]]} on {others[0]} "
                f"({len(others)} of {len(threads)} clients): the result may differ from the local "
                "engine's in its last bits; set training.threads"
            )


def _reported(replies: Mapping[str, RecordDict], name: str) -> dict[str, float]:
    """What the clients of the cohort report of their training, by client."""
    values = {}
    for client, content in replies.items():
        value = content.metric_records.get(METRICS, MetricRecord()).get(name)
        if isinstance(value, int | float):
            values[client] = float(value)
    return values
