"""What training loops need beside the modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from coldrow._checks import listed, number
from coldrow.nn.module import TableBatchedEmbeddingBags


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip the norm of all gradients together, as torch's function of this name, sparse ones included.

    Duplicate rows of a sparse gradient are summed first (it is coalesced in place), so the norm is that of
    the gradient itself.

    Args:
        parameters: tensors whose ``.grad`` is clipped: dense, or sparse as ``fused=False`` tables have.
        max_norm: > 0.
        norm_type: p of the p-norm, > 0; may be ``inf``.
        error_if_nonfinite: raise if the norm is not finite, before anything is changed.

    Returns:
        The norm before clipping, a 0-dim float32 tensor.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``.
    """
    max_norm = number("max_norm", max_norm, low_open=True)
    if not (isinstance(norm_type, float) and norm_type == float("inf")):
        norm_type = number("norm_type", norm_type, low_open=True)
    accepted = "a tensor or a list of tensors"
    given = (
        [parameters]
        if isinstance(parameters, Tensor)
        else listed("parameters", parameters, accepted)
    )
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters: got {p!r}, accepted: {accepted}")
    values = []
    for p in given:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
        value = p.grad._values() if p.grad.is_sparse else p.grad
        if value.numel() > 0:  # (of none there is no largest)
            values.append(value)
    if not values:
        return torch.tensor(0.0)
    norms = torch.stack([torch.linalg.vector_norm(v.float(), norm_type).cpu() for v in values])
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the norm of the gradients is {float(total)}, so they cannot be clipped (pass "
            "error_if_nonfinite=False to scale them anyway)"
        )
    scale = float(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    for v in values:
        v.mul_(scale)
    return total


def ignore_in_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave tables alone. Call it before wrapping ``model``.

    The tables of fused modules get no gradients, and each process trains its own. Without this call
    DistributedDataParallel would broadcast those of rank 0 when it wraps the model, and clock and row state
    (buffers) before each forward.

    Args:
        model: what will be wrapped; it may contain any number of coldrow's modules.
    """
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    ignored = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, TableBatchedEmbeddingBags)
        for name in _not_for_ddp(module)
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*known, *(name for name in ignored if name not in known)]
    )


def _not_for_ddp(module: TableBatchedEmbeddingBags) -> list[str]:
    tables = [name for name, _ in module.named_parameters()] if module.fused else []
    return [*tables, *(name for name, _ in module.named_buffers())]
