from io import StringIO

import pytest
from rich.console import Console

from fedcore.cli.progress import ProgressDisplay
from fedcore.federation.measures import ACCURACY, PERPLEXITY

RECORD = {
    "round": 1,
    "train_loss": 3.94,
    "accuracy": 0.347,
    "loss": 3.883,
    "clients": [],
    "dropped": [],
    "flags": [],
    "bytes_up": {"adapter": 1, "head": 0},
    "bytes_down": {"adapter": 1, "head": 0},
    "modules": [],
}


@pytest.mark.parametrize(
    ("measure", "quality"), [(ACCURACY, "accuracy 0.347"), (PERPLEXITY, "perplexity 48.570")]
)
def test_a_round_is_told_in_the_measure_of_its_task(measure, quality):
    console = Console(file=StringIO(), width=120)
    with ProgressDisplay(console, "run", measure) as display:
        display.round_finished(RECORD)
        display.round_finished({**RECORD, "accuracy": None, "loss": None, "train_loss": None})
    first, second = console.file.getvalue().splitlines()
    assert first == f"run round   1   train loss 3.940   held-out {quality}, loss 3.883"
    assert second == "run round   1   train loss  -"
