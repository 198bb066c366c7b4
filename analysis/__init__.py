"""What is measured, and how results are read: vectors, losses, judges, statistics, tables.

``analysis.load("results/sweeps/quickstart")`` opens a finished or running sweep for pandas.
"""

from analysis.results import Results, load

__all__ = ["Results", "load"]
