"""What models are for: data, heads, metrics and evaluation, one outcome for every item.

A :class:`Task` asks one question of one data set and knows how a model answers it; ``evaluate``
gives :class:`Outcomes`, a score for each item, from which every statistic is made later. Data come
from a folder of parquet files or from the Hugging Face Hub, in the same layout.
"""
