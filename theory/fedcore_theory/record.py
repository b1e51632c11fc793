"""``python -m fedcore_theory.record``: record the runs that checks read, into this checkout."""

from pathlib import Path

from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore_theory.recording import write_record

RECIPE = "bbc-news-fast"

if __name__ == "__main__":
    target = Path(__file__).parent / "recorded" / f"{RECIPE}.json"
    with ProgressDisplay(Console(stderr=True), RECIPE) as progress:
        write_record(RECIPE, target, progress)
    print(target)
