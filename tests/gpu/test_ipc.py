"""A bucket of weights that two processes share on one device: what a transfer to an engine on the same GPU stands on.

The tensor travels as a handle (torch.multiprocessing: CUDA IPC on a GPU, a file descriptor on a CPU), its bytes do not.
"""

from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor

from megarlhf.formats.shared_memory import copies_in
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


def contents(seed: int) -> bytes:
    """The bytes of the round's first tensor."""
    return numbers(seed)[0].numpy().tobytes()


def settle(bucket: Tensor) -> None:
    """Wait until what was begun on the device is done: the other process's streams know nothing of this one's."""
    if bucket.is_cuda:
        torch.cuda.synchronize()


def other_process(connection: Connection) -> None:
    """Look at the bucket, say what is in it, then turn every bit of its second half."""
    bucket: Tensor = connection.recv()
    for _ in range(ROUNDS):
        assert connection.recv() == "filled"
        connection.send(bucket.cpu().numpy().tobytes())
        bucket[len(bucket) // 2 :].bitwise_not_()
        settle(bucket)
        connection.send("written")
    del bucket  # before its owner ends
    connection.send("released")


def answer(connection: Connection) -> object:
    assert connection.poll(TIMEOUT_SECONDS), "the other process does not answer"
    return connection.recv()


@on_cpu_and_gpu
def test_a_bucket_in_two_processes(device: str) -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=other_process, args=(theirs,))
    process.start()
    theirs.close()
    try:
        memory = torch.zeros(2**20, dtype=torch.uint8, device=device)
        bucket = memory[4096 : 4096 + 2**17]  # inside a larger allocation, as the caching allocator has it
        ours.send(bucket)
        for seed in range(ROUNDS):
            copies_in(bucket, [tensor.to(device) for tensor in numbers(seed)])
            settle(bucket)
            filled = bucket.to("cpu", copy=True)
            ours.send("filled")
            assert answer(ours) == filled.numpy().tobytes() and contents(seed) in filled.numpy().tobytes()
            assert answer(ours) == "written"
            half = len(bucket) // 2
            assert torch.equal(bucket[:half].cpu(), filled[:half])
            assert torch.equal(bucket[half:].cpu(), ~filled[half:]), "what the other process writes is seen here"
        assert not memory[:4096].any() and not memory[4096 + 2**17 :].any(), "nothing outside the bucket"
        assert answer(ours) == "released"
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
