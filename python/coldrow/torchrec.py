"""coldrow as the fused kernel of TorchRec's sharded embedding collections.

TorchRec shards, moves and checkpoints; coldrow looks up and trains the rows of each shard::

    from coldrow.torchrec import EmbeddingBagCollectionSharder, fused_params

    sharder = EmbeddingBagCollectionSharder(fused_params(coldrow.RowUpdate(...), charge="read"))
    plan = construct_module_sharding_plan(
        ebc, {"user": row_wise(compute_kernel="fused")}, sharder=sharder)
    model = DistributedModelParallel(model, plan=ShardingPlan({"ebc": plan}), sharders=[sharder], ...)

Tables whose compute kernel is ``fused`` are coldrow's: row-wise, table-wise, column-wise,
table-row-wise. Data-parallel tables stay TorchRec's own (dense gradients, your dense optimizer).

TorchRec is not a dependency: docs/distributed.md says how to install what this module imports.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.table import Origin, Table
from coldrow.policies import (
    Decay,
    LinearClipped,
    Nearest,
    NoDecay,
    RowUpdate,
    RowwiseRMSprop,
    Stochastic,
)

try:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        ComputeDevice,
        EmbeddingLocation,
        PoolingMode,
    )
    from torchrec.distributed import batched_embedding_kernel as kernels
    from torchrec.distributed import embedding, embedding_lookup, embeddingbag
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.types import ShardingType
    from torchrec.modules.embedding_configs import data_type_to_dtype
except ImportError as error:
    raise ImportError(
        "coldrow.torchrec needs torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0 beside torch 2.13; "
        "docs/distributed.md says how to install them without their pulling in another torch"
    ) from error

__all__ = [
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollectionSharder",
    "checkpoint_state",
    "fused_params",
]

_KNOBS = ("learning_rate", "eps", "ema_beta", "ar_alpha", "min_shrinkage")
_ACCEPTED = (
    "coldrow",
    "update",
    "charge",
    "on_nonfinite",
    "output_dtype",
    "stochastic_rounding",
    "seed",
    *_KNOBS,
)
# What TorchRec adds by itself, for caches and devices that coldrow has not.
_OF_TORCHREC = (
    "cache_precision",
    "cache_load_factor",
    "enforce_hbm",
    "bounds_check_mode",
    "enable_raw_embedding_streaming",
    "embedding_table_index_type",
    "embedding_table_offset_type",
)


def fused_params(update: RowUpdate, **options: Any) -> dict[str, Any]:
    """Return ``fused_params`` for a sharder: ``{"coldrow": True, "update": update, ...}``.

    Args:
        update: what a touch does. In a dict of your own, ``learning_rate``, ``eps``, ``ema_beta``,
            ``ar_alpha`` and ``min_shrinkage`` in its place spell out row-wise RMSprop with adaptive
            regularization, and ``stochastic_rounding`` with ``seed`` its rounding.
        **options: ``charge``, ``on_nonfinite``: as for TableBatchedEmbeddingBags; ``output_dtype``: a
            TorchRec DataType.
    """
    params = {"coldrow": True, "update": update, **options}
    _update_of(params)
    return params


def checkpoint_state(model: Any) -> dict[str, Any]:
    """Return all that torch.distributed.checkpoint is to save of a model, or to load into it.

    Tables and clocks under the keys of ``model.state_dict()``, state of rows under ``optim.<table>.<name>``.
    They share memory with the model, so ``dcp.load`` of it is all that resuming takes, on any number of
    ranks and with any plan that keeps whole rows. Learning rates are not in it: set them as at the start.

    Args:
        model: a DistributedModelParallel.
    """
    # Flat: a rank without tables would save an empty dict in place of the others' state.
    states = model.fused_optimizer.state_dict()["state"].values()
    return {**model.state_dict(), **{f"optim.{k}": v for s in states for k, v in s.items()}}


def _update_of(params: dict[str, Any]) -> RowUpdate:
    """Return the update that ``fused_params`` describe, or raise for what is not accepted."""
    for name in params:
        if name not in (*_ACCEPTED, *_OF_TORCHREC):
            raise ValueError(
                f"fused_params: got {name!r} beside 'coldrow', accepted: {', '.join(_ACCEPTED)}"
            )
    update = params.get("update")
    knobs = [name for name in (*_KNOBS, "stochastic_rounding", "seed") if name in params]
    if update is None:
        optimizer = RowwiseRMSprop(
            lr=params.get("learning_rate", 0.01),
            eps=params.get("eps", 1e-8),
            ema_beta=params.get("ema_beta", 0.99),
        )
        decay: Decay = NoDecay()
        if params.get("ar_alpha", 0.0) != 0.0:
            decay = LinearClipped(params["ar_alpha"], params.get("min_shrinkage", 0.1))
        stochastic = params.get("stochastic_rounding", False)
        rounding = Stochastic(params.get("seed", 0)) if stochastic else Nearest()
        return RowUpdate(optimizer, decay, rounding)
    if not isinstance(update, RowUpdate):
        raise TypeError(f"fused_params: update: got {update!r}, accepted: a coldrow.RowUpdate")
    if knobs:
        raise ValueError(f"fused_params: got {knobs} beside 'update', accepted: one of the two")
    return update


class _Shards(TableBatchedEmbeddingBags):
    """The shards of one group of tables on this rank."""

    devices = ("cpu",)


class _Kernel(nn.Module):
    """What TorchRec calls on FBGEMM's table-batched embeddings, by the same names."""

    def __init__(self, owner: Any, config: Any, pooling: str) -> None:
        super().__init__()
        params = dict(config.fused_params or {})
        update = _update_of(params)
        tables = config.embedding_tables
        rows, cols = owner._local_rows, owner._local_cols
        for table in tables:
            shards = table.global_metadata.shards_metadata
            if len(shards) > 1 and any(s.shard_sizes[0] == 1 for s in shards):
                # TorchRec takes state of one element for state of the whole table.
                raise ValueError(
                    f"table {table.name!r}: {table.num_embeddings} rows make a shard of one row, "
                    "accepted: shards of two rows or more, or none (change num_embeddings, or "
                    "shard it table-wise)"
                )
        output = params.get("output_dtype", SparseType.FP32)
        # TorchRec describes tables as slices of one array.
        sizes = [n * d for n, d in zip(rows, cols, strict=True)]
        starts = list(itertools.accumulate(sizes, initial=0))[:-1]
        dtype = data_type_to_dtype(config.data_type)
        self.weights_host = torch.zeros(sum(sizes), dtype=dtype)
        self._rows = list(rows)
        self._weights = [
            self.weights_host[start : start + n * d].view(n, d)
            for n, d, start in zip(rows, cols, starts, strict=True)
        ]
        self.emb = _Shards(
            [
                Table(
                    str(i),
                    max(n, 1),
                    d,
                    dtype=dtype,
                    features=[f"{i} {f}" for f in t.feature_names],
                    init=nn.init.zeros_,  # TorchRec initialises
                    storage=view if n > 0 else None,
                    origin=Origin(t.name, owner._row_offset[i], owner._col_offset[i]),
                )
                for i, (t, n, d, view) in enumerate(
                    zip(tables, rows, cols, self._weights, strict=True)
                )
            ],
            update,
            pooling=pooling,  # type: ignore[arg-type]
            charge=params.get("charge", "touch"),
            on_nonfinite=params.get("on_nonfinite", "skip"),
            output_dtype=output.as_dtype(),
            state_layout="split",
        )
        self.weights_physical_offsets = starts
        self.weights_precision = SparseType.from_dtype(self.weights_host.dtype)
        self.embedding_specs = [
            (n, d, EmbeddingLocation.HOST.value, ComputeDevice.CPU)
            for n, d in zip(rows, cols, strict=True)
        ]

    def begin(self, clock: Tensor, epoch_start: Tensor) -> None:
        """Take the module's clock before a forward."""
        self.emb.follow_clock(clock, epoch_start)

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Look up; backward updates."""
        out = self.emb(indices, offsets, per_sample_weights)
        if isinstance(out, list):
            out = torch.cat([part.reshape(-1) for part in out])
        result: Tensor = out
        return result

    def split_embedding_weights(self) -> list[Tensor]:
        """Tables, ``[rows, columns]`` of each shard, live."""
        return self._weights

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """State by table, live. (TorchRec calls the first of it momentum1, whatever its name.)"""
        return [
            {name: views[name][:n] for name in sorted(views, key=lambda s: (s == "prev_iter", s))}
            for views, n in zip(self.emb.state.values(), self._rows, strict=True)
        ]

    def get_learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self.emb.lr

    def set_learning_rate(self, lr: float) -> None:
        """Set it, for all tables of the group."""
        self.emb.lr = float(lr)

    def set_optimizer_step(self, step: int) -> None:
        """Refuse: the clock is the sharded module's."""
        raise NotImplementedError("set_optimizer_step: accepted: load the module's 'clock' instead")

    def update_hyper_parameters(self, params: dict[str, Any]) -> None:
        """Set ``lr``; refuse what cannot change while training."""
        if set(params) != {"lr"}:
            raise ValueError(f"update_hyper_parameters: got {sorted(params)}, accepted: 'lr'")
        self.set_learning_rate(params["lr"])

    def flush(self) -> None:
        """Do nothing: there is no cache."""

    def reset_cache_states(self) -> None:
        """Do nothing: there is no cache."""


