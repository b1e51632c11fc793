"""One run of a bench command: measured with progress, presented once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from threadpoolctl import threadpool_limits

from bench.busy import describe_others, usage
from bench.case import Plan, Row, measure
from bench.limits import Limits, measure_limits
from bench.machine import describe_machine
from bench.report import limits_line, print_tables, to_json, to_markdown
from bench.timing import cold_clock
from bench.workloads import Setting
from fedcore.data.folders import write_bytes, write_text
from fedcore.errors import FedcoreError, unknown_name
from fedcore.reports.plots import to_png

DEVICES = ("cpu", "cuda")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    Attributes:
        device: one of :data:`DEVICES`.
        threads: of torch; its own default unless set.
        repeats: timed calls of everything that is fast enough.
        small: only a few modules of the smaller model.
        as_json: one JSON array in place of tables, printed or written to ``json_path``.
        json_path: where the array goes.
        out: folder for the table, the array and the figure.
    """

    device: str = "cpu"
    threads: int | None = None
    repeats: int = 15
    small: bool = False
    as_json: bool = False
    json_path: Path | None = None
    out: Path | None = None

    def __str__(self) -> str:
        """The options that change what is measured, as one would type them."""
        threads = [] if self.threads is None else [f"--threads {self.threads}"]
        words = [*threads, f"--repeats {self.repeats}", f"--device {self.device}"]
        words += ["--small"] if self.small else []
        return " ".join(words if self.out is None else [*words, f"--out {self.out}"])

    def setting(self) -> Setting:
        """Check the options and give torch its threads.

        Raises:
            FedcoreError: an unknown device or none there, a path without ``--json``, or an
                ``--out`` that is not a folder.
        """
        if self.device not in DEVICES:
            raise unknown_name("--device", self.device, DEVICES)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise FedcoreError("--device is cuda, and torch finds no CUDA device here; pass cpu")
        if self.json_path is not None and not self.as_json:
            raise FedcoreError(f"{self.json_path} is given without --json; pass --json FILE")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise FedcoreError(f"--out {self.out} is a file; pass a folder")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Setting(torch.device(self.device), self.small)


class Session:
    """Measures plans with a bar on the terminal, one line per plan elsewhere; a context manager."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.setting = request.setting()
        self.clock = cold_clock(self.setting.device)
        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bars.add_task("memory and processor")
        self.limits: Limits
        self._before = usage()

    def __enter__(self) -> Session:
        # NumPy's and SciPy's BLAS do not follow torch's threads, and two of their threads on a busy
        # core made an eigh 200 times slower than one.
        self._blas = threadpool_limits(torch.get_num_threads(), user_api="blas")
        self._bars.start()
        self._say("memory and processor")
        self.limits = measure_limits(self.setting.device, self.clock, self.request.repeats)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
        self._blas.restore_original_limits()

    def measure(self, plans: Sequence[Plan], *, memory: bool) -> list[Row]:
        """The rows of all plans, one after the other; peaks of memory too, where asked for."""
        device = self.setting.device if memory else None
        repeats = self.request.repeats
        return [
            row
            for plan in self.track(plans, lambda plan: plan.name)
            for row in measure(plan.build(), self.clock, repeats, self.limits, device)
        ]

    def track(self, items: Sequence[Item], name: Callable[[Item], str]) -> Iterator[Item]:
        """The items one after the other, each announced by its name."""
        self._bars.update(self._task, total=len(items), completed=0)
        for item in items:
            self._say(name(item))
            yield item
            self._bars.advance(self._task)

    def present(
        self,
        name: str,
        title: str,
        command: str,
        rows: Sequence[Row],
        figures: Mapping[str, Figure],
    ) -> None:
        """Print tables, or one array; write everything to the folder where there is one."""
        request = self.request
        machine = describe_machine(self.setting.device)
        others = describe_others(self._before, usage())
        self._bars.stop()
        if request.as_json and request.json_path is None:
            print(to_json(rows), end="")
        elif request.json_path is not None:
            write_text(to_json(rows), request.json_path)
        else:
            console = Console()
            for line in (machine, limits_line(self.limits), others):
                console.print(line, style="dim", highlight=False)
            print_tables(console, rows)
        if request.out is None:
            return
        request.out.mkdir(parents=True, exist_ok=True)
        stem = f"{name}-{request.device}"
        pictures = [f"{stem}-{kind}.png" for kind in figures]
        page = to_markdown(
            title,
            f"{command} {request}",
            [f"{machine}.", f"{limits_line(self.limits)}.", others],
            rows,
            pictures,
        )
        write_text(page, request.out / f"{stem}.md")
        write_text(to_json(rows), request.out / f"{stem}.json")
        for picture, figure in zip(pictures, figures.values(), strict=True):
            write_bytes(to_png(figure), request.out / picture)
        written = f"{request.out / stem}.md"
        self._console.print(others, highlight=False)
        self._console.print(f"written: {written}", highlight=False, soft_wrap=True)

    def _say(self, what: str) -> None:
        self._bars.update(self._task, description=f"measuring {what}")
        if not self._console.is_terminal:
            self._console.print(f"measuring {what}", style="dim", highlight=False)
