"""`camrt evaluate`: metrics of methods over a folder of images, with intervals and paired differences."""

from .masks import Mask, find_masks, read_mask
from .metric_table import CHECKS, FAITHFULNESS, LOCALISATION, METRICS, Metric
from .run import RESULTS, Settings, evaluate
from .statistics import Cell, bootstrap, differences, tabulate
from .tables import as_csv, as_markdown, differences_as_markdown
from .targets import read_targets_file

__all__ = [
    "CHECKS",
    "FAITHFULNESS",
    "LOCALISATION",
    "METRICS",
    "RESULTS",
    "Cell",
    "Mask",
    "Metric",
    "Settings",
    "as_csv",
    "as_markdown",
    "bootstrap",
    "differences",
    "differences_as_markdown",
    "evaluate",
    "find_masks",
    "read_mask",
    "read_targets_file",
    "tabulate",
]
