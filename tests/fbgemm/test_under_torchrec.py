"""TorchRec's own fused kernels with coldrow.compat.fbgemm in FBGEMM's place: its constructor calls work."""

from __future__ import annotations

import pytest

pytest.importorskip("torchrec")

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed import batched_embedding_kernel as kernels
from torchrec.distributed.embedding_types import (
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.modules import fused_embedding_modules
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from coldrow.compat.fbgemm import SplitTableBatchedEmbeddingBagsCodegen

OPTIMIZERS = {
    "EXACT_ROWWISE_ADAGRAD": {"eps": 1e-6},
    "EXACT_ADAGRAD": {"eps": 1e-6},
    "EXACT_SGD": {},
    "ADAM": {"beta1": 0.8, "beta2": 0.99, "weight_decay": 1e-3},
    "PARTIAL_ROWWISE_ADAM": {},
}
ON_CPU = ("EXACT_ROWWISE_ADAGRAD", "EXACT_ADAGRAD", "EXACT_SGD")  # what FBGEMM 1.8 has there


@pytest.fixture(autouse=True)
def process_group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(optimizer: str) -> GroupedEmbeddingConfig:
    tables = []
    for name, rows in (("t0", 20), ("t1", 40)):
        shard = ShardMetadata([0, 0], [rows, 8], "rank:0/cpu")
        tables.append(
            ShardedEmbeddingTable(
                num_embeddings=rows,
                embedding_dim=8,
                name=name,
                embedding_names=[f"{name}_a", f"{name}_b"],
                feature_names=[f"{name}_a", f"{name}_b"],
                data_type=DataType.FP32,
                pooling=PoolingType.SUM,
                local_rows=rows,
                local_cols=8,
                compute_kernel=EmbeddingComputeKernel.FUSED,
                local_metadata=shard,
                global_metadata=ShardedTensorMetadata(
                    [shard], torch.Size([rows, 8]), TensorProperties(dtype=torch.float32)
                ),
            )
        )
    options = {"optimizer": EmbOptimType[optimizer], "learning_rate": 0.1, **OPTIMIZERS[optimizer]}
    return GroupedEmbeddingConfig(
        data_type=DataType.FP32,
        pooling=PoolingType.SUM,
        is_weighted=False,
        has_feature_processor=False,
        compute_kernel=EmbeddingComputeKernel.FUSED,
        embedding_tables=tables,
        fused_params=options,
    )


def batch(seed: int) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (4 * 3,), generator=random)
    values = torch.randint(0, 20, (int(lengths.sum()),), generator=random)
    return KeyedJaggedTensor.from_lengths_sync(["t0_a", "t0_b", "t1_a", "t1_b"], values, lengths)


def train(kernel, steps: int = 5):
    for weight in kernel.split_embedding_weights():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    for seed in range(steps):
        out = kernel(batch(seed))
        out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
        kernel.fused_optimizer.step()
        kernel.fused_optimizer.zero_grad()
    return [out.detach(), *kernel.split_embedding_weights()]


@pytest.mark.parametrize("kernel", ["BatchedFusedEmbeddingBag", "BatchedFusedEmbedding"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_kernels(optimizer, kernel, monkeypatch):
    name = "SplitTableBatchedEmbeddingBagsCodegen"
    build, cpu = getattr(kernels, kernel), torch.device("cpu")
    want = train(build(config(optimizer), device=cpu)) if optimizer in ON_CPU else None
    monkeypatch.setattr(kernels, name, SplitTableBatchedEmbeddingBagsCodegen)
    mine = build(config(optimizer), device=cpu)
    assert type(mine.emb_module) is SplitTableBatchedEmbeddingBagsCodegen
    got = train(mine)
    if want is not None:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)
    states = mine.fused_optimizer.state_dict()["state"]
    assert sorted(states) == ["t0.weight", "t1.weight"]
    assert [n for n, _ in mine.named_parameters()] == ["t0.weight", "t1.weight"]
    mine.fused_optimizer.update_hyper_parameters({"lr": 0.2})
    mine.fused_optimizer.set_optimizer_step(9)
    assert (mine.emb_module.get_learning_rate(), int(mine.emb_module.iter)) == (0.2, 9)
    mine.flush()
    mine.purge()


def test_fused_modules(monkeypatch):
    name = "SplitTableBatchedEmbeddingBagsCodegen"
    monkeypatch.setattr(fused_embedding_modules, name, SplitTableBatchedEmbeddingBagsCodegen)
    collection = fused_embedding_modules.FusedEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, feature_names=["f"])],
        torch.optim.SGD,
        {"lr": 0.1},
    )
    lookup = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert collection(lookup).values().shape == (2, 8)
