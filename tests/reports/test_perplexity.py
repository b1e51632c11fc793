"""A language model's run is reported in perplexity, where lower is better."""

import math

import pytest

from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore.federation.measures import PERPLEXITY
from fedcore.reports.comparison import comparison_rows, group_runs
from fedcore.reports.intervals import Estimate
from fedcore.reports.page import _clear, write_comparison_page, write_run_page
from fedcore.reports.plots.quality import quality_by_round
from fedcore.reports.reading import read_run
from fedcore.reports.tables import comparison_markdown, final_grid, run_grid
from tests.experiments.jobs import tiny_causal_recipe
from tests.reports.fake_run import write_fake_run
from tests.reports.test_page import check_self_contained


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("causal")
    for method, rate in (("fedit", 1e-2), ("florg", 1e-4)):
        settings = {
            "method.name": method,
            "optimiser.rate": rate,
            "evaluation.target_perplexity": 9,
        }
        start(tiny_causal_recipe(home, **settings), home / method)
    return home


def test_a_record_is_on_the_scale_of_its_run(runs):
    record = read_run(runs / "fedit")
    assert record.measure is PERPLEXITY
    last = record.rounds[-1]
    assert last.quality(PERPLEXITY) == record.quality == math.exp(last.loss)
    assert last.client_qualities(PERPLEXITY) == [math.exp(c.global_loss) for c in last.clients]
    gaps = [math.exp(c.local_loss) - math.exp(c.global_loss) for c in last.clients]
    assert last.gap(PERPLEXITY) == pytest.approx(sum(gaps) / len(gaps))
    assert record.best_quality == min(quality for _, quality in record.evaluated)
    assert record.target == 9
    assert record.partition.majority_rate is not None
    assert record.majority_rate is None


def test_an_unfinished_run_derives_its_outcome_on_the_same_scale(runs, tmp_path):
    for name in ("recipe.toml", "environment.json", "partition.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs / "fedit" / name).read_bytes())
    derived, written = read_run(tmp_path), read_run(runs / "fedit")
    assert (derived.quality, derived.best_quality) == (written.quality, written.best_quality)
    derived, written = derived.summary, written.summary
    for name in ("worst_client", "mean_client", "best_client"):
        assert getattr(derived, name) == getattr(written, name), name
    assert derived.worst_client > derived.best_client


def test_tables_put_perplexity_where_accuracy_stands(runs):
    record = read_run(runs / "fedit")
    grid = run_grid(record)
    assert [column.heading for column in grid.columns][1] == "perplexity"
    last = record.rounds[-1]
    spread = last.client_qualities(PERPLEXITY)
    assert grid.rows[-1][1:6] == tuple(
        f"{value:.3f}"
        for value in (record.quality, last.loss, max(spread), sum(spread) / 3, min(spread))
    )
    assert "lower is better" in grid.note
    outcome = dict(final_grid(record).rows)
    assert outcome["held-out perplexity"] == f"{record.quality:.3f}"
    assert outcome["rounds to target"] == "— (9.000 not reached)"


def test_the_page_shows_perplexity_and_the_sample(runs):
    page = check_self_contained(write_run_page(runs / "fedit"))
    record = read_run(runs / "fedit")
    assert f"held-out perplexity is {record.quality:.3f}" in page.text
    assert "accurac" not in page.text.replace("target_accuracy", "")
    assert "most frequent class" not in page.text
    for text in (record.sample.prompt, record.sample.before, record.sample.after):
        assert text in page.text
    names = {path.name for path in (runs / "fedit/plots").iterdir()}
    assert {"perplexity-by-round.png", "perplexity-by-bytes.png"} <= names


def test_no_column_is_kept_for_a_head_and_the_loss_fills_its_panel(runs):
    record = read_run(runs / "fedit")
    assert not [c.heading for c in run_grid(record).columns if "head" in c.heading]
    losses = [r.loss for r in record.rounds] + [r.train_loss for r in record.rounds[1:]]
    figure = quality_by_round(record)
    low, high = figure.axes[1].get_ylim()
    assert 0 < high - low < 1.5 * (max(losses) - min(losses))


def test_a_comparison_ranks_the_lowest_first(runs, tmp_path):
    records = [read_run(runs / method) for method in ("florg", "fedit")]
    better = min(records, key=lambda record: record.quality)
    assert better.summary.method == "fedit"
    rows = comparison_rows(records)
    assert [row["perplexity_mean"] for row in rows] == [r.quality for r in records]
    assert not any(row["below_majority"] for row in rows)
    assert "| perplexity |" in comparison_markdown(rows)
    page = check_self_contained(write_comparison_page(records, tmp_path / "comparison.html"))
    assert f"Lowest mean perplexity: fedit, {better.quality:.3f}" in page.text


def test_intervals_are_clear_on_the_good_side_only():
    low, high = Estimate(2.0, 0.5, 3), Estimate(4.0, 0.5, 3)
    assert _clear(low, high, PERPLEXITY)
    assert not _clear(high, low, PERPLEXITY)
    assert not _clear(low, Estimate(4.0, None, 1), PERPLEXITY)
    assert not _clear(low, Estimate(2.4, 0.1, 3), PERPLEXITY)


def test_runs_of_different_measures_are_not_compared(runs, tmp_path):
    records = [read_run(runs / "fedit"), read_run(write_fake_run(tmp_path / "run"))]
    with pytest.raises(FedcoreError, match="measured in accuracy and perplexity"):
        group_runs(records)
