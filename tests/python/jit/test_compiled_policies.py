"""Policies compiled from source: what they compute, their fields, and how they are compared and saved."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import textwrap

import numpy as np
import pytest
import torch
from sources import ADAGRAD, HALF_LIFE, RMSPROP, same_bits, train

import coldrow
from coldrow import _core, _nvrtc, _paths
from coldrow.jit import compiler, decay, optimizer
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
# A decay that is not in the library, as a stranger would write it.
WARMUP = """\
#pragma once
#include <coldrow/policy/decay.hpp>

struct Warmup {
  float half_life;
  float warmup;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    const double over = gap - static_cast<double>(warmup);
    return over <= 0.0 ? 1.0f : static_cast<float>(coldrow::exp2_fixed(-over / half_life));
  }
};
"""


# --------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("gated", [False, True])
def test_decay_equals_the_built_in_of_its_formula(gated):
    own, built_in = decay("HalfLife", HALF_LIFE, half_life=3.0), coldrow.Exponential(half_life=3.0)
    if gated:
        own, built_in = coldrow.EpochGated(own), coldrow.EpochGated(built_in)
    for rest in ({}, {"decay_state": True}, {"optimizer": coldrow.Adam()}):
        mine, theirs = (coldrow.RowUpdate(decay=d, **rest) for d in (own, built_in))
        assert same_bits(train(mine), train(theirs))
    assert not same_bits(train(mine), train(coldrow.RowUpdate(coldrow.Adam())))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rounding", [coldrow.Nearest(), coldrow.Stochastic(3)])
@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        (
            lambda: optimizer("Copy", RMSPROP, lr=0.1, eps=1e-6, ema_beta=0.9),
            coldrow.RowwiseRMSprop(lr=0.1, eps=1e-6, ema_beta=0.9),
        ),
        (lambda: optimizer("Copy", ADAGRAD, lr=0.1), coldrow.Adagrad(lr=0.1)),
    ],
    ids=["by row", "by element"],
)
def test_optimizer_equals_the_built_in_of_its_formula(own, built_in, rounding, dtype):
    mine, theirs = (
        coldrow.RowUpdate(o, coldrow.LinearClipped(1.0), rounding, decay_state=True)
        for o in (own(), built_in)
    )
    assert same_bits(train(mine, dtype=dtype), train(theirs, dtype=dtype))


def test_instruction_sets_give_the_same_bits():
    before = _core.build()
    results = []
    try:
        for build in _core.builds():
            _core.use_build(build)
            coldrow.policies.compiled.cache_clear()
            coldrow.jit.compiler.forget()
            update = coldrow.RowUpdate(
                optimizer("Copy", ADAGRAD), decay("HalfLife", HALF_LIFE, half_life=7.0)
            )
            results.append(train(update))
    finally:
        _core.use_build(before)
        coldrow.policies.compiled.cache_clear()
        coldrow.jit.compiler.forget()
    for other in results[1:]:
        assert same_bits(results[0], other)


def test_header_program_gives_the_same_bits(tmp_path):
    """A stranger's decay, compiled into a program of its own and by jit."""
    header = tmp_path / "warmup.hpp"
    header.write_text(WARMUP)
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=0.05), decay("Warmup", header, warmup=4, half_life=9)
    )
    rng = np.random.default_rng(1)
    weight, state = rng.standard_normal((3, 50)).astype(np.float32), None
    start = weight.copy()
    state = coldrow.init_state(update, 3, 50, weight)
    grads, rows = rng.standard_normal((40, 50)).astype(np.float32), rng.integers(0, 3, 40)
    rows[rows == 2] = np.where(rng.random((rows == 2).sum()) < 0.7, 0, 2)  # row 2 has long gaps
    for step in range(40):
        coldrow.apply_(
            update, weight, grads[step][None], rows[step : step + 1], state, step=step + 1
        )

    (tmp_path / "main.cpp").write_text(textwrap.dedent("""\
        #include <cstdio>
        #include <coldrow/coldrow.hpp>
        #include "warmup.hpp"
        float weight[3][50], grads[40][50], momentum1[3];
        std::int64_t rows[40];
        std::int32_t prev_iter[3];
        int main() {
          using Update = coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, Warmup, coldrow::Nearest>;
          if (!std::fread(weight, sizeof weight, 1, stdin) || !std::fread(grads, sizeof grads, 1, stdin) ||
              !std::fread(rows, sizeof rows, 1, stdin)) return 1;
          for (int t = 0; t < 40; ++t) {
            const auto r = rows[t];
            const auto update = Update::at(t + 1, 0.05, {}, {.half_life = 9, .warmup = 4});
            update(coldrow::Serial{}, {weight[r], &prev_iter[r], {&momentum1[r]}, {}}, grads[t], 50, {});
          }
          std::fwrite(weight, sizeof weight, 1, stdout);
        }
        """))  # fmt: skip
    command, _ = compiler._compiler(os.environ.get("CXX"))
    flags = ["-std=c++20", "-O2", *compiler.STRICT, f"-I{_paths.includes()}"]
    subprocess.run([*command, *flags, "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    out = subprocess.run(
        [tmp_path / "main"],
        input=start.tobytes() + grads.tobytes() + rows.astype(np.int64).tobytes(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert out == weight.tobytes()
    assert out != start.tobytes()


def test_optional_functions_are_used():
    """first_touch, and prepare with all it is given."""
    source = """
        struct Probe {
          double fields[3];
          COLDROW_HD float operator()(std::int32_t, float) const { return 0.5f; }
          COLDROW_HD float first_touch(float) const { return 0.25f; }
          COLDROW_HD Probe prepare(std::int32_t, double, std::int32_t) const { return *this; }
        };
        struct Seen {
          double at;
          COLDROW_HD float operator()(std::int32_t, float) const { return static_cast<float>(at); }
        };
        struct Prepared {
          COLDROW_HD float operator()(std::int32_t, float) const { return 2.0f; }
          COLDROW_HD Seen prepare(std::int32_t step, double lr, std::int32_t epoch_start) const {
            return {step * 1e-1 + lr + epoch_start * 1e-3};
          }
        };
        struct FirstTouch {
          COLDROW_HD float operator()(std::int32_t, float) const { return 0.5f; }
          COLDROW_HD float first_touch(float lr) const { return lr; }
        };"""

    def factor(name, prev_iter, read=False):
        update = coldrow.policies.compiled(coldrow.RowUpdate(decay=decay(name, source)))
        return _core.factor(update, prev_iter, 5, 0.125, 3, read)

    assert factor("FirstTouch", 0) == 0.125
    assert factor("FirstTouch", 1) == 0.5
    assert factor("FirstTouch", 0, read=True) == 1.0
    assert factor("Prepared", 1) == np.float32(0.5 + 0.125 + 0.003)
    assert factor("Prepared", 1, read=True) == np.float32(0.4 + 0.125 + 0.003)


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("fused", [True, False])
def test_module_and_optimizer(charge, fused):
    def run(policy, opt):
        update = coldrow.RowUpdate(opt, policy)
        torch.manual_seed(0)
        emb = TableBatchedEmbeddingBags(
            [Table("a", 50, 20), Table("b", 9, 7)], update, charge=charge, fused=fused
        )
        rng = np.random.default_rng(0)
        for _ in range(20):
            indices = torch.from_numpy(rng.integers(0, 9, 24))
            out = emb(indices, torch.arange(0, 25, 3))
            (
                out * torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32))
            ).sum().backward()
            if not fused:
                emb.step()
                emb.zero_grad()
        state = [s[n] for s in emb.state.values() for n in update.state_names]
        return [*(w.detach() for w in emb.weights.values()), *state, emb.read("a"), emb.read("b")]

    mine = run(decay("HalfLife", HALF_LIFE, half_life=3.0), optimizer("Copy", ADAGRAD))
    theirs = run(coldrow.Exponential(half_life=3.0), coldrow.Adagrad())
    assert same_bits([x.contiguous() for x in mine], [x.contiguous() for x in theirs])


CONSTANT = (
    "struct Bad {{ COLDROW_HD float operator()(std::int32_t, float) const {{ return {}; }} }};"
)
NO_FACTOR = {
    "0.0f / 0.0f": r"decay: gave the factor -?nan for row 0 \(2 rows",
    "1.0f / 0.0f": r"decay: gave the factor inf for row 0 \(2 rows",
    "-0.25f": r"decay: gave the factor -0.25.* for row 0 \(2 rows",
    "1.5f": r"decay: gave the factor 1.5.* for row 0 \(2 rows",
    None: "grad: the update of row 0 is not finite",  # an optimizer, for one element
}


@pytest.mark.parametrize("gives", NO_FACTOR)
def test_policies_that_give_no_number_to_work_with_leave_rows_alone(gives):
    """A decay gives a factor in [0, 1]; all else is treated as a gradient that is not finite is."""
    if gives is not None:
        update = coldrow.RowUpdate(decay=decay("Bad", CONSTANT.format(gives)))
    else:
        one_nan = ADAGRAD.replace("return row", "if (g == 7.0f) return 0.0f / 0.0f; return row")
        update = coldrow.RowUpdate(optimizer("Copy", one_nan))
    weight = np.ones((2, 40), np.float32)
    state = coldrow.init_state(update, 2, 40, weight)
    grad = np.ones((2, 40), np.float32)
    grad[0, 39] = 7.0  # behind columns that are fine
    before = [weight.copy(), *(s.copy() for s in state.values())]
    with pytest.raises(ValueError, match=NO_FACTOR[gives]):
        coldrow.apply_(update, weight, grad, np.array([0, 1]), state, step=1)
    for x, y in zip(before, [weight, *state.values()], strict=True):
        np.testing.assert_array_equal(x, y)
    coldrow.apply_(update, weight, grad, np.array([0, 1]), state, step=1, on_nonfinite="skip")
    assert (weight[0] == 1).all()
    assert state["prev_iter"][0] == 0
    if gives is not None:
        coldrow.apply_(
            update, weight, grad, np.array([0, 1]), state, step=1, on_nonfinite="propagate"
        )
        assert (state["prev_iter"] == 1).all()


KERNEL = """
#include <coldrow/table/table.hpp>
{source}
using Update = coldrow::RowUpdate<coldrow::bfloat16, float, {optimizer}, {decay}, coldrow::Stochastic>;
using Table = coldrow::Table<coldrow::bfloat16, {optimizer}>;
extern "C" __global__ void train(Update update, Table table, const float* grad) {{
  const std::int64_t r = blockIdx.x;
  update(coldrow::Warp{{}}, table.row(r), grad + r * table.dim, table.dim, table.key(r));
}}
"""


@pytest.mark.parametrize("source", [HALF_LIFE, WARMUP, RMSPROP, ADAGRAD])
def test_sources_compile_for_a_device_too(source):
    """With NVRTC, which needs no GPU: what a source must be to be used there as well."""
    try:
        _nvrtc.load()
    except FileNotFoundError as error:
        if "COLDROW_REQUIRE_ALL_TESTS" in os.environ:
            raise
        pytest.skip(str(error))
    name = source.partition("struct ")[2].split()[0]
    source = source.replace("#pragma once", "")
    kinds = {"optimizer": "coldrow::SGD", "decay": "coldrow::NoDecay"}
    kinds["optimizer" if name == "Copy" else "decay"] = name
    assert len(_nvrtc.compile(KERNEL.format(source=source, **kinds), "own.cu", "sm_90")) > 1000


# ------------------------------------------------------------------------------------- as an object


def test_equal_by_value_picklable_and_shown():
    a = decay("HalfLife", HALF_LIFE, half_life=3)
    assert a == decay("HalfLife", HALF_LIFE, half_life=3.0)
    assert a != decay("HalfLife", HALF_LIFE, half_life=4.0)
    assert a != decay("HalfLife", HALF_LIFE + " ", half_life=3.0)
    assert hash(a) == hash(decay("HalfLife", HALF_LIFE, half_life=3.0))
    assert repr(a) == "HalfLife(half_life=3.0)"
    assert a.half_life == 3.0
    with pytest.raises(AttributeError, match="half_live"):
        _ = a.half_live
    o = optimizer("Copy", RMSPROP, lr=0.5, ema_beta=0.5, eps=0.25)
    assert repr(o) == "Copy(lr=0.5, ema_beta=0.5, eps=0.25)"
    assert (o.lr, o.eps) == (0.5, 0.25)
    update = coldrow.RowUpdate(o, coldrow.EpochGated(a), decay_state=True)
    assert "EpochGated(decay=HalfLife(half_life=3.0))" in repr(update)
    assert update.state_names == ("prev_iter", "square")
    assert coldrow.RowUpdate(optimizer("Copy", ADAGRAD)).state_names == ("prev_iter", "state1")
    for other in (pickle.loads(pickle.dumps(update)), copy.deepcopy(update)):
        assert other == update
        assert same_bits(train(other), train(update))


def test_checkpoint_names_the_source_and_never_runs_it():
    own = decay("HalfLife", HALF_LIFE + "// checkpoint\n", half_life=3.0)
    update = coldrow.RowUpdate(
        optimizer("Copy", RMSPROP, eps=0.1, ema_beta=0.5), coldrow.EpochGated(own)
    )
    described = update.to_dict()
    assert coldrow.RowUpdate.from_dict(described) == update
    tampered = pickle.loads(pickle.dumps(described))
    tampered["decay"]["decay"]["source"] += "\n"
    with pytest.raises(
        ValueError, match=r"policy: got 'HalfLife', compiled from source; accepted: call"
    ):
        coldrow.RowUpdate.from_dict(tampered)

    def module(policy):
        return TableBatchedEmbeddingBags([Table("a", 5, 3)], coldrow.RowUpdate(decay=policy))

    saved = module(own).state_dict()
    module(own).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="update of 'a'"):
        module(decay("HalfLife", HALF_LIFE, half_life=3.0)).load_state_dict(saved)

    table = torch.nn.Embedding(5, 3, sparse=True)
    opt = SparseOptimizer(table.parameters(), update)
    table(torch.tensor([1])).sum().backward()
    opt.step()
    again = SparseOptimizer(table.parameters(), update)
    again.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    assert again.param_groups[0]["update"] == update


