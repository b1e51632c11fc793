"""FedLoRA for the clients of a recipe: they are known by name, and every round is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter, sleep
from typing import Any

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedcore.data.rows import Ranks
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
from fedcore.transports.flower.client import METRICS
from fedcore.transports.flower.messages import ReplyInfo
from fedcore.transports.flower.strategy import FedLoRA, wait_for_nodes


class RecipeStrategy(FedLoRA):
    """The server of a recipe: samples its clients by name and writes a run folder's records.

    Args:
        experiment: what the recipe builds; the server evaluates with it and trains nothing.
        folder: where states and records go; None keeps nothing.
        observer: receives every round's record.
        patience: seconds after which a node that has not named its client is asked again.

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
        known.
        """
        wait_for_nodes(grid, max(1, len(wanted)))
        while True:
            new = [node for node in sorted(grid.get_node_ids()) if node not in self._known()]
            if new:
                self._introduce(grid, new)
            missing = sorted(wanted - set(self._names.values()))
            if not missing:
                return
            self._observer.message(f"waiting for {len(missing)} clients, first {missing[0]}")
            while set(grid.get_node_ids()) <= self._known():
                sleep(1.0)

    def _known(self) -> set[int]:
        return set(self._names) | self._strangers

    def _introduce(self, grid: Grid, nodes: list[int]) -> None:
        questions = [
            Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node)
            for node in nodes
        ]
        threads: dict[str, int] = {}
        for answer in grid.send_and_receive(questions, timeout=self._patience):
            node = answer.metadata.src_node_id
            if answer.has_error():
                self._observer.message(f"a node does not say who it is: {answer.error.reason}")
                self._strangers.add(node)
                continue
            reply = ReplyInfo.read(answer.content)
            name = reply.client
            if name not in self._experiment.trainers:
                self._observer.message(f"a node says it is {name!r}, which the recipe lacks")
                self._strangers.add(node)
                continue
            # A node that comes in another's place holds nothing yet.
            self._names = {n: other for n, other in self._names.items() if other != name}
            self._names[node] = name
            self._forget(name)
            threads[name] = reply.threads
        self._compare_threads(threads)

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
