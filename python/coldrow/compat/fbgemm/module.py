"""``SplitTableBatchedEmbeddingBagsCodegen`` with FBGEMM's signature, on coldrow's tables.

``docs/from-fbgemm.md`` says what each argument and method does here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coldrow import policies
from coldrow._checks import LAST_STEP, integer, number
from coldrow.compat.fbgemm import arguments
from coldrow.compat.fbgemm.definitions import (
    BoundsCheckMode,
    CacheAlgorithm,
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    CowClipDefinition,
    EmainplaceModeDefinition,
    EmbeddingLocation,
    EmbOptimType,
    EnsembleModeDefinition,
    GlobalWeightDecayDefinition,
    MultiPassPrefetchConfig,
    PoolingMode,
    RecordCacheMetrics,
    RESParams,
    SparseType,
    UserEnabledConfigDefinition,
    WeightDecayMode,
    member,
)
from coldrow.compat.fbgemm.state import checkpoint_entries, optimizer_arrays
from coldrow.nn import Table, TableBatchedEmbeddingBags


class ClampedGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped to +-``bound``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        """Return ``x``."""
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Clamp."""
        return grad.clamp(-ctx.bound, ctx.bound), None


class SplitTableBatchedEmbeddingBagsCodegen(nn.Module):
    """Embedding tables trained inside backward, by FBGEMM's constructor.

    Differs from FBGEMM in this: the clock ticks once per backward, never on a forward; ``prev_iter`` is
    int32; a bad index raises; in eval mode nothing is trained; and one training forward may be
    outstanding.

    Args:
        embedding_specs: one ``(rows, dim, EmbeddingLocation, ComputeDevice)`` per table: HOST with CPU.
        feature_table_map: the number of each feature's table; default: one feature per table.
        cache_algorithm: accepted: LRU.
        cache_load_factor: accepted: 0.2.
        cache_sets: accepted: 0.
        cache_reserved_memory: accepted: 0.0.
        cache_precision: accepted: None or ``weights_precision``.
        weights_precision: FP32, FP16 or BF16.
        output_dtype: FP32, FP16 or BF16.
        enforce_hbm: accepted: False.
        optimizer: ROWWISE_RMSPROP_AR, EXACT_ROWWISE_ADAGRAD, EXACT_ADAGRAD, EXACT_SGD, ADAM or
            PARTIAL_ROWWISE_ADAM; SGD means EXACT_SGD.
        record_cache_metrics: accepted: None or one that records nothing.
        gather_uvm_cache_stats: accepted: False.
        stochastic_rounding: 16-bit tables are rounded by ``coldrow.Stochastic(seed=0)``, else to nearest.
        gradient_clipping: clamp each element of the output's gradient to +-``max_gradient``.
        max_gradient: with ``gradient_clipping``.
        max_norm: accepted: 0.0.
        learning_rate: of the first step.
        eps: of the optimizers but SGD.
        momentum: accepted: 0.9.
        weight_decay: decoupled, on touched rows: with the Adams, and with EXACT_ROWWISE_ADAGRAD and
            ``WeightDecayMode.DECOUPLE``.
        weight_decay_mode: NONE or DECOUPLE.
        ar_alpha: of ROWWISE_RMSPROP_AR.
        ema_beta: of ROWWISE_RMSPROP_AR.
        min_shrinkage: of ROWWISE_RMSPROP_AR.
        eta: accepted: 0.001.
        beta1: of the Adams.
        beta2: of the Adams.
        ensemble_mode: accepted: None.
        emainplace_mode: accepted: None.
        counter_based_regularization: accepted: None.
        cowclip_regularization: accepted: None.
        pooling_mode: SUM, MEAN or NONE.
        device: the device of the specs, or None.
        bounds_check_mode: FATAL, WARNING or NONE: a bad index raises an IndexError in each of them.
        uvm_non_rowwise_momentum: accepted: False.
        use_experimental_tbe: accepted: False.
        prefetch_pipeline: accepted: False.
        stats_reporter_config: accepted: None.
        table_names: one per table; they name the tables in checkpoints (dots become underscores, repeated
            names are numbered).
        optimizer_state_dtypes: accepted: None or FP32 for each.
        multipass_prefetch_config: accepted: None.
        global_weight_decay: accepted: None.
        uvm_host_mapped: accepted: False.
        extra_optimizer_config: of it, ``use_rowwise_bias_correction`` with ADAM.
        tbe_input_multiplexer_config: accepted: None.
        embedding_table_index_type: torch.int32 or torch.int64; indices are taken in the dtype they have.
        embedding_table_offset_type: likewise.
        embedding_shard_info: checked against the specs; nothing depends on it.
        enable_raw_embedding_streaming: accepted: False.
        res_params: of raw embedding streaming, which is refused; nothing depends on it.
        is_qr_tbe: accepted: False.
        preallocated_host_buffers: accepted: None.
        decay: coldrow's own: another decay than the arguments above say.
        charge: coldrow's own: "read" lets the forward read each row with the decay it owes.
        on_nonfinite: coldrow's own: "skip", "raise" or "propagate" (which FBGEMM does).
        state_layout: coldrow's own: "split" (contiguous states, as FBGEMM's) or "record" (faster).

    Attributes:
        emb: the :class:`coldrow.nn.TableBatchedEmbeddingBags` that does the work.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """

    def __init__(
        self,
        embedding_specs: Sequence[tuple[int, int, EmbeddingLocation, ComputeDevice]],
        feature_table_map: list[int] | None = None,
        cache_algorithm: CacheAlgorithm = CacheAlgorithm.LRU,
        cache_load_factor: float = 0.2,
        cache_sets: int = 0,
        cache_reserved_memory: float = 0.0,
        cache_precision: SparseType | None = None,
        weights_precision: SparseType = SparseType.FP32,
        output_dtype: SparseType = SparseType.FP32,
        enforce_hbm: bool = False,
        optimizer: EmbOptimType = EmbOptimType.EXACT_SGD,
        record_cache_metrics: RecordCacheMetrics | None = None,
        gather_uvm_cache_stats: bool | None = False,
        stochastic_rounding: bool = True,
        gradient_clipping: bool = False,
        max_gradient: float = 1.0,
        max_norm: float = 0.0,
        learning_rate: float = 0.01,
        eps: float = 1.0e-8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE,
        ar_alpha: float = 0.0,
        ema_beta: float = 0.99,
        min_shrinkage: float = 0.1,
        eta: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        ensemble_mode: EnsembleModeDefinition | None = None,
        emainplace_mode: EmainplaceModeDefinition | None = None,
        counter_based_regularization: CounterBasedRegularizationDefinition | None = None,
        cowclip_regularization: CowClipDefinition | None = None,
        pooling_mode: PoolingMode = PoolingMode.SUM,
        device: str | int | torch.device | None = None,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        uvm_non_rowwise_momentum: bool = False,
        use_experimental_tbe: bool = False,
        prefetch_pipeline: bool = False,
        stats_reporter_config: Any = None,
        table_names: list[str] | None = None,
        optimizer_state_dtypes: Mapping[str, SparseType] | None = None,
        multipass_prefetch_config: MultiPassPrefetchConfig | None = None,
        global_weight_decay: GlobalWeightDecayDefinition | None = None,
        uvm_host_mapped: bool = False,
        extra_optimizer_config: UserEnabledConfigDefinition | None = None,
        tbe_input_multiplexer_config: Any = None,
        embedding_table_index_type: torch.dtype = torch.int64,
        embedding_table_offset_type: torch.dtype = torch.int64,
        embedding_shard_info: Sequence[tuple[int, int, int, int]] | None = None,
        enable_raw_embedding_streaming: bool = False,
        res_params: RESParams | None = None,
        is_qr_tbe: bool = False,
        preallocated_host_buffers: Mapping[str, Tensor] | None = None,
        *,
        decay: policies.Decay | None = None,
        charge: Literal["touch", "read"] = "touch",
        on_nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        state_layout: Literal["record", "split"] = "split",
    ) -> None:
        arguments.refuse_unsupported(locals())
        super().__init__()
        specs = arguments.parse_specs(embedding_specs)
        arguments.check_shard_info(embedding_shard_info, specs)
        arguments.check_bounds_check_mode(bounds_check_mode)
        arguments.check_cache_precision(cache_precision, weights_precision)
        arguments.check_state_dtypes(optimizer_state_dtypes)
        for name, flag in (
            ("stochastic_rounding", stochastic_rounding),
            ("gradient_clipping", gradient_clipping),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: got {flag!r}, accepted: True or False")
        if not gradient_clipping and max_gradient != 1.0:
            raise ValueError(
                f"max_gradient: got {max_gradient!r}, accepted: 1.0 without gradient_clipping"
            )
        self.max_gradient = number("max_gradient", max_gradient) if gradient_clipping else None
        self.embedding_specs = [(s.rows, s.dim, s.location, s.compute) for s in specs]
        self.feature_table_map = arguments.parse_feature_table_map(feature_table_map, len(specs))
        self.table_names = table_names
        self.embedding_shard_info = embedding_shard_info
        self.optimizer = member("optimizer", optimizer, EmbOptimType)
        self.pooling_mode = member("pooling_mode", pooling_mode, PoolingMode)
        dtype = arguments.dtype_of("weights_precision", weights_precision)
        out_dtype = arguments.dtype_of("output_dtype", output_dtype)
        self.weights_precision = SparseType.from_dtype(dtype)
        self.output_dtype = SparseType.from_dtype(out_dtype).as_int()
        self.stochastic_rounding = stochastic_rounding
        self.dims = [spec.dim for spec in specs]
        self.max_D = max(self.dims)
        self.total_D = sum(self.dims[t] for t in self.feature_table_map)
        self.use_rowwise_bias_correction = arguments.rowwise_bias_correction(
            extra_optimizer_config, self.optimizer
        )
        self._settings = arguments.Settings(
            optimizer=self.optimizer,
            learning_rate=learning_rate,
            eps=eps,
            weight_decay=weight_decay,
            weight_decay_mode=member("weight_decay_mode", weight_decay_mode, WeightDecayMode),
            ar_alpha=ar_alpha,
            ema_beta=ema_beta,
            min_shrinkage=min_shrinkage,
            beta1=beta1,
            beta2=beta2,
            bias_by_row=self.use_rowwise_bias_correction,
            stochastic=stochastic_rounding and dtype != torch.float32,
            decay=decay,
        )
        update = self._settings.row_update()
        names = arguments.parse_table_names(table_names, len(specs))
        on_cpu = specs[0].compute is ComputeDevice.CPU
        if device is None:
            device = "cpu" if on_cpu else "cuda"
        try:
            self.current_device = torch.device(device)
        except (RuntimeError, TypeError):
            raise TypeError(f"device: got {device!r}, accepted: None or a torch device") from None
        if (self.current_device.type == "cpu") != on_cpu:
            raise ValueError(
                f"device: got {str(self.current_device)!r}, accepted: where embedding_specs say, "
                f"{specs[0].compute.name}"
            )
        # FBGEMM's features come in the order of the map, coldrow's table by table unless told otherwise.
        features = [f"feature_{feature}" for feature in range(len(self.feature_table_map))]
        of_table: list[list[str]] = [[] for _ in specs]
        for feature, table in zip(features, self.feature_table_map, strict=True):
            of_table[table].append(feature)
        self.emb = TableBatchedEmbeddingBags(
            [
                Table(name, spec.rows, spec.dim, dtype, looked_up, nn.init.zeros_)
                for name, spec, looked_up in zip(names, specs, of_table, strict=True)
            ],
            update,
            feature_order=features,
            pooling=self.pooling_mode.name.lower(),  # type: ignore[arg-type]
            charge=charge,
            device=self.current_device,
            output_dtype=out_dtype,
            on_nonfinite=on_nonfinite,
            state_layout=state_layout,
        )

    # ------------------------------------------------------------------------------------ forward

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: Sequence[Sequence[int]] | None = None,
        total_unique_indices: int | None = None,
        hash_zch_identities: Tensor | None = None,
        hash_zch_runtime_meta: Tensor | None = None,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Any:
        """Look up a batch.

        Args:
            indices: int32 or int64 ``[N]``, features one after another.
            offsets: int32 or int64 ``[features * B + 1]``.
            per_sample_weights: float ``[N]``, with ``PoolingMode.SUM``.
            feature_requires_grad: ``[features]``: where it is 0, the feature's ``per_sample_weights`` get
                a gradient of 0.
            batch_size_per_feature_per_rank: ``[features][ranks]`` bags, where they differ by feature.
            total_unique_indices: accepted: None.
            hash_zch_identities: accepted: None.
            hash_zch_runtime_meta: accepted: None.
            vbe_output: accepted: None.
            vbe_output_offsets: accepted: None.

        Returns:
            ``[B, sum of D over features]``; with ``PoolingMode.NONE`` ``[N, D]`` (one such tensor per
            feature where the tables differ in D); with ``batch_size_per_feature_per_rank`` flat, rank
            after rank, in each feature after feature.

        Raises:
            IndexError: an index outside its table, whatever ``bounds_check_mode`` says.
            TypeError, ValueError, RuntimeError: as for :class:`coldrow.nn.TableBatchedEmbeddingBags`.
        """
        arguments.refuse_unsupported_inputs(
            total_unique_indices=total_unique_indices,
            hash_zch_identities=hash_zch_identities,
            hash_zch_runtime_meta=hash_zch_runtime_meta,
            vbe_output=vbe_output,
            vbe_output_offsets=vbe_output_offsets,
        )
        for name, given in (("indices", indices), ("offsets", offsets)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: got {type(given).__name__}, accepted: a torch tensor")
        if indices.dtype != offsets.dtype and {indices.dtype, offsets.dtype} == {
            torch.int32,
            torch.int64,
        }:
            # The wider of the two: a narrowed bad index could pass for a good one.
            indices, offsets = indices.long(), offsets.long()
        sizes = None
        if batch_size_per_feature_per_rank is not None:
            sizes = self._batch_sizes(batch_size_per_feature_per_rank, offsets)
        if feature_requires_grad is not None:
            per_sample_weights = self._partly_detached(
                per_sample_weights, feature_requires_grad, offsets, sizes
            )
        out = self.emb(
            indices, offsets, per_sample_weights, None if sizes is None else [sum(b) for b in sizes]
        )
        if sizes is not None and len(sizes[0]) > 1:
            out = self._rank_after_rank(out, sizes)
        if self.max_gradient is None:
            return out
        if isinstance(out, list):
            return [ClampedGradient.apply(part, self.max_gradient) for part in out]
        return ClampedGradient.apply(out, self.max_gradient)

    def _batch_sizes(self, given: Any, offsets: Tensor) -> list[list[int]]:
        """Return bags by feature and rank, checked."""
        name = "batch_size_per_feature_per_rank"
        features, bags = len(self.feature_table_map), offsets.numel() - 1
        error = (
            f"{name}: got {given!r}, accepted: for each of the {features} features as many numbers as "
            f"there are ranks, adding up to len(offsets) - 1 = {bags}"
        )
        if self.pooling_mode is PoolingMode.NONE:
            raise ValueError(f"{name}: is given, accepted: None with PoolingMode.NONE")
        try:
            sizes = [[integer(name, b, 0, LAST_STEP) for b in feature] for feature in given]
        except TypeError:
            raise TypeError(error) from None
        if len(sizes) != features or len({len(feature) for feature in sizes}) != 1 or not sizes[0]:
            raise ValueError(error)
        if sum(map(sum, sizes)) != bags:
            raise ValueError(error)
        return sizes

    def _rank_after_rank(self, out: Tensor, sizes: list[list[int]]) -> Tensor:
        """Reorder a flat output: by rank first, then by feature."""
        ranks = len(sizes[0])
        lengths = [
            b * d for feature, d in zip(sizes, self._feature_dims(), strict=True) for b in feature
        ]
        parts = out.split(lengths)
        return torch.cat([part for rank in range(ranks) for part in parts[rank::ranks]])

    def _feature_dims(self) -> list[int]:
        return [self.dims[t] for t in self.feature_table_map]

    def _partly_detached(
        self,
        weights: Tensor | None,
        feature_requires_grad: Any,
        offsets: Tensor,
        sizes: list[list[int]] | None,
    ) -> Tensor | None:
        """Return per_sample_weights that get a gradient in the features that ask for one."""
        features = len(self.feature_table_map)
        if not isinstance(feature_requires_grad, Tensor) or list(feature_requires_grad.shape) != [
            features
        ]:
            raise ValueError(
                f"feature_requires_grad: got {feature_requires_grad!r}, accepted: a tensor [{features}]"
            )
        if weights is None or not weights.requires_grad:
            return weights
        bags = [(offsets.numel() - 1) // features] * features
        if sizes is not None:
            bags = [sum(feature) for feature in sizes]
        ends = torch.tensor([0, *bags]).cumsum(0).to(offsets.device)
        counts = offsets[ends].long().diff().clamp(min=0)
        asked = (feature_requires_grad.to(offsets.device) != 0).repeat_interleave(counts)
        if asked.numel() != weights.numel():
            return weights  # bad offsets, which the lookup refuses
        return torch.where(asked, weights, weights.detach())

    # --------------------------------------------------------------------------- weights and state

    def split_embedding_weights(self) -> list[Tensor]:
        """Return the tables, live and writable, ``[rows, dim]`` each."""
        return [weight.detach() for weight in self.emb.table_batch.weights]

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """Return the state of each table, live and writable, in FBGEMM's order.

        ROWWISE_RMSPROP_AR: momentum1 float32 ``[rows]``, prev_iter **int32** ``[rows]`` (FBGEMM: float32).
        The Adagrads: momentum1. The Adams: momentum1, momentum2 and, with rowwise bias correction, the
        count of touches. EXACT_SGD: an empty list.
        """
        if not self._state_keys():
            return []
        return [
            [state[name] for name, _ in self._state_keys()] for state in self.emb.state.values()
        ]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Return the state of each table by the names torch's optimizers use.

        As :meth:`split_optimizer_states`: ``sum``, ``prev_iter`` (int32) and ``iter`` for
        ROWWISE_RMSPROP_AR, ``sum`` for the Adagrads, ``exp_avg``, ``exp_avg_sq`` (and ``row_counter``) for
        the Adams.
        """
        keys = [key for _, key in self._state_keys()]
        named = [dict(zip(keys, s, strict=True)) for s in self.split_optimizer_states()]
        if self.optimizer is EmbOptimType.ROWWISE_RMSPROP_AR:
            for state in named:
                state["iter"] = self.iter
        return named

    def _state_keys(self) -> tuple[tuple[str, str], ...]:
        return optimizer_arrays(self.emb)

    @property
    def iter(self) -> Tensor:
        """The clock, live, int64 ``[1]``: backwards done so far (FBGEMM's counts forwards)."""
        return self.emb.table_batch.counters.clock.view(1)

    def init_embedding_weights_uniform(self, min_val: float, max_val: float) -> None:
        """Fill all tables with uniform random numbers."""
        for weight in self.split_embedding_weights():
            weight.uniform_(min_val, max_val)

    def flush(self) -> None:
        """Do nothing: there is no cache."""

    def reset_cache_states(self) -> None:
        """Do nothing: there is no cache."""

    # ---------------------------------------------------------------------------- hyper-parameters

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        self.emb.lr = lr

    def get_learning_rate(self) -> float:
        """Return the learning rate, as it was set (FBGEMM: rounded to float32)."""
        return self.emb.lr

    def set_optimizer_step(self, step: int) -> None:
        """Set the clock: ``step`` steps have been done.

        Raises:
            ValueError: a row was touched after that step.
        """
        self.emb.set_clock(step)

    def update_hyper_parameters(self, params_dict: Mapping[str, float]) -> None:
        """Set hyper-parameters by name, all or none of them, from the next step on.

        Args:
            params_dict: ``lr``, and of ``eps``, ``beta1``, ``beta2``, ``weight_decay`` those that the
                optimizer reads.

        Raises:
            ValueError: another name.
            TypeError, ValueError: a value that the constructor would refuse.
        """
        names = {"lr": "learning_rate", "eps": "eps", "beta1": "beta1", "beta2": "beta2"}
        names["weight_decay"] = "weight_decay"
        for name in params_dict:
            if name not in names:
                raise ValueError(f"params_dict: got {name!r}, accepted: {', '.join(names)}")
        changes: dict[str, Any] = {names[name]: value for name, value in params_dict.items()}
        settings = replace(self._settings, **changes)
        update = settings.row_update()
        if "lr" in params_dict:
            self.set_learning_rate(update.optimizer.lr)
        # The update's own lr is the initial one.
        self._settings = replace(settings, learning_rate=self._settings.learning_rate)
        self.emb.update = self._settings.row_update()

    # --------------------------------------------------------------------------------- checkpoints

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a checkpoint of this class, or one of FBGEMM's (see :func:`import_state`)."""
        if prefix + "weights_placements" in state_dict:
            own = {
                key: state_dict.pop(key)
                for key in list(state_dict)
                if key.startswith(prefix) and not key.startswith(prefix + "emb.")
            }
            try:
                entries = checkpoint_entries(self.emb, own, prefix)
            except (TypeError, ValueError) as error:
                (*_, error_msgs) = args
                error_msgs.append(f"{prefix}{error}")
                entries = self.emb.state_dict()
            state_dict.update({f"{prefix}emb.{key}": value for key, value in entries.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
