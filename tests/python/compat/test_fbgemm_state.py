"""coldrow.compat.fbgemm: state to and from FBGEMM's checkpoints."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import (  # noqa: E402
    AR,
    NAN,
    OPTIONS,
    ROWWISE,
    ar_states,
    assert_equal,
    flat_checkpoint,
    make,
    ones,
    snapshot,
    step,
    tensors,
    touch,
)

import coldrow  # noqa: E402
from coldrow.compat.fbgemm import (  # noqa: E402
    EmbeddingLocation,
    EmbOptimType,
    FbgemmState,
    export_state,
    import_state,
)
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

SIZES = [(9, 4), (7, 8)]
PLACES = [
    None,
    [EmbeddingLocation.DEVICE, EmbeddingLocation.MANAGED],
    [EmbeddingLocation.MANAGED_CACHING] * 2,
]


@pytest.mark.parametrize("prefix", ["", "sparse."])
@pytest.mark.parametrize("places", PLACES)
def test_a_checkpoint_of_fbgemm(places, prefix):
    states = ar_states(SIZES, 30)
    checkpoint, weights = flat_checkpoint(SIZES, [1, 0, 1], states, 30, places)
    checkpoint = {prefix + key: value for key, value in checkpoint.items()}
    tbe = make(SIZES, optimizer=AR, feature_table_map=[1, 0, 1], learning_rate=0.5)
    import_state(tbe, checkpoint, prefix=prefix)
    assert tbe.iter.tolist() == [30]
    assert tbe.get_learning_rate() == 0.5
    want = zip(states["momentum1"], [p.int() for p in states["prev_iter"]], strict=True)
    assert_equal(tensors(tbe)[:-1], [*weights, *itertools.chain(*want)])
    model = torch.nn.Module()
    model.sparse = make(SIZES, optimizer=AR, feature_table_map=[1, 0, 1])
    model.dense = torch.nn.Linear(2, 2)
    dense = {f"dense.{k}": v for k, v in torch.nn.Linear(2, 2).state_dict().items()}
    whole = {f"sparse.{k.removeprefix(prefix)}": v for k, v in checkpoint.items()}
    model.load_state_dict({**dense, **whole})
    assert_equal(tensors(model.sparse), tensors(tbe))


@pytest.mark.parametrize("kind", OPTIONS)
def test_there_and_back_for_each_optimizer(kind):
    tbe, other = make(optimizer=kind, **OPTIONS[kind]), make(optimizer=kind, **OPTIONS[kind])
    for s in range(4):
        step(tbe, s)
    state = export_state(tbe)
    assert isinstance(state.iter, int)
    import_state(other, state)
    assert_equal(tensors(other), tensors(tbe))
    by_name = export_state(other)
    for one, two in zip(
        [*state.weights, *itertools.chain(*state.optimizer_states)],
        [*by_name.weights, *itertools.chain(*by_name.optimizer_states)],
        strict=True,
    ):
        assert one.is_contiguous()
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
    # From a module: whatever has FBGEMM's accessors, this class among them.
    third = make(optimizer=kind, **OPTIONS[kind])
    import_state(third, tbe)
    assert_equal(tensors(third), tensors(tbe))
    # Into a module.
    fourth = make(optimizer=kind, **OPTIONS[kind])
    state.write_to(fourth)
    assert_equal(tensors(fourth), tensors(tbe))


def test_native_modules_too():
    emb = TableBatchedEmbeddingBags(
        [Table("a", 9, 4), Table("b", 7, 8)],
        coldrow.RowUpdate(decay=coldrow.EpochGated.for_epoch(9)),
        charge="read",
    )
    tbe = make(optimizer=AR)
    step(tbe)
    import_state(emb, tbe)
    assert emb.clock == 1
    assert_equal(list(emb.weights.values()), tbe.split_embedding_weights())
    assert_equal(
        [export_state(emb).optimizer_states[0][1]], [tbe.split_optimizer_states()[0][1].float()]
    )


BIG = 2**24


@pytest.mark.parametrize("clock", [BIG - 1, BIG, BIG + 1, BIG + 3, 2**25 + 1, 2**31 - 1])
def test_prev_iter_past_what_float32_can_count(clock):
    """FBGEMM stored float32(prev_iter), to nearest even: which may lie above the clock."""
    exact = [[0, 1, clock // 3, clock - 5, clock - 2, clock - 1, clock, clock, clock]]
    prev_iter = [torch.tensor(exact[0], dtype=torch.float32)]
    state = FbgemmState([torch.zeros(9, 4)], [[torch.zeros(9), prev_iter[0]]], clock)
    tbe = make([(9, 4)], optimizer=AR)
    import_state(tbe, state)
    mine = tbe.split_optimizer_states()[0][1]
    assert mine.dtype == torch.int32
    assert int(mine.max()) <= clock == tbe.emb.clock
    spacing = max(1, int(np.spacing(np.float32(clock))))
    for got, want, stored in zip(mine.tolist(), exact[0], prev_iter[0].tolist(), strict=True):
        assert got == min(int(stored), clock)
        assert abs(got - want) <= spacing // 2
    if clock <= BIG:
        assert mine.tolist() == exact[0]
    # There and back again: what float32 holds stays as it is.
    again = make([(9, 4)], optimizer=AR)
    import_state(again, export_state(tbe))
    twice = make([(9, 4)], optimizer=AR)
    import_state(twice, export_state(again))
    assert_equal(tensors(twice), tensors(again))
    exported = export_state(tbe).optimizer_states[0][1]
    assert torch.equal(exported, mine.float())


def test_the_next_step_after_a_clamped_one_trains():
    clock = BIG + 1  # float32(clock) is BIG, float32(clock + 2) is BIG + 4
    prev_iter = torch.tensor([float(BIG + 3)] * 4)
    assert prev_iter[0] == BIG + 4
    tbe = ones(ar_alpha=1e-3, min_shrinkage=0.0)
    import_state(tbe, FbgemmState([torch.ones(4, 4)], [[torch.zeros(4), prev_iter]], clock + 2))
    assert tbe.split_optimizer_states()[0][1].tolist() == [BIG + 3] * 4
    touch(tbe, 0)
    torch.testing.assert_close(tbe.split_embedding_weights()[0][0], torch.full((4,), 1 - 1e-3))


def changed(index, value):
    def change(state: FbgemmState) -> FbgemmState:
        state.optimizer_states[0][1][index] = value
        return state

    return change


def replaced(**fields):
    def change(state: FbgemmState) -> FbgemmState:
        values = {name: make_(state) for name, make_ in fields.items()}
        return FbgemmState(**{**vars(state), **values})

    return change


BAD_STATES = [
    (changed(0, 5.0), "^prev_iter: got 5.0 in table 'table_0', accepted: .* 4$"),
    (changed(0, -1.0), "^prev_iter: got -1.0"),
    (changed(0, NAN), "^prev_iter: got nan"),
    (changed(0, 1.5), "^prev_iter: got 1.5"),
    (replaced(iter=lambda s: -1), "^iter: got -1"),
    (replaced(iter=lambda s: 2**31), "^iter: got 2147483648"),
    (replaced(weights=lambda s: s.weights[:1]), "^weights: got 1 tables, accepted: 2"),
    (replaced(optimizer_states=lambda s: []), "^optimizer_states: got 0 tables"),
    (
        replaced(optimizer_states=lambda s: [t[:1] for t in s.optimizer_states]),
        "^optimizer_states: got 1 for table 'table_0', accepted: momentum1, prev_iter",
    ),
    (
        replaced(weights=lambda s: [w.half() for w in s.weights]),
        "weights.table_0: got torch.float16",
    ),
    (replaced(weights=lambda s: [w[:-1] for w in s.weights]), "weights.table_0: got .*8, 4"),
]


@pytest.mark.parametrize(("change", "says"), BAD_STATES)
def test_states_that_do_not_fit_change_nothing(change, says):
    source, target = make(optimizer=AR), make(optimizer=AR)
    for s in range(4):
        step(source, s)
    step(target)
    before = snapshot(target)
    state = change(export_state(source))
    with pytest.raises((ValueError, RuntimeError), match=says):
        import_state(target, state)
    assert_equal(tensors(target), before)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("iter", None, "^iter: is missing"),
        ("prev_iter_host", None, "^prev_iter_host: is missing"),
        ("momentum1_offsets", None, "^momentum1_offsets: is missing"),
        ("weights_host", torch.zeros(9), "^weights_host: got 9 numbers, accepted: 36 at least"),
        ("rows_per_table", torch.tensor([7, 9]), "^rows_per_table, D_offsets: got tables of"),
        ("rows_per_table", torch.tensor([9, 7, 7]), "^rows_per_table, D_offsets: got tables of"),
        ("prev_iter_host", torch.full((16,), 31.0), "^prev_iter: got 31.0"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(key, value, says):
    checkpoint, _ = flat_checkpoint(SIZES, [0, 1], ar_states(SIZES, 30), 30)
    if value is None:
        del checkpoint[key]
    else:
        checkpoint[key] = value
    tbe = make(SIZES, optimizer=AR)
    step(tbe)
    before = snapshot(tbe)
    with pytest.raises(ValueError, match=says):
        import_state(tbe, checkpoint)
    with pytest.raises(RuntimeError, match=says.removeprefix("^")):
        tbe.load_state_dict(checkpoint)
    assert_equal(tensors(tbe), before)


def test_checkpoints_without_a_clock():
    """FBGEMM keeps none for the Adagrads."""
    momentum1 = {"momentum1": [torch.rand(9), torch.rand(7)]}
    checkpoint, weights = flat_checkpoint(SIZES, [0, 1], momentum1, None)
    tbe = make(SIZES, **ROWWISE)
    step(tbe)
    import_state(tbe, checkpoint)
    assert tbe.iter.tolist() == [0]
    assert_equal(tensors(tbe)[:-1], [*weights, *momentum1["momentum1"]])
    assert not tbe.emb.state["table_0"]["prev_iter"].any()


def test_16_bit_momentum_is_widened():
    states = {"momentum1": [torch.rand(9, 4).half()], "momentum2": [torch.rand(9).half()]}
    checkpoint, _ = flat_checkpoint([(9, 4)], [0], states, 3)
    tbe = make([(9, 4)], optimizer=EmbOptimType.PARTIAL_ROWWISE_ADAM)
    import_state(tbe, checkpoint)
    assert_equal(
        tbe.split_optimizer_states()[0], [states[n][0].float() for n in ("momentum1", "momentum2")]
    )


def test_what_fbgemm_does_not_have_is_not_exported():
    rows = [Table("a", 4, 4)]
    by_row = coldrow.RowUpdate(coldrow.PartialRowwiseAdam(bias_correction="row"))
    with pytest.raises(ValueError, match=r"bias_correction='row', accepted: with Adam only"):
        export_state(TableBatchedEmbeddingBags(rows, by_row))
    mixed = [*rows, Table("b", 4, 4, update=coldrow.RowUpdate(coldrow.SGD()))]
    with pytest.raises(ValueError, match=r"optimizers are .*RowwiseRMSprop.*SGD"):
        export_state(TableBatchedEmbeddingBags(mixed))
    with pytest.raises(TypeError, match=r"^emb: got Linear, accepted: a coldrow"):
        export_state(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^source: got Linear, accepted: an FbgemmState"):
        import_state(make(), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^tbe: has weights and states of shapes"):
        export_state(make(optimizer=AR)).write_to(make([(9, 4)], optimizer=AR))
