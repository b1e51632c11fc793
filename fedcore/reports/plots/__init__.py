"""Figures of a run and of a comparison, ready for a paper or a page."""

from fedcore.errors import missing_extra

try:
    import matplotlib as _matplotlib  # noqa: F401  (said here once, for every module below)
except ImportError as error:
    raise missing_extra("matplotlib", "run") from error

from fedcore.reports.plots.accuracy import accuracy_by_bytes, accuracy_by_round
from fedcore.reports.plots.clients import client_spread
from fedcore.reports.plots.comparison import compared_by_bytes, compared_by_round, final_accuracy
from fedcore.reports.plots.layers import aggregation_error, factor_drift
from fedcore.reports.plots.output import to_png, to_svg
from fedcore.reports.plots.partition import partition_picture

__all__ = [
    "accuracy_by_bytes",
    "accuracy_by_round",
    "aggregation_error",
    "client_spread",
    "compared_by_bytes",
    "compared_by_round",
    "factor_drift",
    "final_accuracy",
    "partition_picture",
    "to_png",
    "to_svg",
]
