"""What models are for: data, heads, metrics and evaluation, one outcome for every item.

A :class:`Task` asks one question of one data set and knows how a model answers it;
:func:`evaluate` gives :class:`Outcomes`, a score for each item, from which every statistic is made
later. Data come from a folder of parquet files or from the Hugging Face Hub, in the same layout:
:func:`open_split` of a :class:`DataSource`.

    source = DataSource(folder="vision/mnist")
    task = ImageClassification("mnist", classes, head=head, preparation=ImagePreparation(size=32))
    evaluate(model, task, open_split(source, "test")).shown

Importing this room brings neither torch nor any library that reads data.
"""

from __future__ import annotations

from fusewright.tasks.batching import Prepared
from fusewright.tasks.classification import Classification
from fusewright.tasks.corruptions import CORRUPTIONS, Corruption
from fusewright.tasks.data import DataSource, open_split
from fusewright.tasks.dense_prediction import Depth, Normals, Segmentation, corpus
from fusewright.tasks.errors import DataError
from fusewright.tasks.evaluate import evaluate, evaluating
from fusewright.tasks.generation import Generation
from fusewright.tasks.harness import LmEval
from fusewright.tasks.harness_documents import Benchmark
from fusewright.tasks.heads import clip_head, image_features
from fusewright.tasks.image_classification import ImageClassification
from fusewright.tasks.images import ImagePreparation
from fusewright.tasks.language_modelling import LanguageModelling
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.rows import DataSplit, Rows
from fusewright.tasks.task import Batch, Progress, Split, Task
from fusewright.tasks.text_classification import DecoderClassification, EncoderClassification
from fusewright.tasks.text_corruptions import TEXT_CORRUPTIONS, TextCorruption
from fusewright.tasks.verbalisers import VerbaliserClassification

__all__ = [
    "CORRUPTIONS", "TEXT_CORRUPTIONS", "Batch", "Benchmark", "Classification", "Corruption",
    "DataError", "DataSource", "DataSplit", "DecoderClassification", "Depth",
    "EncoderClassification", "Generation", "ImageClassification", "ImagePreparation",
    "LanguageModelling", "LmEval", "Normals", "Outcomes", "Prepared", "Progress", "Rows",
    "Segmentation", "Split", "Task", "TextCorruption", "VerbaliserClassification", "clip_head",
    "corpus", "evaluate", "evaluating", "image_features", "open_split",
]  # fmt: skip
