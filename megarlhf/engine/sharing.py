"""A rank's weights in shared memory, where inference engines on the host read them."""

import torch
from torch import Tensor

from megarlhf.engine.engine import MegatronEngine
from megarlhf.formats import shared_memory
from megarlhf.formats.shared_memory import Piece, SharedBlock
from megarlhf.formats.threads import map_threads
from megarlhf.models.four_bit import dense_like
from megarlhf.models.weights import LocalWeight, ModelWeights
from megarlhf.parallel.device import device_kind
from megarlhf.parallel.groups import all_gather_objects


class SharedWeights:
    """What this rank hands out of the weights, for readers in other processes (formats/shared_memory.py).

    On a CPU the parameters themselves move into shared memory: there is nothing to write before a reader comes, but it
    must be done before training goes on. A GPU's have a copy there, which `refresh` renews; and so have those beside
    adapters on any device, as readers see them merged.

    All ranks make it together.

    Raises:
        ValueError: shared memory is too small for all of them.
    """

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        engine.finish_param_gather()  # nothing may be on its way into memory that is about to move
        owned = engine.weights.owned_weights()
        pieces = [(local, held) for local in owned if (held := pieces_of(engine.weights, local))]  # not padding alone
        self._local = [local for local, _ in pieces]
        data = [dense_like(local.param) for local in self._local]
        self._on_cpu = device_kind() == "cpu"
        moves = self._on_cpu and engine.adapters is None
        pools = engine.parameter_pools() if moves else []
        needed = shared_memory.bytes_to_move(data, pools) if moves else sum(tensor.nbytes for tensor in data)
        asked = all_gather_objects((needed, shared_memory.free_shared_memory()))  # all look before any takes some
        shared_memory.check_shared_memory(sum(mine for mine, _ in asked), min(free for _, free in asked))
        if moves:
            shared_memory.move_to_shared_memory(data, pools)
            self._shared: list[Tensor] = [parameter.data for parameter in data]
        else:
            self._shared = shared_memory.copies_together(data, shared=True)
        self._bytes = [shared_memory.bytes_of(shared) for shared in self._shared]
        places = {name: place for place, name in enumerate(engine.weights.hf_names())}
        self.blocks: list[SharedBlock] = [
            shared_memory.describe_block(shared, held, position=places[held[0].name])
            for shared, (_, held) in zip(self._shared, pieces, strict=True)
        ]

    @torch.no_grad()
    def refresh(self) -> list[bytes]:
        """Make the blocks hold the weights as they are now, and give back their digests; all ranks call it."""
        self._engine.finish_param_gather()
        adapters = self._engine.adapters

        @torch.no_grad()  # threads have modes of their own
        def renew(number: int) -> bytes:
            local, shared = self._local[number], self._shared[number]
            data = local.data if adapters is None else adapters.merged(local)
            if data.data_ptr() != shared.data_ptr():
                shared.copy_(data)
            return shared_memory.digest(self._bytes[number])

        threads = torch.get_num_threads() if self._on_cpu else 1  # a GPU copies one after the other
        return map_threads(renew, range(len(self._local)), threads)


def pieces_of(weights: ModelWeights, local: LocalWeight) -> list[Piece]:
    """Which parts of which Hugging Face tensors a parameter holds."""
    data = torch.empty(dense_like(local.param).shape, device="meta")  # places alone count
    return [
        Piece(
            name=shard.hf_name,
            shape=weights.hf_shapes[shard.hf_name],
            index=tuple(
                slice(*part.indices(length)[:2])
                for part, length in zip(shard.index, weights.hf_shapes[shard.hf_name], strict=True)
            ),
            offset=int(shard.view.storage_offset() - data.storage_offset()),
            size=tuple(shard.view.shape),
            stride=shard.view.stride(),
        )
        for shard in weights.shards(local, data)
        if shard.view.numel()
    ]