class _FusedBags(kernels.BatchedFusedEmbeddingBag):
    def __init__(self, config: Any, pg: Any, device: Any, sharding_type: Any) -> None:
        kernels.BaseBatchedEmbeddingBag.__init__(self, config, pg, device, sharding_type)
        pooling = "mean" if self._pooling == PoolingMode.MEAN else "sum"
        self._emb_module = _Kernel(self, config, pooling)
        self._optim = kernels.EmbeddingFusedOptimizer(config, self._emb_module, pg)
        self.init_parameters()


class _FusedRows(kernels.BatchedFusedEmbedding):
    def __init__(self, config: Any, pg: Any, device: Any) -> None:
        kernels.BaseBatchedEmbedding.__init__(self, config, pg, device)
        self._emb_module = _Kernel(self, config, "none")
        self._optim = kernels.EmbeddingFusedOptimizer(config, self._emb_module, pg)
        self.init_parameters()


class _Tick(torch.autograd.Function):
    """The identity; its backward advances the clock, also on ranks that have no tables."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, clock: Tensor, step: int) -> Tensor:
        """Return the output as it is."""
        ctx.clock, ctx.step = clock, step
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Set the clock to this forward's step: the same for all lookups of a module."""
        ctx.clock.fill_(max(int(ctx.clock), ctx.step))
        return grad, None, None


