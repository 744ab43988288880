"""coldrow.compat.fbgemm: features in any order, batch sizes, kinds of indices, what a forward gives back."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import ADAM, AR, assert_equal, make, random_batch, tensors  # noqa: E402

from coldrow.compat.fbgemm import (  # noqa: E402
    PoolingMode,
)


def test_features_in_any_order():
    tbe = make([(9, 4), (7, 8)], feature_table_map=[1, 0, 1], learning_rate=0.5)
    dense = [torch.nn.Parameter(w.clone()) for w in tbe.split_embedding_weights()]
    indices, offsets = random_batch(3, [7, 9, 7], (2, 2, 2))
    outs = [
        torch.nn.functional.embedding_bag(
            indices[o[0] : o[-1]], dense[t], o - o[0], mode="sum", include_last_offset=True
        )
        for t, o in zip([1, 0, 1], (offsets[2 * f : 2 * f + 3] for f in range(3)), strict=True)
    ]
    want, out = torch.cat(outs, 1), tbe(indices, offsets)
    assert tbe.total_D == out.shape[1] == 20
    torch.testing.assert_close(out, want)
    grad = torch.linspace(-1, 2, out.numel()).view(out.shape)
    out.backward(grad)
    want.backward(grad)
    for mine, other in zip(tbe.split_embedding_weights(), dense, strict=True):
        torch.testing.assert_close(mine, other.detach() - 0.5 * other.grad)


def test_unpooled_features_in_any_order_with_different_dims():
    tbe = make([(9, 4), (7, 8)], feature_table_map=[1, 0], pooling_mode=PoolingMode.NONE)
    parts = tbe(torch.tensor([3, 4, 5]), torch.tensor([0, 2, 3]))
    weights = tbe.split_embedding_weights()
    assert torch.equal(parts[0], weights[1][[3, 4]])
    assert torch.equal(parts[1], weights[0][[5]])


def test_batch_sizes_by_rank_come_out_rank_after_rank():
    sizes = [[2, 0, 1], [1, 3, 2]]
    tbe, plain = make(), make()
    indices, offsets = random_batch(1, [9, 7], [3, 6])
    out = tbe(indices, offsets, batch_size_per_feature_per_rank=sizes)
    flat = plain(indices, offsets, batch_size_per_feature_per_rank=[[3], [6]])
    first, second = flat[: 3 * 4].view(3, 4), flat[3 * 4 :].view(6, 8)
    want = [first[:2], second[:1], first[2:2], second[1:4], first[2:], second[4:]]
    assert torch.equal(out, torch.cat([part.flatten() for part in want]))
    grad = torch.linspace(-1, 2, out.numel())
    out.backward(grad)
    torch.cat([part.flatten() for part in want]).backward(grad)
    assert_equal(tensors(tbe), tensors(plain))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([[3]], ValueError),
        ([[3], [5]], ValueError),
        ([[3, 1], [5]], ValueError),
        ([[], []], ValueError),
        ([[-1], [10]], ValueError),
        (7, TypeError),
        ([3, 6], TypeError),
    ],
)
def test_wrong_batch_sizes_are_refused(given, kind):
    indices, offsets = random_batch(1, [9, 7], [3, 6])
    with pytest.raises(kind, match=r"^batch_size_per_feature_per_rank: got"):
        make()(indices, offsets, batch_size_per_feature_per_rank=given)
    with pytest.raises(ValueError, match=r"accepted: None with PoolingMode.NONE"):
        make(pooling_mode=PoolingMode.NONE)(
            indices, offsets, batch_size_per_feature_per_rank=[[3], [6]]
        )


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_indices_and_offsets_of_different_kinds(dtypes):
    one, other = make(), make()
    indices, offsets = random_batch(1, [9, 7], [3, 3])
    with torch.no_grad():
        out = one(indices.to(dtypes[0]), offsets.to(dtypes[1]))
        assert torch.equal(out, other(indices, offsets))
    with pytest.raises(TypeError, match=r"indices: got dtype torch.int16|indices: got"):
        one(indices.to(torch.int16), offsets)
    with pytest.raises(TypeError, match=r"^offsets: got list, accepted: a torch tensor"):
        one(indices, offsets.tolist())


def test_gradients_are_clamped_where_they_enter():
    clipped, plain = (
        make(gradient_clipping=c, max_gradient=0.5 if c else 1.0) for c in (True, False)
    )
    indices, offsets = random_batch(1, [9, 7], [3, 3])
    for tbe in (clipped, plain):
        out = tbe(indices, offsets)
        grad = torch.linspace(-2, 3, out.numel()).view(out.shape)
        out.backward(grad if tbe is clipped else grad.clamp(-0.5, 0.5))
    assert_equal(tensors(clipped), tensors(plain))


def test_feature_requires_grad_masks_the_gradient_of_weights():
    grads = []
    for asked in (None, torch.tensor([1, 0]), torch.tensor([False, False])):
        tbe = make()
        indices, offsets = random_batch(1, [9, 7], [3, 3])
        psw = torch.linspace(-1, 1, len(indices)).requires_grad_()
        tbe(indices, offsets, psw, asked).sum().backward()
        grads.append(psw.grad)
        grads.append(tensors(tbe))
    full, trained, first, again, none, _ = grads
    cut = int(offsets[3])
    assert full[cut:].any()
    assert torch.equal(first[:cut], full[:cut])
    assert not first[cut:].any()
    assert not none.any()
    assert_equal(trained, again)  # the tables are trained all the same
    with pytest.raises(
        ValueError, match=r"^feature_requires_grad: got .* accepted: a tensor \[2\]"
    ):
        make()(indices, offsets, psw, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"optimizer": AR, "ar_alpha": 0.1}, {}),
        ({**ADAM}, {}),
        ({"gradient_clipping": True, "max_gradient": 0.5}, {}),
        ({"feature_table_map": [1, 0]}, {}),
        ({}, {"batch_size_per_feature_per_rank": [[2, 0], [1, 3]]}),
    ],
)
def test_compiled_in_one_graph(options, call):
    eager, traced = make(**options), make(**options)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for s in range(4):
        for tbe in (eager, compiled):
            out = (
                tbe(*random_batch(s, [7, 7], [2, 4]), **call)
                if call
                else tbe(*random_batch(s, [7, 7], [3, 3]))
            )
            out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
        if s == 1 and options == ADAM:
            for tbe in (eager, traced):
                tbe.update_hyper_parameters({"eps": 1e-2, "lr": 0.3})
    assert_equal(tensors(traced), tensors(eager))
