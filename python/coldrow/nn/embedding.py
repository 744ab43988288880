"""``Embedding`` and ``EmbeddingBag`` with the constructors and forwards of torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coldrow._checks import MAX_DIM, MAX_ELEMENTS, integer, one_of, require_dense
from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.ops import is_traced
from coldrow.nn.table import Table
from coldrow.policies import RowUpdate


class _OneTable(nn.Module):
    """One table, in ``table``, behind a forward like torch's."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        pooling: str,
        *,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        weight: Tensor | None,
        freeze: bool,
        device: Any,
        dtype: torch.dtype | None,
        update: RowUpdate | None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, given, accepted in (
            ("max_norm", max_norm, None),
            ("norm_type", norm_type, 2.0),
            ("scale_grad_by_freq", scale_grad_by_freq, False),
        ):
            plain = isinstance(given, (bool, int, float))  # an array would compare elements
            if given is not accepted and not (plain and given == accepted):
                raise ValueError(f"{name}: got {given!r}, accepted: {accepted!r}")
        embedding_dim = integer("embedding_dim", embedding_dim, 1, MAX_DIM)
        most = MAX_ELEMENTS // embedding_dim
        num_embeddings = integer("num_embeddings", num_embeddings, 1, most)
        if padding_idx is not None:
            low, high = -num_embeddings, num_embeddings - 1
            padding_idx = integer("padding_idx", padding_idx, low, high) % num_embeddings
        shape = (num_embeddings, embedding_dim)
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"_weight: got {type(weight).__name__}, accepted: a tensor")
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(f"_weight: got {list(weight.shape)}, accepted: {list(shape)}")
        if dtype is None:
            dtype = torch.get_default_dtype() if weight is None else weight.dtype
        if device is None:
            device = torch.get_default_device() if weight is None else weight.device
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        self.freeze = freeze
        self.table = TableBatchedEmbeddingBags(
            [Table("weight", *shape, dtype=dtype, init=nn.init.normal_)],
            update,
            pooling=pooling,  # type: ignore[arg-type]
            device=device,
            output_dtype=dtype,
            **{"state_layout": "split", **options},  # what any tool can save as it is
        )
        with torch.no_grad():
            if weight is not None:
                self.weight.copy_(weight)
            elif padding_idx is not None:
                self.weight[padding_idx].zero_()

    @property
    def weight(self) -> nn.Parameter:
        """The table, ``[num_embeddings, embedding_dim]``, live and writable."""
        return self.table.weights["weight"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter):  # also: emb.weight += 1
            self.table.weights.replace("weight", value)
        else:
            super().__setattr__(name, value)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Live views of the optimizer state, by name."""
        return self.table.state["weight"]  # type: ignore[return-value]

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.table.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.table.lr = value

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What torch's learning-rate schedulers take; see :class:`TableBatchedEmbeddingBags`."""
        return self.table.optimizer

    @property
    def clock(self) -> int:
        """Optimizer steps done so far. Assignable to any value from there on."""
        return self.table.clock

    @clock.setter
    def clock(self, value: int) -> None:
        self.table.clock = value

    def new_epoch(self) -> None:
        """Declare that the next step begins an epoch."""
        self.table.new_epoch()

    def step(self) -> None:
        """Apply gradients that backwards left (``fused=False``)."""
        self.table.step()

    def _without_padding(
        self, indices: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Leave out what refers to ``padding_idx``, so that it is neither read nor trained."""
        if self.padding_idx is None:
            return indices, offsets, weights
        if not is_traced():  # (what is left is checked by the kernels, in numbers of its own)
            self._require_batch(indices, offsets)
        kept = indices != self.padding_idx
        before = torch.cat(
            [kept.new_zeros(1, dtype=offsets.dtype), kept.cumsum(0).to(offsets.dtype)]
        )
        return indices[kept], before[offsets], None if weights is None else weights[kept]

    def _require_batch(self, indices: Tensor, offsets: Tensor) -> None:
        """Raise for indices and offsets that are not accepted, in the caller's numbers."""
        count = indices.numel()
        if int(offsets[0]) != 0:
            raise ValueError(f"offsets: starts with {int(offsets[0])}, accepted: 0")
        falls = offsets.diff() < 0
        if bool(falls.any()):
            at = int(falls.nonzero()[0]) + 1
            raise ValueError(
                f"offsets: falls to {int(offsets[at])} at position {at}, accepted: offsets that never "
                "decrease"
            )
        if int(offsets[-1]) != count:
            raise ValueError(
                f"offsets: ends with {int(offsets[-1])}, accepted: the number of indices, {count}"
            )
        outside = (indices < 0) | (indices >= self.num_embeddings)
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            raise IndexError(
                f"indices: got {int(indices[at])} at position {at} of table 'weight', accepted: 0 to "
                f"{self.num_embeddings - 1}"
            )

    def _integers(self, name: str, value: Any) -> None:
        """Refuse what is no array of row numbers where the table lies."""
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise TypeError(f"{name}: got {got}, accepted: an int32 or int64 tensor")
        require_dense(name, value)
        if value.dtype not in (torch.int32, torch.int64):
            dtype = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: got dtype {dtype}, accepted: int32, int64")
        if value.device != self.weight.device:
            raise ValueError(f"{name}: is on {value.device}, accepted: {self.weight.device}")

    def _look_up(self, *batch: Any) -> Tensor:
        if self.freeze:
            with torch.no_grad():
                return self.table(*batch)  # type: ignore[no-any-return]
        return self.table(*batch)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Takes what torch's own module saved too: ``weight`` alone. State then stays as it is.
        if prefix + "weight" in state_dict and prefix + "table.weights.weight" not in state_dict:
            own = self.table.state_dict(prefix=prefix + "table.")
            own[prefix + "table.weights.weight"] = state_dict.pop(prefix + "weight")
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Describe the shape."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class EmbeddingBag(_OneTable):
    """``torch.nn.EmbeddingBag`` whose rows are trained by a :class:`coldrow.RowUpdate`.

    Constructor and forward are torch's. With ``fused=True`` backward updates the rows it reaches and no
    optimizer is needed: take care to pass the learning rate with ``update``. With ``fused=False`` sparse
    gradients wait for :meth:`step` or :class:`coldrow.optim.SparseOptimizer`, whatever ``sparse`` says.
    The clock, learning rate and state belong to :attr:`table`, a :class:`TableBatchedEmbeddingBags`.

    Args:
        num_embeddings: rows, E >= 1.
        embedding_dim: columns, D >= 1.
        max_norm: None; others are refused.
        norm_type: 2.0; others are refused.
        scale_grad_by_freq: False; True is refused.
        mode: "sum" or "mean"; "max" is refused.
        sparse: either; gradients are never dense.
        _weight: initial values ``[E, D]``, copied; default normal.
        include_last_offset: ``offsets`` has one entry more, the number of indices.
        padding_idx: a row that is left out of every bag and never trained.
        device: where the table lives; default that of ``_weight``, or torch's default device.
        dtype: float32, float16 or bfloat16, of the table and of what is returned.
        update: what a touch does; default ``RowUpdate()``.
        charge: "touch" or "read", when decay is charged.
        **options: other options of :class:`TableBatchedEmbeddingBags`, e.g. ``fused=False``.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        update: RowUpdate | None = None,
        charge: str = "touch",
        **options: Any,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            one_of("mode", mode, ("sum", "mean")),
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            weight=_weight,
            freeze=options.pop("_freeze", False),
            device=device,
            dtype=dtype,
            update=update,
            charge=charge,
            **options,
        )
        self.include_last_offset = include_last_offset

    @property
    def mode(self) -> str:
        """How the rows of a bag become one: "sum" or "mean"; assignable."""
        return self.table.pooling

    @mode.setter
    def mode(self, value: str) -> None:
        self.table.pooling = one_of("mode", value, ("sum", "mean"))

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, **options: Any
    ) -> EmbeddingBag:
        """Return a module with a copy of ``embeddings`` ``[E, D]``; with ``freeze`` it never trains."""
        rows, dim = _pretrained(embeddings)
        return cls(rows, dim, _weight=embeddings, _freeze=freeze, **options)

    def forward(
        self,
        input: Tensor,  # torch's own name for it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up bags.

        Args:
            input: int32 or int64 ``[B, N]``: B bags of N rows; or ``[N]`` with ``offsets``.
            offsets: ``[B]``, where each bag begins in ``input``, or ``[B + 1]`` with
                ``include_last_offset``.
            per_sample_weights: float, shape of ``input``; with mode "sum" only; differentiable.

        Returns:
            ``[B, D]``; empty bags give zeros.

        Raises:
            IndexError: an index outside the table.
            TypeError, ValueError: other bad input.
        """
        self._integers("input", input)
        if offsets is not None:
            self._integers("offsets", offsets)
        if per_sample_weights is not None:
            given = per_sample_weights
            if not isinstance(given, Tensor) or not given.is_floating_point():
                raise TypeError(
                    f"per_sample_weights: got {given!r}, accepted: a dense float tensor"
                )
            require_dense("per_sample_weights", given)
            if given.shape != input.shape:
                raise ValueError(
                    f"per_sample_weights: got {list(given.shape)}, accepted: the shape of input, "
                    f"{list(input.shape)}"
                )
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets: given with 2-D input, accepted: None")
            bags, size = input.shape
            offsets = torch.arange(bags + 1, dtype=input.dtype, device=input.device) * size
        elif input.dim() != 1:
            raise ValueError(f"input: got shape {list(input.shape)}, accepted: [B, N] or [N]")
        elif offsets is None or offsets.dim() != 1:
            got = "None" if offsets is None else list(offsets.shape)
            raise ValueError(f"offsets: got {got}, accepted: [B] with 1-D input")
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), input.numel())])
        if offsets.dtype != input.dtype:
            # The wider of the two: a narrowed offset could pass for a good one.
            input, offsets = input.long(), offsets.long()
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        return self._look_up(*self._without_padding(input.reshape(-1), offsets, weights))

    def extra_repr(self) -> str:
        """Describe shape and mode."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


class Embedding(_OneTable):
    """``torch.nn.Embedding`` whose rows are trained by a :class:`coldrow.RowUpdate`.

    Constructor and forward are torch's; how it trains is said at :class:`EmbeddingBag`.

    Args:
        num_embeddings: rows, E >= 1.
        embedding_dim: columns, D >= 1.
        padding_idx: a row that is never trained; zero to begin with.
        max_norm: None; others are refused.
        norm_type: 2.0; others are refused.
        scale_grad_by_freq: False; True is refused.
        sparse: either; gradients are never dense.
        _weight: initial values ``[E, D]``, copied; default normal.
        _freeze: never train.
        device: where the table lives; default that of ``_weight``, or torch's default device.
        dtype: float32, float16 or bfloat16, of the table and of what is returned.
        update: what a touch does; default ``RowUpdate()``.
        charge: "touch" or "read", when decay is charged.
        **options: other options of :class:`TableBatchedEmbeddingBags`, e.g. ``fused=False``.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        update: RowUpdate | None = None,
        charge: str = "touch",
        **options: Any,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            "none",
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            weight=_weight,
            freeze=_freeze,
            device=device,
            dtype=dtype,
            update=update,
            charge=charge,
            **options,
        )

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, freeze: bool = True, **options: Any) -> Embedding:
        """Return a module with a copy of ``embeddings`` ``[E, D]``; with ``freeze`` it never trains."""
        rows, dim = _pretrained(embeddings)
        return cls(rows, dim, _weight=embeddings, _freeze=freeze, **options)

    def forward(self, input: Tensor) -> Tensor:  # torch's own name for it
        """Look up rows.

        Args:
            input: int32 or int64, any shape.

        Returns:
            ``[*input.shape, D]``.

        Raises:
            IndexError: an index outside the table.
            TypeError: an input that is not an integer tensor.
        """
        self._integers("input", input)
        flat = input.reshape(-1)
        whole = flat.new_tensor([0, flat.numel()]) if self.padding_idx is not None else flat
        indices, _, _ = self._without_padding(flat, whole, None)
        offsets = torch.arange(indices.numel() + 1, dtype=indices.dtype, device=indices.device)
        rows = self._look_up(indices, offsets)
        if self.padding_idx is not None:
            padding = self.weight.detach()[self.padding_idx].to(rows.dtype)
            all_rows = padding.expand(flat.numel(), -1).clone()
            rows = all_rows.index_put((flat != self.padding_idx,), rows)
        return rows.view(*input.shape, self.embedding_dim)


def _pretrained(embeddings: Tensor) -> tuple[int, int]:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings: got {type(embeddings).__name__}, accepted: a tensor [E, D]")
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings: got {list(embeddings.shape)}, accepted: [E, D]")
    return embeddings.shape[0], embeddings.shape[1]