class _Clocked:
    """A lookup that takes its clock from the sharded module."""

    clock: Tensor
    epoch_start: Tensor

    def forward(self, sparse_features: Any) -> Tensor:
        """Look up with the module's clock."""
        if sparse_features.variable_stride_per_key():
            raise NotImplementedError("variable batch sizes: accepted: one batch size per step")
        for kernel in self._emb_modules:  # type: ignore[attr-defined]
            if isinstance(kernel, (_FusedBags, _FusedRows)):
                kernel._emb_module.begin(self.clock, self.epoch_start)
        out: Tensor = super().forward(sparse_features)  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            out = _Tick.apply(out, self.clock, int(self.clock) + 1)
        return out


def _is_ours(config: Any) -> bool:
    ours = bool((config.fused_params or {}).get("coldrow"))
    return ours and config.compute_kernel == EmbeddingComputeKernel.FUSED


class _BagsLookup(_Clocked, embedding_lookup.GroupedPooledEmbeddingsLookup):
    def _create_embedding_kernel(
        self, config: Any, device: Any, pg: Any, sharding_type: Any, env: Any
    ) -> Any:
        if _is_ours(config):
            return _FusedBags(config, pg, device, sharding_type)
        return super()._create_embedding_kernel(config, device, pg, sharding_type, env)


class _RowsLookup(_Clocked, embedding_lookup.GroupedEmbeddingsLookup):
    def _create_embedding_kernel(self, config: Any, pg: Any, device: Any, env: Any) -> Any:
        if _is_ours(config):
            return _FusedRows(config, pg, device)
        return super()._create_embedding_kernel(config, pg, device, env)


