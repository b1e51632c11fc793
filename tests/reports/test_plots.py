from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedcore.errors import FedcoreError
from fedcore.federation.records import Round
from fedcore.reports import plots
from fedcore.reports.comparison import group_runs
from fedcore.reports.plots.labels import plain, short_names, spread
from fedcore.reports.plots.layers import module_labels, natural_order
from fedcore.reports.plots.style import PALETTE, new_figure, series_style
from fedcore.reports.reading import read_run
from fedcore.reports.record import RunRecord
from tests.reports.fake_run import module_names, write_fake_run

RUN_PLOTS = (
    plots.quality_by_round,
    plots.quality_by_bytes,
    plots.client_spread,
    plots.aggregation_error,
    plots.factor_drift,
    plots.partition_picture,
)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(write_fake_run(tmp_path_factory.mktemp("plots") / "run"))


def without_overlaps(figure: Figure) -> None:
    """No two texts overlap and none leaves the figure."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes = []
    for axes in figure.axes:
        texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        # Of an annotation only the words, not its leader.
        boxes += [
            Text.get_window_extent(t, renderer) for t in texts if t.get_visible() and t.get_text()
        ]
    for box in boxes:
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert width < 1 or height < 2


def test_curves_show_the_records_numbers(record: RunRecord):
    upper, lower = plots.quality_by_round(record).axes
    x, y = upper.lines[0].get_data()
    assert list(x) == list(range(13))
    assert list(y) == [r.accuracy for r in record.rounds]
    assert list(lower.lines[1].get_ydata()) == [r.train_loss for r in record.trained]
    (axes,) = plots.quality_by_bytes(record).axes
    sent = [sum(t.adapter for t in record.cumulated[r.index]) / 1e6 for r in record.rounds]
    assert list(axes.lines[0].get_xdata()) == pytest.approx(sent)
    total = [sum(t.total for t in record.cumulated[r.index]) / 1e6 for r in record.rounds]
    assert list(axes.lines[1].get_xdata()) == pytest.approx(total)


def test_heatmap_shows_values_and_hides_undefined_ones(record: RunRecord):
    figure = plots.aggregation_error(record)
    mesh = figure.axes[1].collections[-1]
    shown = mesh.get_array()
    assert shown.shape == (12, 12)
    wanted = [m.aggregation_error for m in record.trained[0].modules]
    assert [bool(hidden) for hidden in shown.mask[:, 0]] == [value is None for value in wanted]
    assert shown[1, 0] == wanted[1]
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["undefined"]
    legend = plots.factor_drift(record).axes[1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["exactly 0"]


def test_bubbles_have_areas_in_proportion_to_counts(record: RunRecord):
    figure = plots.partition_picture(record)
    areas = figure.axes[1].collections[0].get_sizes()
    counts = np.array(record.partition.class_counts)
    assert areas / areas.max() == pytest.approx(counts[counts > 0] / counts.max())
    numbers = {text.get_text() for text in figure.axes[1].texts}
    assert numbers == {str(n) for n in counts[counts > 0].tolist()}


@pytest.mark.parametrize("draw", RUN_PLOTS)
def test_no_text_overlaps(record: RunRecord, draw):
    without_overlaps(draw(record))


def test_large_and_small_runs_draw_without_overlaps(tmp_path: Path):
    labels = tuple(f"a topic with ${i}$ in its name" for i in range(12))
    large = write_fake_run(tmp_path / "l", clients=50, modules=48, rounds=70, labels=labels)
    small = write_fake_run(tmp_path / "s", clients=1, modules=2, rounds=1, dropped=False)
    for run in (read_run(large), read_run(small)):
        for draw in RUN_PLOTS:
            without_overlaps(draw(run))


def test_exact_methods_draw_zeros(tmp_path: Path):
    record = read_run(write_fake_run(tmp_path / "run", method="fedex", rounds=3))
    figure = plots.aggregation_error(record)
    without_overlaps(figure)
    legend = figure.axes[1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["exactly 0"]


def test_figures_without_data_say_so(tmp_path: Path):
    folder = write_fake_run(tmp_path / "run", method="head_only", rounds=2, finished=False)
    record = read_run(folder)
    with pytest.raises(FedcoreError, match="aggregation_error is undefined"):
        plots.aggregation_error(record)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:1]]
    (folder / "metrics.jsonl").write_text(json.dumps({**lines[0], "accuracy": None, "clients": []}))
    empty = read_run(folder)
    for draw in (plots.quality_by_round, plots.quality_by_bytes, plots.client_spread):
        with pytest.raises(FedcoreError, match="evaluated"):
            draw(empty)


def test_clients_that_train_alone_show_their_own_models(record: RunRecord):
    def alone(r: Round) -> Round:
        clients = (c.model_copy(update={"global_accuracy": None}) for c in r.clients)
        return r.model_copy(update={"clients": tuple(clients)})

    rounds = tuple(alone(r) for r in record.rounds)
    figure = plots.client_spread(replace(record, rounds=rounds))
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == ["best client", "mean, own models", "worst client"]


def test_comparison_bands_are_the_intervals(tmp_path: Path):
    runs = [
        read_run(write_fake_run(tmp_path / f"{m}{s}", method=m, seed=s, rounds=4, clients=3))
        for m in ("fedit", "head_only")
        for s in range(3)
    ]
    groups = group_runs(runs)
    (axes,) = plots.compared_by_round(groups).axes
    finals = [run.quality for run in runs[:3]]
    half = 4.302652730 * np.std(finals, ddof=1) / np.sqrt(3)
    band = axes.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 4][:, 1]
    assert at_end.max() == pytest.approx(np.mean(finals) + half)
    assert at_end.min() == pytest.approx(np.mean(finals) - half)
    (dots,) = plots.final_quality(groups).axes
    assert [t.get_text() for t in dots.get_yticklabels()] == ["head_only", "fedit"]
    (by_bytes,) = plots.compared_by_bytes(groups).axes
    assert "head_only (no adapter sent)" in [t.get_text() for t in by_bytes.texts]
    for draw in (plots.compared_by_round, plots.compared_by_bytes, plots.final_quality):
        without_overlaps(draw(groups))
    lone = plots.final_quality(group_runs(runs[:1])).axes[0]
    assert [t.get_text() for t in lone.texts] == [f"{finals[0]:.3f}, one run"]
    waiting = group_runs(
        [replace(runs[0], summary=runs[0].summary.model_copy(update={"finished": False}))]
    )
    with pytest.raises(FedcoreError, match="no run is finished"):
        plots.final_quality(waiting)


def test_svg_is_self_contained_and_takes_the_pages_colours(record: RunRecord):
    svg = plots.to_svg(plots.aggregation_error(record), "error")
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert "<!--" not in svg
    assert all(match.startswith(("#error-", "data:image/png;base64,")) for match in _links(svg))
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("error-") for name in ids)
    assert {link[1:] for link in _links(svg) if link.startswith("#")} <= set(ids)
    assert svg == plots.to_svg(plots.aggregation_error(record), "error")
    assert "var(--ink, #22272e)" in svg
    assert f"var(--series-0, {PALETTE[0]})" in svg


def _links(svg: str) -> list[str]:
    return re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)


def test_drawing_leaves_no_pyplot_and_no_settings_behind(record: RunRecord):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.quality_by_round(record), "a")
    assert dict(matplotlib.rcParams) == before


def test_short_names():
    names = [*module_names(48), "classifier.dense"]
    labels = module_labels(names)
    assert len(set(labels)) == len(names)
    assert labels[:4] == ["0 query", "0 value", "0 intermediate.dense", "0 output.dense"]
    assert max(map(len, labels)) <= len("11 intermediate.dense")
    assert natural_order(["e.10.q", "e.2.v", "e.2.q"]) == ["e.2.v", "e.2.q", "e.10.q"]
    assert module_labels(["a", "b.a"]) == ["a", "b.a"]
    assert short_names(["only-one"]) == ("", ["only-one"])
    assert short_names(["alice", "albert"]) == ("", ["alice", "albert"])
    assert short_names([]) == ("", [])
    assert plain("a $b$\n c", 40) == r"a \$b\$ c"
    assert plain("x" * 50, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_and_distance(seed: int):
    generator = np.random.default_rng(seed)
    wanted = generator.beta(0.3, 0.3, generator.integers(1, 12)).tolist()
    placed = spread(wanted, 0.07, 0.0, 1.0)
    order = np.argsort(wanted)
    assert np.diff(np.array(placed)[order]).min(initial=1.0) >= 0.07 - 1e-12
    assert min(placed) >= -1e-12
    assert max(placed) <= 1 + 1e-12
    far = [0.1, 0.5, 0.9]
    assert spread(far, 0.07, 0.0, 1.0) == far


def test_hatched_bars_keep_their_colour_in_a_page():
    figure = new_figure(2.0)
    figure.add_subplot().bar([0, 1], [1, 2], color=PALETTE[1], hatch="///", edgecolor="white")
    svg = plots.to_svg(figure, "bars")
    ground = re.search(r"<pattern .*?<rect [^>]*>", svg, flags=re.DOTALL)[0]
    assert f"fill: var(--series-1, {PALETTE[1]})" in ground
    used = set(re.findall(r"url\(#(.*?)\)", svg))
    assert used
    assert used <= set(re.findall(r'\bid="(.*?)"', svg))


def test_styles_differ():
    by_method = {repr(series_style(method, 0)) for method in range(108)}
    by_setting = {repr(series_style(m, s)) for m in range(6) for s in range(3)}
    assert (len(by_method), len(by_setting)) == (108, 18)
