"""Buckets of weights that two processes share on one device: how they reach an engine on the trainer's GPU.

The memory travels as a handle (CUDA IPC on a GPU, a file of shared memory on a CPU), its bytes do not.
"""

from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor

from megarlhf.formats.buckets import Assembly, plan_buckets
from megarlhf.formats.shared_memory import Block, Piece, copies_in
from megarlhf.parallel.bucket_stream import BucketStream, buckets_shape
from megarlhf.parallel.device import settle
from megarlhf.parallel.memory_handles import handle_of, open_memory, shareable_bytes
from megarlhf.parallel.weight_group import HandleGroup, Place, open_meeting
from tests.gpu.devices import on_cpu_and_gpu

TIMEOUT_SECONDS = 120.0
ROUNDS = 3  # a bucket is filled again and again


def numbers(seed: int) -> list[Tensor]:
    """What one round puts into the bucket: tensors of different types and sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(300, 70, generator=generator),
        torch.randn(1001, generator=generator).to(torch.bfloat16),
        torch.randint(0, 9, (5,), generator=generator),
    ]


def look(connection: Connection) -> None:
    """Open the bucket, and say what is in it."""
    bucket = open_memory(connection.recv())
    for _ in range(ROUNDS):
        assert connection.recv() == "filled"
        connection.send(bucket.cpu().numpy().tobytes())
    del bucket  # before its owner ends
    connection.send("released")


def answer(connection: Connection) -> object:
    assert connection.poll(TIMEOUT_SECONDS), "the other process does not answer"
    return connection.recv()


@on_cpu_and_gpu
def test_a_bucket_in_two_processes(device: str) -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=look, args=(theirs,))
    process.start()
    theirs.close()
    try:
        memory = shareable_bytes(2**20).zero_()
        assert memory.device.type == device
        bucket = memory[4096 : 4096 + 2**17]  # inside a larger allocation, as the caching allocator has it
        ours.send(handle_of(bucket))
        for seed in range(ROUNDS):
            copies_in(bucket, [tensor.to(device) for tensor in numbers(seed)])
            settle()
            ours.send("filled")
            found = answer(ours)
            assert found == bucket.cpu().numpy().tobytes() and numbers(seed)[0].numpy().tobytes() in found
        assert answer(ours) == "released"
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()


def plan() -> list[Block]:
    """One matrix, of which a bucket has a part."""
    index = (slice(0, 256), slice(0, 100))
    piece = Piece(name="w", shape=(256, 100), index=index, offset=0, size=(256, 100), stride=(100, 1))
    return [Block(length=25600, dtype=torch.float32, pieces=(piece,))]


def receive(connection: Connection, place: Place) -> None:
    """Two versions, read in the sender's memory."""
    group, buckets = HandleGroup(replace(place, rank=1), senders=None), plan_buckets([plan()], most_bytes=8000)
    for version in range(2):
        memory = open_memory(connection.recv())
        stream, assembly = BucketStream(buckets, group, memory=memory), Assembly()
        found = [tensor for bucket, bytes_ in stream for _, tensor in assembly.take(bucket, bytes_)]
        connection.send((stream.confirm(version), found[0].device.type, found[0].cpu().numpy()))
        del stream, memory
    group.close()


@on_cpu_and_gpu
def test_buckets_are_read_where_the_sender_gathers_them(device: str) -> None:
    context = mp.get_context("spawn")
    store, meeting = open_meeting(one_host=True)
    place = Place(meeting=meeting, rank=0, size=2, timeout_seconds=TIMEOUT_SECONDS)
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs, place))
    process.start()
    theirs.close()
    try:
        group, buckets = HandleGroup(place, senders=place.among(1)), plan_buckets([plan()], most_bytes=8000)
        assert len(buckets) == 13
        for version in range(2):
            weights = torch.randn(256, 100, device=device)
            memory = shareable_bytes(*buckets_shape(buckets))
            ours.send(handle_of(memory))
            stream = BucketStream(
                buckets,
                group,
                fill=lambda bucket, bytes_, own=weights: bucket.fill(bytes_, lambda number: own),
                memory=memory,
            )
            for _ in stream:
                continue
            sent = stream.confirm(version)
            checksum, where, found = answer(ours)  # type: ignore[misc]
            assert (checksum, where) == (sent, device)
            assert torch.equal(torch.from_numpy(found), weights.cpu())
        group.close()
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
    del store