class _Sharded:
    """A sharded collection that owns the clock of its tables.

    ``clock`` and ``epoch_start`` are buffers, the same on all ranks, saved with the module.
    """

    clock: Tensor
    epoch_start: Tensor
    _built = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built = True

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as TorchRec's module does; while it is built, from a module that has no clock."""
        if not self._built:
            state_dict = {**state_dict, "clock": self.clock, "epoch_start": self.epoch_start}
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def _shardings_by_type(self) -> dict[str, Any]:
        raise NotImplementedError

    def _make_lookup(self, sharding_type: str, sharding: Any) -> Any:
        raise NotImplementedError

    def _create_lookups(self) -> None:
        for name in ("clock", "epoch_start"):
            if name not in self._buffers:  # type: ignore[attr-defined]
                self.register_buffer(name, torch.zeros((), dtype=torch.int64))  # type: ignore[attr-defined]
        for sharding_type, sharding in self._shardings_by_type().items():
            if sharding_type == ShardingType.DATA_PARALLEL.value:
                self._lookups.append(sharding.create_lookup())  # type: ignore[attr-defined]
                continue
            lookup = self._make_lookup(sharding_type, sharding)
            lookup.clock, lookup.epoch_start = self.clock, self.epoch_start
            self._lookups.append(lookup)  # type: ignore[attr-defined]

    def new_epoch(self) -> None:
        """Declare that the next step begins an epoch; on every rank."""
        self.epoch_start.copy_(self.clock + 1)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the lookups too, which TorchRec keeps out of the module tree."""
        super().train(mode)  # type: ignore[misc]
        for lookup in getattr(self, "_lookups", []):
            lookup.train(mode)
        return self


def _configs(sharding: Any) -> Any:
    """This rank's groups of tables."""
    by_rank = getattr(sharding, "_grouped_embedding_configs_per_rank", None)
    if by_rank is not None and hasattr(sharding, "_rank"):
        return by_rank[sharding._rank]
    return sharding._grouped_embedding_configs


class ShardedEmbeddingBagCollection(_Sharded, embeddingbag.ShardedEmbeddingBagCollection):
    """TorchRec's, with coldrow's kernels."""

    def _shardings_by_type(self) -> dict[str, Any]:
        return dict(zip(self._sharding_types, self._embedding_shardings, strict=True))

    def _make_lookup(self, sharding_type: str, sharding: Any) -> Any:
        return _BagsLookup(
            grouped_configs=_configs(sharding),
            device=sharding._device,
            pg=sharding._pg,
            sharding_type=ShardingType(sharding_type),
            env=sharding._env,
        )


class ShardedEmbeddingCollection(_Sharded, embedding.ShardedEmbeddingCollection):
    """TorchRec's, with coldrow's kernels."""

    def _shardings_by_type(self) -> dict[str, Any]:
        return dict(self._sharding_type_to_sharding)

    def _make_lookup(self, sharding_type: str, sharding: Any) -> Any:
        return _RowsLookup(
            grouped_configs=_configs(sharding),
            pg=sharding._pg,
            device=sharding._device,
            env=sharding._env,
        )


def _check(params: dict[str, Any], fused: dict[str, Any] | None) -> None:
    """Refuse a plan whose tables would quietly be trained by something else."""
    if not (fused or {}).get("coldrow"):
        raise ValueError("fused_params: accepted: {'coldrow': True, ...}, see coldrow.torchrec")
    _update_of(dict(fused or {}))
    for table, sharding in params.items():
        dense = sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value
        if dense and sharding.sharding_type != ShardingType.DATA_PARALLEL.value:
            raise ValueError(
                f"table {table!r}: compute_kernel: got 'dense', accepted: 'fused' (on CPU TorchRec's "
                "plan helpers choose dense unless given compute_kernel='fused')"
            )


class EmbeddingBagCollectionSharder(embeddingbag.EmbeddingBagCollectionSharder):
    """TorchRec's sharder of EmbeddingBagCollection, with coldrow's kernels.

    Args:
        fused_params: see :func:`fused_params`; the rest as TorchRec's.
    """

    def shard(
        self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None
    ) -> ShardedEmbeddingBagCollection:
        """Return the sharded module; called by DistributedModelParallel."""
        _check(params, self.fused_params)
        return ShardedEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        """The type that :meth:`shard` returns."""
        return ShardedEmbeddingBagCollection


class EmbeddingCollectionSharder(embedding.EmbeddingCollectionSharder):
    """TorchRec's sharder of EmbeddingCollection, with coldrow's kernels.

    Args:
        fused_params: see :func:`fused_params`; the rest as TorchRec's.
    """

    def shard(
        self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None
    ) -> ShardedEmbeddingCollection:
        """Return the sharded module; called by DistributedModelParallel."""
        _check(params, self.fused_params)
        return ShardedEmbeddingCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingCollection]:
        """The type that :meth:`shard` returns."""
        return ShardedEmbeddingCollection
