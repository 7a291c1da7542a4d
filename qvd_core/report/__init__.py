"""The report of a quantization: what was done to a model and what it cost, as data, pictures and one HTML page."""

from qvd_core.report.canvas import THEMES
from qvd_core.report.collect import collect
from qvd_core.report.comparison import (
    VideoComparison,
    compare_videos,
    comparison_chart,
    frame_strip,
    side_by_side,
)
from qvd_core.report.data import Report
from qvd_core.report.figures import FIGURES, summary_picture
from qvd_core.report.kept import kept_layers
from qvd_core.report.model import report_of_model
from qvd_core.report.page import render_page
from qvd_core.report.write import write_pictures, write_report

__all__ = [
    "FIGURES",
    "THEMES",
    "Report",
    "VideoComparison",
    "collect",
    "compare_videos",
    "comparison_chart",
    "frame_strip",
    "kept_layers",
    "render_page",
    "report_of_model",
    "side_by_side",
    "summary_picture",
    "write_pictures",
    "write_report",
]
