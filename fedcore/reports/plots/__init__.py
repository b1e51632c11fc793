"""Figures of a run and of a comparison, ready for a paper or a page."""

from fedcore.errors import missing_extra

try:
    import matplotlib as _matplotlib  # noqa: F401  (said here once, for every module below)
except ImportError as error:
    raise missing_extra("matplotlib", "run") from error

from fedcore.reports.plots.clients import client_spread
from fedcore.reports.plots.comparison import compared_by_bytes, compared_by_round, final_quality
from fedcore.reports.plots.layers import aggregation_error, factor_drift
from fedcore.reports.plots.output import to_png, to_svg
from fedcore.reports.plots.partition import partition_picture
from fedcore.reports.plots.quality import quality_by_bytes, quality_by_round

__all__ = [
    "aggregation_error",
    "client_spread",
    "compared_by_bytes",
    "compared_by_round",
    "factor_drift",
    "final_quality",
    "partition_picture",
    "quality_by_bytes",
    "quality_by_round",
    "to_png",
    "to_svg",
]
