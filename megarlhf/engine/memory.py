"""What a training engine keeps on its device, in parts that sleep and wake each on its own.

A part is whatever storages its tensors lie in when it falls asleep. Their bytes wait in host memory, pinned on a GPU
and reused from sleep to sleep, and the storages shrink to nothing, as those of Megatron-Core's buffers do in its own
offload (param_and_grad_buffer.py, `offload_to_cpu`). So every view of them stays valid: parameters, gradients and main
weights that share one storage wake where they were. Megatron-Core's offload alone would move nothing without a
distributed optimizer, and its optimizer's would part float32 main weights from the parameters that they are views of.

On a CPU the device is ordinary memory and the host another piece of it. A storage that other processes have mapped
(engine/sharing.py, CPU only) cannot shrink: it stays, and is counted.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, UntypedStorage

from megarlhf.config.roles import PARTS, Part
from megarlhf.parallel.device import current_device, host_bytes


class DeviceMemory:
    """The parts of one engine and who of them is awake; all are at first.

    Args:
        tensors: for each part, its tensors as they are now; tensors on other devices are left alone. A storage that
            several parts name belongs to the first of them.
    """

    def __init__(self, tensors: Mapping[Part, Callable[[], Iterable[Tensor]]]) -> None:
        self._tensors = tensors
        self._asleep: dict[Part, list[tuple[UntypedStorage, int]]] = {}  # with their bytes when awake
        self._host: dict[Part, dict[int, Tensor]] = {part: {} for part in PARTS}  # by storage
        self._largest: dict[Part, int] = dict.fromkeys(PARTS, 0)

    def sleep(self, *parts: Part, changed: bool = True) -> None:
        """Free the parts' storages. Gradients are forgotten, the others' bytes wait on the host.

        Args:
            changed: False where nothing was written since the sleep before: its host copies serve again.
        """
        self._note_largest()
        storages = self._storages()
        for part in parts:
            if part in self._asleep:
                continue
            held = [storage for storage in storages[part] if storage.resizable()]
            if part != "gradients":
                self._host[part] = {s._cdata: self._host_copy(part, s, changed=changed) for s in held}
            self._asleep[part] = [(storage, storage.nbytes()) for storage in held]
            for storage in held:
                storage.resize_(0)

    def wake(self, *parts: Part) -> None:
        """Bring the parts back; gradients come back as any numbers, to be zeroed."""
        for part in parts:
            for storage, num_bytes in self._asleep.pop(part, []):
                storage.resize_(num_bytes)
                if part != "gradients":
                    _bytes_of(storage).copy_(self._host[part][storage._cdata])
        self._note_largest()

    def is_awake(self, part: Part) -> bool:
        """Whether the part's numbers are there to compute with."""
        return part not in self._asleep

    def require(self, *parts: Part) -> None:
        """Stop before a kernel meets storages without memory, which could end the process.

        Raises:
            RuntimeError: a part is asleep.
        """
        if asleep := [part for part in parts if part in self._asleep]:
            raise RuntimeError(f"{', '.join(asleep)} asleep: wake them first")

    def num_bytes(self) -> dict[Part, int]:
        """Bytes on the device by part, each storage counted once."""
        return {part: sum(s.nbytes() for s in storages) for part, storages in self._storages().items()}

    def largest_bytes(self) -> dict[Part, int]:
        """The most that each part has held since the engine was built, in bytes."""
        self._note_largest()
        return dict(self._largest)

    def _note_largest(self) -> None:
        self._largest = {part: max(self._largest[part], held) for part, held in self.num_bytes().items()}

    def _storages(self) -> dict[Part, list[UntypedStorage]]:
        """Each part's storages on the device."""
        device, seen = current_device(), set[int]()
        found: dict[Part, list[UntypedStorage]] = {part: [] for part in PARTS}
        for part, tensors in self._tensors.items():
            for tensor in tensors():
                storage = tensor.untyped_storage()
                if storage._cdata not in seen and storage.device == device:
                    found[part].append(storage)
                seen.add(storage._cdata)
        return found

    def _host_copy(self, part: Part, storage: UntypedStorage, *, changed: bool) -> Tensor:
        copy = self._host[part].get(storage._cdata)
        if copy is None or copy.nbytes != storage.nbytes():
            assert changed, "there is no copy from a sleep before"
            copy = host_bytes(storage.nbytes())
        return copy.copy_(_bytes_of(storage)) if changed else copy


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8 view of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
