"""Seeds of the sampled responses."""

import hashlib


def request_seed(run_seed: int, step: int, place: int, sample_id: int) -> int:
    """Seed of one response, 63 bits: the same in every process, engine and batch, whatever else is generated beside it.

    Args:
        run_seed: seed of the run.
        step: training step, so that a prompt which comes again is answered anew.
        place: of the prompt in the step's batch, not in the data: a prompt that a batch holds twice is answered twice.
        sample_id: number of the response among those of its prompt.
    """
    key = f"{run_seed}/{step}/{place}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
