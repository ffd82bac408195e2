"""The leaderboard as one HTML file: no network, no other files, light and dark."""

from fusewright.bench.report.page import write_report

__all__ = ["write_report"]
