"""Reports: one HTML file without network or other files, and the same numbers as text.

``write_results`` draws what a sweep measured (``summary`` makes the numbers, ``marks`` the
drawings, ``html`` the page, ``files`` Markdown, CSV, LaTeX and JSON); ``write_report`` draws the
demo's leaderboard (``page``, ``plots``).
"""

from fusewright.bench.report.page import write_report
from fusewright.bench.report.write import to_html, write_results

__all__ = ["to_html", "write_report", "write_results"]
