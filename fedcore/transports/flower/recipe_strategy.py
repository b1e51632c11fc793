"""FedLoRA for the clients of a recipe: they are known by name, and every round is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedcore.data.rows import Ranks
from fedcore.errors import FedcoreError, printable
from fedcore.experiments.evaluation import Score, SiteSums, evaluates, score, with_sites
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import check_local
from fedcore.experiments.record import ClientReports, round_record
from fedcore.experiments.round import sample
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment
from fedcore.experiments.traffic import added, downlink, evaluation_downlink, together, uplink
from fedcore.federation.announcements import with_agreed
from fedcore.federation.diagnostics import ModuleDiagnosis, diagnose
from fedcore.federation.downloads import download
from fedcore.federation.row_counts import RowCounts
from fedcore.federation.server_round import ClosedRound, OpenRound
from fedcore.federation.state import ServerState
from fedcore.methods.base import Broadcast
from fedcore.transports.flower.messages import ReplyInfo, broadcast_content
from fedcore.transports.flower.reply_metrics import EXAMPLES, TARGETS, metric_of, read_sums
from fedcore.transports.flower.strategy import FedLoRA, wait_for_nodes

# A node that never says who it is delays only so many rounds.
MOST_SILENCES = 3

_MOST_THREADS = 1 << 16
POLL = 1.0


class TooFewRepliesError(FedcoreError):
    """A round and its repetition had fewer valid replies than the quorum; its state is saved."""


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
            weighting="uniform" if rounds.weighting == "uniform" else "examples",
            weighted_by_key=TARGETS if rounds.weighting == "tokens" else EXAMPLES,
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
        self._grid: Grid | None = None
        self._timeout = 0.0
        self._configured: tuple[int, ArrayRecord, ConfigRecord] | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        *further: Any,
        **options: Any,
    ) -> Result:
        """As :meth:`FedLoRA.start`; a round that is repeated has the same ``timeout`` again.

        Raises:
            TooFewRepliesError: a round had fewer replies than ``round.quorum``, twice.
            FedcoreError: as :meth:`FedLoRA.start`.
        """
        self._timeout = timeout
        return super().start(grid, initial_arrays, num_rounds, timeout, *further, **options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`FedLoRA.configure_train`."""
        self._grid, self._configured = grid, (server_round, arrays, config)
        return super().configure_train(server_round, arrays, config, grid)

    def choose(self, grid: Grid) -> dict[int, str]:
        """The nodes of the recipe's sample; the first round waits until every client is there, or
        for ``round.patience`` seconds and ``round.quorum`` of them.
        """
        self._meet(grid)
        node_of = self._nodes(grid)
        population = self._population(node_of)
        self._sampled = sample(self._experiment.recipe, population, self.state.round)
        self._observer.round_started(self.state.round, len(self._sampled), 0)
        self._began = perf_counter()
        return {node_of[name]: name for name in self._sampled if name in node_of}

    @property
    def quorum(self) -> int | None:
        """How many clients a round needs at least; None where a round may end with fewer."""
        return self._experiment.recipe.round.quorum

    def _nodes(self, grid: Grid) -> dict[str, int]:
        """Client to its node, of those that are connected."""
        connected = set(grid.get_node_ids())
        return {name: node for node, name in self._names.items() if node in connected}

    def _population(self, connected: Collection[str]) -> tuple[str, ...]:
        """The clients that a round's are drawn from."""
        return self._experiment.trainers

    def _received(self, replies: Iterable[Message]) -> tuple[OpenRound, dict[str, RecordDict]]:
        """The round with all that came back; one with fewer replies than the quorum's is repeated
        once.
        """
        opened, contents = super()._received(replies)
        least = 0 if self.quorum is None else self._experiment.recipe.round.sampled(self.quorum)
        if len(contents) >= least:
            return opened, contents
        round = self.state.round
        self._observer.message(
            f"round {round} has {len(contents)} valid replies of at least {least}: it is repeated"
        )
        assert self._grid is not None
        assert self._configured is not None
        messages = self.configure_train(*self._configured, self._grid)
        again = self._grid.send_and_receive(messages, timeout=self._timeout)
        opened, contents = super()._received(again)
        if len(contents) < least:
            raise TooFewRepliesError(
                f"round {round} has {len(contents)} valid replies of at least {least}, twice: the "
                f"run ends after {round} rounds; start it again with the same run folder to resume"
            )
        return opened, contents

    def ranks_of(self, node: int, client: str) -> Ranks | None:
        """The recipe's."""
        return self._experiment.ranks.get(client)

    def weight_of(self, client: str, reported: float) -> float:
        """The examples, or their tokens, in the client's part of the partition.

        Raises:
            FedcoreError: the client reports another number.
        """
        weight = self._experiment.weight(client)
        if reported != weight:
            raise FedcoreError(
                f"it reports {reported:g} {self._experiment.recipe.round.weighting}, and the "
                f"partition gives it {weight:g}"
            )
        return weight

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
        down = downlink(experiment, before, self._sampled)
        outcome = Score()
        if not able.personalised and evaluates(experiment, before.round):
            if experiment.recipe.evaluation.on == "server":
                outcome = score(experiment, closed.state)
            else:
                asked, sums = self._site_sums(closed.state)
                outcome = with_sites(experiment, closed.state, sums)
                down = together(down, evaluation_downlink(experiment, closed.state, asked))
        seconds["evaluate"] = perf_counter() - started
        absent = set(self._sampled) - {who.client for who in self._asked.values()}
        dropped = {d.client_id: d.reason for d in cohort.dropped}
        dropped |= dict.fromkeys(absent, "no node of it is connected")
        rows = self._rows_of(replies)
        if rows:
            self._observer.message(str(RowCounts.sum(rows.values())))
        record = round_record(
            experiment,
            before.round,
            outcome,
            ClientReports(
                losses=metric_of(replies, "train-loss"),
                local_accuracy=metric_of(replies, "local-accuracy"),
                local_loss=metric_of(replies, "local-loss"),
                examples=self._examples(replies),
                rows=rows,
            ),
            sampled=self._sampled,
            dropped=dropped,
            flags=closed.flags,
            up=uplink(experiment, before, cohort.layout, closed.reported),
            down=down,
            seconds=seconds,
            modules=modules,
        )
        return record.plain()

    def _examples(self, replies: Mapping[str, RecordDict]) -> Mapping[str, int | None] | None:
        """What clients have said of their rows, where the experiment does not know it."""
        return None

    def _rows_of(self, replies: Mapping[str, RecordDict]) -> Mapping[str, RowCounts]:
        """What became of clients' rows, of those that say it in this round."""
        return self._experiment.rows if self.state.round == 0 else {}

    def _site_sums(self, state: ServerState) -> tuple[list[str], dict[str, SiteSums]]:
        """The clients that were asked to evaluate ``state``, and the sums of those that answered.

        What a client answers cannot end the run.
        """
        assert self._grid is not None
        node_of = self._nodes(self._grid)
        announced = self._announcer.announce(state, self.key_map.constants)
        messages = []
        for client, node in sorted(node_of.items()):
            ranks = self.ranks_of(node, client)
            content = broadcast_content(
                state,
                self.method,
                self.key_map,
                client,
                ranks,
                download(state, self.method, client, ranks, everything=True),
                with_agreed(announced, state).brief,
                config=ConfigRecord(),
                arrays_key=self.arrayrecord_key,
                config_key=self.configrecord_key,
            )
            messages.append(
                Message(content=content, message_type=MessageType.EVALUATE, dst_node_id=node)
            )
        client_of = {node: client for client, node in node_of.items()}
        sums: dict[str, SiteSums] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout):
            client = client_of.get(reply.metadata.src_node_id, "")
            if not client or reply.has_error():
                continue
            try:
                of_site = read_sums(reply.content, self._experiment.recipe.evaluation.min_targets)
            except FedcoreError as error:
                self._observer.message(f"the evaluation of {client} is left out: {error}")
            except Exception as error:
                kind = type(error).__name__
                self._observer.message(f"the evaluation of {client} cannot be read ({kind})")
            else:
                if of_site is not None:
                    sums[client] = of_site
        return sorted(node_of), sums

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

    def _meet(self, grid: Grid) -> None:
        """Ask every new node who it is, and again where it is slow.

        Before the first round until all clients are known, or as many nodes as clients have been
        asked and the patience is over, or a quorum is there after ``round.patience`` seconds.
        """
        wanted = set() if self._names else set(self._experiment.trainers)
        rounds = self._experiment.recipe.round
        began = monotonic()
        connected = set(wait_for_nodes(grid, max(1, self.quorum or 1 if wanted else 1)))
        self._free_rivals(connected)
        waited = 0.0
        while True:
            new = [node for node in sorted(grid.get_node_ids()) if node not in self._known()]
            if not wanted:
                new = [node for node in new if self._silent[node] < MOST_SILENCES]
            if new:
                self._introduce(grid, new)
            missing = sorted(wanted - set(self._names.values()))
            if not missing:
                return
            self._observer.message(f"waiting for {len(missing)} clients, first {missing[0]}")
            while (connected := set(grid.get_node_ids())) <= self._known():
                asked = len(connected) >= len(wanted) and waited >= self._patience
                late = self.quorum is not None and monotonic() - began >= rounds.patience
                if asked or (late and len(self._nodes(grid)) >= (self.quorum or 0)):
                    self._observer.message(f"the run starts without {', '.join(missing)}")
                    return
                sleep(POLL)
                waited += POLL

    def _free_rivals(self, connected: Collection[int]) -> None:
        """Let nodes be asked again that bore the name of one that is gone."""
        free = {name for node, name in self._names.items() if node not in connected}
        self._rivals = {node: name for node, name in self._rivals.items() if name not in free}

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
            if (problem := self._problem_of(name)) is not None:
                answers[node] = f"a node says it is {printable(name)!r}, {problem}"
            elif not 0 <= count <= _MOST_THREADS:
                answers[node] = f"node {node} says it computes on an impossible number of threads"
            else:
                answers[node] = reply
        return answers

    def _problem_of(self, name: str) -> str | None:
        """Why no client can be called ``name``, if so."""
        return None if name in self._experiment.trainers else "which the recipe lacks"

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
