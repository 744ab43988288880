"""coldrow: embedding tables that forget.

Sparse optimizers whose decay is charged when a row is touched or read: adaptive regularization and
other lazy schedules, for tables in float32, float16 and bfloat16. ``import coldrow`` does not import
torch; :mod:`coldrow.nn` and :mod:`coldrow.optim` do.
"""

from coldrow import cuda, jit
from coldrow._version import __version__
from coldrow.functional import apply_, init_state, read_, rowwise_rmsprop_ar_
from coldrow.policies import (
    SGD,
    Adagrad,
    Adam,
    Constant,
    CumulativeLinear,
    Decay,
    EpochGated,
    EpochReset,
    Exponential,
    LinearClipped,
    Nearest,
    NoDecay,
    Optimizer,
    PartialRowwiseAdam,
    Rounding,
    RowUpdate,
    RowwiseAdagrad,
    RowwiseRMSprop,
    Stochastic,
)

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Constant",
    "CumulativeLinear",
    "Decay",
    "EpochGated",
    "EpochReset",
    "Exponential",
    "LinearClipped",
    "Nearest",
    "NoDecay",
    "Optimizer",
    "PartialRowwiseAdam",
    "Rounding",
    "RowUpdate",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "Stochastic",
    "__version__",
    "apply_",
    "cuda",
    "init_state",
    "jit",
    "read_",
    "rowwise_rmsprop_ar_",
]
