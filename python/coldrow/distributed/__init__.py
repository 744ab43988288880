"""Tables whose rows are spread over the ranks of a process group.

:class:`RowShardedEmbeddingBags` needs torch.distributed alone. A step of it, on each rank:

1. the distinct rows that this rank's batch asks for are sent to their owners, which send the rows as
   they are stored (with ``charge="read"`` also when each was last touched);
2. the rank pools them itself, by the kernel that a module with the whole table would use;
3. in backward the gradients go to the owners, which update their rows.

So what comes out, and what is trained, are the bits of one process given the batches of all ranks joined
in rank order (with ``sum_gradients="owner"``), on any number of ranks.
"""

from coldrow.distributed.sharding import RowShardedEmbeddingBags
from coldrow.nn.utils import ignore_in_ddp

__all__ = ["RowShardedEmbeddingBags", "ignore_in_ddp"]