def test_two_policies_of_one_name_do_not_meet():
    sources = [f"struct Same {{ COLDROW_HD float operator()(std::int32_t, float) const {{ return {x}f; }} }};"
               for x in (0.25, 0.5, 0.75)]  # fmt: skip
    updates = [
        coldrow.policies.compiled(coldrow.RowUpdate(decay=decay("Same", s))) for s in sources
    ]
    assert [_core.factor(u, 1, 5, 0.1, 0, False) for u in updates] == [0.25, 0.5, 0.75]


def test_struct_in_a_namespace():
    source = "namespace mine {\n" + HALF_LIFE + "}"
    own = decay("mine::HalfLife", source, half_life=3.0)
    built_in = coldrow.RowUpdate(decay=coldrow.Exponential(half_life=3.0))
    assert same_bits(train(coldrow.RowUpdate(decay=own)), train(built_in))


# ------------------------------------------------------------------------------------------- fields


def test_fields_by_name_in_any_order_with_defaults():
    source = """
        // c, b and a in a comment before the struct
        struct Mix {
          double a;
          /* c */ std::int32_t b;
          bool c = true;
          float d = 0.5f;
          COLDROW_HD float operator()(std::int32_t, float) const {
            return static_cast<float>(a / b) + (c ? d : 0.0f);
          }
        };"""

    def factor(**params):
        update = coldrow.policies.compiled(coldrow.RowUpdate(decay=decay("Mix", source, **params)))
        return _core.factor(update, 1, 5, 0.1, 0, False)

    assert factor(b=4, a=1.0) == 0.75
    assert factor(c=False, a=1.0, b=4) == 0.25
    assert factor(d=0.125, b=4, a=1.0) == 0.375
    with pytest.raises(TypeError, match=r"^Mix: field 'b' has no default and was not given$"):
        decay("Mix", source, a=1.0)
    with pytest.raises(TypeError, match=r"^Mix: field 'a' has no default and was not given$"):
        decay("Mix", source)
    with pytest.raises(TypeError, match=r"^Mix has no field 'e'$"):
        decay("Mix", source, a=1.0, b=4, e=1)
    with pytest.raises(
        ValueError, match=r"^b: got 4\.5, accepted: a value that the field can hold"
    ):
        decay("Mix", source, a=1.0, b=4.5)
    with pytest.raises(ValueError, match=r"^b: got 3000000000.0, accepted: a value that the field"):
        decay("Mix", source, a=1.0, b=3e9)
    with pytest.raises(ValueError, match=r"^a: got nan, accepted: a finite number"):
        decay("Mix", source, a=float("nan"), b=4)
    with pytest.raises(TypeError, match=r"^a: got 'x', accepted: a finite number"):
        decay("Mix", source, a="x", b=4)
