"""Decays of one's own that give no factor."""

from __future__ import annotations

import shutil

import pytest

import coldrow

torch = pytest.importorskip("torch")
from refusals import forward, make_arrays, refused  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

NO_FACTORS = {
    '__builtin_nanf("")': "nan",
    "__builtin_inff()": "inf",
    "-0.25f": "-0.250000",
    "1.5f": "1.500000",
}


@pytest.mark.host_only
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("gives", NO_FACTORS)
def test_decay_that_gives_no_factor(gives):
    source = (
        "struct Own { COLDROW_HD float operator()(std::int32_t gap, float) const { "
        f"return gap == 1 ? 1.0f : {gives}; }} }};"
    )
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.1), coldrow.jit.decay("Own", source))
    arrays = make_arrays()
    state = {"prev_iter": arrays.pop("prev_iter")}
    del arrays["momentum1"]
    says = f"decay: gave the factor {NO_FACTORS[gives]} for row 1 ... accepted: 0 to 1"
    with refused(ValueError, says, unchanged=[*arrays.values(), *state.values()]):
        coldrow.apply_(update, **arrays, state=state, step=7)

    emb = TableBatchedEmbeddingBags(
        [Table("user", 6, 4), Table("item", 5, 2)], update, on_nonfinite="raise"
    )
    forward(emb).sum().backward()
    emb.clock += 1
    out = forward(emb)
    says = f"decay: gave the factor {NO_FACTORS[gives]} for row 1 of table 'user' ... accepted"
    with refused(ValueError, says, unchanged=[emb]):
        out.sum().backward()
