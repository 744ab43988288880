"""Embedding tables for torch, trained by a :class:`coldrow.RowUpdate`."""

from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.table import Table

__all__ = ["Table", "TableBatchedEmbeddingBags"]
