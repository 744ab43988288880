"""Conformance: cases made by running FBGEMM 1.9's own ROWWISE_RMSPROP_AR (see tests/golden)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

CASES = sorted((Path(__file__).parents[2] / "golden").glob("*.npz"))


def load(path):
    z = np.load(path)
    return json.loads(bytes(z["meta"]).decode()), z


def check(meta, z, weights, momentum1, prev_iter, last_lr=None):
    """The tolerances of tests/golden/README.md."""
    for t in range(len(meta["tables"])):
        np.testing.assert_array_equal(prev_iter[t], z[f"p1_{t}"])
        np.testing.assert_allclose(momentum1[t], z[f"m1_{t}"], rtol=1e-6, atol=0)
        want = z[f"w1_{t}"].astype(np.float64)
        bound = 4e-6 if meta["weights_dtype"] == "fp32" else 2e-3
        error = np.abs(weights[t].astype(np.float64) - want)
        assert (error <= bound * np.maximum(1.0, np.abs(want))).all(), error.max()


def update_of(meta):
    return coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=1.0, eps=meta["eps"], ema_beta=meta["ema_beta"]),
        coldrow.LinearClipped(meta["ar_alpha"], meta["min_shrinkage"]),
    )


def test_cases_are_there():
    assert len(CASES) >= 15


@pytest.mark.parametrize("layout", ["record", "split"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_through_the_module(path, layout):
    through_the_module(path, layout, "cpu")


def through_the_module(path, layout, device):
    meta, z = load(path)
    tables = meta["tables"]
    features = [[] for _ in tables]
    for f, t in enumerate(meta["feature_table_map"]):
        features[t].append(f"f{f}")
    dtype = torch.float16 if meta["weights_dtype"] == "fp16" else torch.float32
    emb = TableBatchedEmbeddingBags(
        [
            Table(f"t{t}", e, d, dtype=dtype, features=features[t])
            for t, (e, d) in enumerate(tables)
        ],
        update_of(meta),
        pooling=meta["pooling"],
        state_layout=layout,
        device=device,
    )
    for t in range(len(tables)):
        emb.weights[f"t{t}"].copy_(torch.from_numpy(z[f"w0_{t}"]))
        emb.state[f"t{t}"]["momentum1"].copy_(torch.from_numpy(z[f"m0_{t}"]))
        emb.state[f"t{t}"]["prev_iter"].copy_(torch.from_numpy(z[f"p0_{t}"].astype(np.int32)))
    for s in range(meta["steps"]):
        emb.clock = meta["iter"][s] - 1
        emb.lr = meta["lr"][s]
        index_dtype = getattr(torch, meta["index_dtype"])
        indices = torch.from_numpy(z[f"indices_{s}"]).to(device, index_dtype)
        offsets = torch.from_numpy(z[f"offsets_{s}"]).to(device, index_dtype)
        psw = torch.from_numpy(z[f"psw_{s}"]).to(device) if meta["weighted"] else None
        out = emb(indices, offsets, psw)
        out.backward(torch.from_numpy(z[f"grad_{s}"]).to(device, out.dtype))
    # (A pooled value is a sum of rows, each of which may be off by 4e-6.)
    bound = 4e-3 if "fp16" in (meta["output_dtype"], meta["weights_dtype"]) else 8e-6
    scale = np.maximum(1.0, np.abs(z["out_last"].astype(np.float64)))
    error = np.abs(out.detach().cpu().numpy() - z["out_last"]) / scale
    assert (error <= bound).all(), error.max()
    names = [f"t{t}" for t in range(len(tables))]
    check(
        meta,
        z,
        [emb.weights[n].cpu().numpy() for n in names],
        [emb.state[n]["momentum1"].cpu().numpy() for n in names],
        [emb.state[n]["prev_iter"].cpu().numpy() for n in names],
    )


@pytest.mark.parametrize("path", [p for p in CASES if "none" in p.stem], ids=lambda p: p.stem)
def test_through_the_function_on_numpy(path):
    meta, z = load(path)
    n, batch = len(meta["tables"]), meta["B"]
    weights = [z[f"w0_{t}"].copy() for t in range(n)]
    momentum1 = [z[f"m0_{t}"].astype(np.float32) for t in range(n)]
    prev_iter = [z[f"p0_{t}"].astype(np.int32) for t in range(n)]
    for s in range(meta["steps"]):
        offsets, grad, indices = z[f"offsets_{s}"], z[f"grad_{s}"], z[f"indices_{s}"]
        for f, t in enumerate(meta["feature_table_map"]):
            lo, hi = offsets[f * batch], offsets[(f + 1) * batch]
            coldrow.rowwise_rmsprop_ar_(
                weights[t],
                np.ascontiguousarray(grad[lo:hi]),
                indices[lo:hi],
                momentum1[t],
                prev_iter[t],
                step=meta["iter"][s],
                lr=meta["lr"][s],
                eps=meta["eps"],
                ema_beta=meta["ema_beta"],
                ar_alpha=meta["ar_alpha"],
                min_shrinkage=meta["min_shrinkage"],
            )
    check(meta, z, weights, momentum1, prev_iter)
