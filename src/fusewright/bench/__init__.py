"""Measuring what a merge gained: suites, statistics, leaderboards, reports, and the demo.

``demo.run_demo`` trains a small vision transformer and its experts (``digits``), merges them with
every method through the engine, and answers with a ``leaderboard.Leaderboard``, which ``tables``
and ``report`` draw. Intervals come from ``statistics``. Nothing heavy is imported before it is
used: data sets, training and plots need ``pip install 'fusewright[demo]'``.
"""
