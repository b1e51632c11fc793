"""A federation by hand: clients and server exchange folders, in whatever way folders travel."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcore.checks import count
from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import Announcement
from fedcore.data.base_identity import BaseIdentity, check_allow
from fedcore.data.claims import claimed
from fedcore.data.exchange import (
    BROADCAST_FILE,
    UPLOAD_FILE,
    BroadcastFolder,
    read_broadcast,
    read_upload,
    write_broadcast,
)
from fedcore.data.peft_files import read_adapter
from fedcore.data.validation import OnInvalid, Weighting, check_rounds, refuse_ranks
from fedcore.errors import FedcoreError, printable
from fedcore.federation.acceptance import MAX_GROWTH, Limits
from fedcore.federation.announcements import known_base
from fedcore.federation.checkpoints import check_newest, offering_newest_good, read_newest
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState, latest_state, write_state
from fedcore.methods import create_method
from fedcore.methods.base import Method
from fedcore.methods.registry import options_of
from fedcore.methods.requirements import ONE_BROADCAST, check_start, refuse

# The escapes of a file name of 255 bytes.
_LONGEST_NAME = 1100


@dataclass(frozen=True)
class FileServer:
    """The server half of a federation whose state is a folder; advancing gives a new object.

    ``folder/state/round-NNNN`` is the state after NNNN rounds and ``folder/broadcast/round-NNNN``
    what the clients of that round receive, a PEFT folder. Example::

        server = FileServer.create("federation", "start", "rolora")
        ...  # clients: client.receive(server.broadcast); trainer.train(); client.upload(...)
        server = server.round("uploads")

    Attributes:
        folder: where the federation is.
        method: with its hyper-parameters.
        state: after the last round.
        served: what the clients of the next round receive.
    """

    folder: Path
    method: Method
    state: ServerState
    served: BroadcastFolder

    @classmethod
    def create(
        cls,
        folder: str | Path,
        start: str | Path | AdapterState,
        method: str,
        *,
        base: BaseIdentity | None = None,
        allow: Iterable[str] = (),
        rounds: int | None = None,
        **options: Any,
    ) -> FileServer:
        """Start a federation in ``folder`` from the adapter ``start``.

        Args:
            base: the base model that every client has to hold; by default what ``base.json`` beside
                the adapter says, else what most clients of the first round hold.
            allow: parts of the base that may differ, each flagged in the record of every round.
            rounds: how many there will be, for clients whose learning rate follows a schedule over
                all of them.
            options: the method's own.

        Raises:
            FedcoreError: the folder holds a federation or is in use; the adapter is not of the
                method's family; the method needs more of its clients than what folders carry; a
                base has no such part to allow; or ``rounds`` is below 1.
        """
        path, chosen = Path(folder), create_method(method, **options)
        if latest_state(path / "state") is not None:
            raise FedcoreError(f"{path} holds a federation; open it, or pass another folder")
        refuse(chosen, ONE_BROADCAST, "a server of folders")
        if rounds is not None:
            count("FileServer.create", "rounds", rounds, least=1)
        adapter = start if isinstance(start, AdapterState) else read_adapter(start)
        if base is None and not isinstance(start, AdapterState):
            base = BaseIdentity.read(start)
        check_start(chosen, adapter.family, adapter.keys.values(), "start", adapter.config)
        check_rounds(adapter, "start")
        refuse_ranks(adapter, "start")
        layout = adapter.layout()
        state = ServerState(round=0, layout=layout, row=adapter.to_row(layout))
        if base is not None:
            base = base.without(slot.name for slot in layout.dense_slots)
        served = BroadcastFolder(
            adapter,
            0,
            chosen.name,
            options_of(chosen),
            base=base,
            allow=check_allow(allow),
            total_rounds=rounds,
        )
        with claimed(path):
            check_newest(-1, path / "state")
            return cls(path, chosen, state, served)._written()

    @classmethod
    def open(cls, folder: str | Path) -> FileServer:
        """The federation in ``folder``, after its last round.

        Raises:
            FedcoreError: there is none, or a file of it is damaged.
        """
        path = Path(folder)
        states = path / "state"
        with offering_newest_good(states, lambda round: f"delete the later ones in {states}"):
            state = read_newest(states)
        if state is None:
            raise FedcoreError(f"{path} holds no federation; create it")
        first = read_broadcast(path / "broadcast" / "round-0000")
        method = create_method(first.method, **first.options)
        server = cls(path, method, state, _next(first, state))
        # A server that was stopped between its two writes left the state alone.
        if not (server.broadcast / BROADCAST_FILE).is_file():
            with claimed(path):
                check_newest(state.round, states)
                write_broadcast(server.served, server.broadcast)
        return server

    @property
    def broadcast(self) -> Path:
        """The folder that the clients of the next round receive."""
        return self.folder / "broadcast" / f"round-{self.state.round:04d}"

    def round(
        self,
        uploads: str | Path | Mapping[str, str | Path],
        *,
        weighting: Weighting = "examples",
        on_invalid: OnInvalid = "raise",
        allow_identical_uploads: bool = False,
        max_growth: float = MAX_GROWTH,
        largest_share: float | None = None,
    ) -> FileServer:
        """The server after one more round; this object stays as it is.

        Args:
            uploads: client id to folder; or a folder of uploads, whose names are the client ids.
            weighting: by the examples that clients report, or all alike.
            on_invalid: ``"raise"`` names the first bad client, ``"drop"`` leaves bad ones out; who
                was dropped is in ``state.record``.
            allow_identical_uploads: accept a round in which all uploads are identical.
            max_growth: how many times as large as state and uploads the result may be; a larger one
                leaves the state as it is, with a flag in ``state.record``.
            largest_share: of the total weight, that one client may have; None sets no bound.

        Raises:
            FedcoreError: naming client, tensor and value, or another process that works in the
                folder or has continued the federation, which is then as it was.
        """
        if weighting not in ("examples", "uniform"):
            raise FedcoreError(f"weighting is {weighting!r}; pass 'examples' or 'uniform'")
        folders = _folders(uploads)
        # Who names folders one by one may mean links; what appears in a folder of uploads may not.
        gathered = not isinstance(uploads, Mapping)
        links = {client for client, folder in folders.items() if gathered and folder.is_symlink()}
        with claimed(self.folder):
            check_newest(self.state.round, self.folder / "state")
            opened = OpenRound(
                self.method,
                self.state,
                list(folders),
                on_invalid=on_invalid,
                allow_identical_uploads=allow_identical_uploads,
                limits=Limits(max_growth, largest_share),
                announced=self._announced(),
            )
            after = self._closed(opened, folders, links, weighting)
            return replace(self, state=after, served=_next(self.served, after))._written()

    def _closed(
        self,
        opened: OpenRound,
        folders: Mapping[str, Path],
        links: Collection[str],
        weighting: Weighting,
    ) -> ServerState:
        """The state after a round on the uploads in ``folders``, without those of ``links``."""
        method, t = self.method, self.state.round
        frozen = self.served.digest_of(opened.frozen)
        for client in sorted(folders):
            try:
                if client in links:
                    raise FedcoreError("its folder is a link; put the folder itself there")
                upload = read_upload(
                    folders[client],
                    opened.layout,
                    self.served.adapter,
                    factors=method.capabilities.uploads == "factors",
                    round=t,
                )
                opened.check_repeats(client, upload.said)
            except FedcoreError as error:
                opened.refuse(client, str(error))
                continue
            opened.receive(
                client,
                upload.row,
                upload.examples if weighting == "examples" else 1.0,
                round=upload.round,
                frozen=upload.frozen,
                expected_frozen=frozen,
                flags=upload.flags,
            )
        return opened.close().state

    def _announced(self) -> Announcement:
        announced = self.served.announcement
        # What clients agreed on is no more than that: one of version 0.1 need not say it.
        return announced if known_base(self.state) is None else replace(announced, base=None)

    def _written(self) -> FileServer:
        write_state(self.state, self.folder / "state")
        write_broadcast(self.served, self.broadcast)
        return self


def _next(before: BroadcastFolder, state: ServerState) -> BroadcastFolder:
    adapter = before.adapter.with_row(state.row, state.layout)
    return replace(
        before,
        adapter=adapter,
        round=state.round,
        residual=state.residual,
        base=before.base or known_base(state),
    )


def _folders(uploads: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    """Client id, in printable characters, to folder."""
    if isinstance(uploads, Mapping):
        pairs = [(client, Path(folder)) for client, folder in uploads.items()]
    else:
        path = Path(uploads)
        pairs = [(f.parent.name, f.parent) for f in sorted(path.glob(f"*/{UPLOAD_FILE}"))]
        if not pairs:
            raise FedcoreError(
                f"{path} holds no folder with {UPLOAD_FILE}; pass a folder of uploads"
            )
    folders = {printable(client, _LONGEST_NAME): folder for client, folder in pairs}
    if len(folders) < len(pairs):
        raise FedcoreError("two clients have names that print alike; rename one of their folders")
    return folders
