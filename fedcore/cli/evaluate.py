"""`fedcore evaluate`: what a run's models or an adapter answer, against their base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedcore.data.folders import write_text
from fedcore.data.peft_files import CONFIG_FILE
from fedcore.errors import FedcoreError

if TYPE_CHECKING:
    from fedcore.answers.harness import HarnessTask
    from fedcore.answers.scoring import Progress as Reported
    from fedcore.answers.task import AnswerTask


def evaluate_answers(
    source: Annotated[
        Path, typer.Argument(help="A run folder of a language model, or a PEFT adapter folder.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base model of an adapter; the one it names by default."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="bbc-topic, arithmetic, lm-eval:NAME, several with commas; the first two "
            "if neither tasks nor data are set."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file of rows: prompt, and options with the index of the right one as "
            "answer, or answer, or tests."
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="With --data: number, math or exact, for rows with an answer."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="With --data: text that ends an answer; may be repeated."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="With --data: the most tokens of an answer.")
    ] = 256,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of YAML files that describe tasks of lm-eval.")
    ] = None,
    round_: Annotated[
        int | None,
        typer.Option("--round", min=0, help="Of a run: after so many rounds, not the newest."),
    ] = None,
    clients: Annotated[
        bool, typer.Option("--clients", help="Of a run: also the model of each client.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are read at once.")] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="Run programs that the model writes, with limits and no jail."
        ),
    ] = False,
) -> None:
    """Score answers of a run's models, or of an adapter, against their base model."""
    console = Console(stderr=True)
    is_run, options = _is_run(source), {"--round": round_ is not None, "--clients": clients}
    wrong = {"--base": base is not None} if is_run else options
    for option, given in wrong.items():
        if given:
            what = "a run, which has its own base" if is_run else "an adapter, which has no rounds"
            raise FedcoreError(f"{option} does not fit {source}: it is {what}; leave it out")
    if data is None and (kind or stop):
        raise FedcoreError("--kind and --stop belong to --data; pass it, or leave them out")
    # Imported once the arguments are known to be sound: it loads transformers.
    from fedcore.answers.bundled import BUNDLED, named_task
    from fedcore.answers.candidates import adapter_candidates
    from fedcore.answers.files import read_task
    from fedcore.answers.outcome import answers_of
    from fedcore.answers.scoring import check_tasks
    from fedcore.reports.answers import answer_grids
    from fedcore.reports.grid import stacked

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and data is None:
        names = list(BUNDLED)
    from_file = (
        [] if data is None else [read_task(data, kind=kind, stop=stop or (), max_tokens=max_tokens)]
    )

    def chosen(named: Callable[..., AnswerTask | HarnessTask]) -> list[AnswerTask | HarnessTask]:
        return [*(named(name, task_folder) for name in names), *from_file]

    check_tasks(chosen(named_task), run_code=run_code)
    with _progress(console) as (preparing, progress):
        if is_run:
            from fedcore.experiments.answers import run_models

            preparing(f"the run in {source}")
            run = run_models(source, round=round_, clients=clients)
            candidates, asked = run.candidates, chosen(run.task)
        else:
            preparing(f"the adapter in {source}")
            candidates, asked = adapter_candidates(source, base), chosen(named_task)
        scores = candidates.score(
            asked,
            limit=limit,
            batch_size=batch_size,
            run_code=run_code,
            progress=progress,
        )
    answers = answers_of(scores)
    Console().print(stacked(*answer_grids(answers)))
    if out is not None:
        about = {"source": str(source), "round": round_, "limit": limit, **answers.plain()}
        write_text(json.dumps(about, indent=1, allow_nan=False) + "\n", out)
        Console().print(f"numbers: {out}", highlight=False, soft_wrap=True)


def _is_run(source: Path) -> bool:
    """Whether ``source`` is a run; otherwise it is an adapter.

    Raises:
        FedcoreError: it is neither.
    """
    if (source / "recipe.toml").is_file():
        return True
    if (source / CONFIG_FILE).is_file():
        return False
    raise FedcoreError(
        f"{source} is neither a run (recipe.toml) nor an adapter ({CONFIG_FILE}); pass the folder "
        "of one"
    )


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Callable[[str], None], Reported]]:
    """What says what is being prepared, and what shows how many rows are done."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        bar = bars.add_task("", total=None)

        def preparing(what: str) -> None:
            bars.update(bar, description=f"preparing {what}")
            if not console.is_terminal:
                console.print(f"preparing {what}", style="dim", highlight=False, markup=False)

        def progress(task: str, done: int, total: int) -> None:
            bars.update(bar, description=task, completed=done, total=total)

        yield preparing, progress
