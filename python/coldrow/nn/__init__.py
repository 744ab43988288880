"""Embedding tables for torch, trained by a :class:`coldrow.RowUpdate`."""

from coldrow.nn.embedding import Embedding, EmbeddingBag
from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.table import Table
from coldrow.nn.utils import clip_grad_norm_, ignore_in_ddp

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "Table",
    "TableBatchedEmbeddingBags",
    "clip_grad_norm_",
    "ignore_in_ddp",
]
