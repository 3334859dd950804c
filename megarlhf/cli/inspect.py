"""`megarlhf inspect DIR`: what a checkpoint holds, from its headers alone."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro
from rich.filesize import decimal

from megarlhf.cli.errors import report_errors
from megarlhf.config.roles import ROLES

if TYPE_CHECKING:
    from megarlhf.formats.torch_dist import TorchDistReader


class _Row(NamedTuple):
    name: str
    shape: Sequence[int]
    dtype: str
    num_bytes: int
    where: str  # file, or how it was cut


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return report_errors("megarlhf inspect", lambda: tyro.cli(inspect, prog="megarlhf inspect", args=arguments))


def inspect(load: tyro.conf.Positional[str], /, *, role: str = "actor") -> int:
    """Print architecture, iteration, layout, and every tensor's shape, dtype, bytes and chunks.

    Args:
        load: a Hugging Face checkpoint; or DIR, DIR@iteration or a run's directory with a Megatron checkpoint.
        role: which model of a run's checkpoint, actor or critic.
    """
    is_hf = (Path(load) / "config.json").is_file()
    title, rows = _hf(Path(load)) if is_hf else _megatron(load, role)
    print(title)
    numbers = sum(math.prod(row.shape) for row in rows)
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    print(f"{len(rows)} tensors, {numbers:,} numbers, {decimal(sum(row.num_bytes for row in rows))}, {dtypes}")
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        print(f"  {row.name:{width}}  {shape:>20}  {row.dtype:8}  {decimal(row.num_bytes):>11}  {row.where}")
    return 0


def _architecture(config: Path, source: str) -> str:
    from megarlhf.formats.json_files import read_json_object

    named = read_json_object(config, source).get("architectures") or "unknown"
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named)


def _hf(directory: Path) -> tuple[str, list[_Row]]:
    from megarlhf.formats.huggingface import HFWeights
    from megarlhf.formats.safetensors_file import tensor_places

    source = HFWeights(directory, option="load")
    rows = [
        _Row(spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), spec.num_bytes, name)
        for name in source.files
        for _, spec in tensor_places(directory / name).values()
    ]
    return f"{directory}: Hugging Face checkpoint, {_architecture(directory / 'config.json', source.source)}", rows


def _megatron(load: str, role: str) -> tuple[str, list[_Row]]:
    from megarlhf.formats.megatron import find_checkpoint, hf_files
    from megarlhf.formats.torch_dist import TorchDistReader

    trained = [name for name, spec in ROLES.items() if spec.trains]
    if role not in trained:
        raise ValueError(f"role={role} is never saved: use {' or '.join(trained)}")
    checkpoint = find_checkpoint(load, role)
    reader = TorchDistReader(checkpoint.directory, checkpoint.source)
    try:
        files = hf_files(checkpoint, None, ROLES[role].checkpoint)
        architecture = _architecture(files.directory / "config.json", checkpoint.source)
    except ValueError:  # it can be looked at all the same
        architecture = "unknown"
    rows = []
    for key, entry in sorted(reader.tensors.items()):
        dtype = entry.properties.dtype
        cut = Counter(tuple(chunk.sizes) for chunk in entry.chunks)
        where = ", ".join(f"{count} x [{'x'.join(map(str, shape))}]" for shape, count in cut.items())
        num_bytes = math.prod(entry.size) * dtype.itemsize
        rows.append(_Row(key, entry.size, str(dtype).removeprefix("torch."), num_bytes, where))
    title = f"{checkpoint.directory}: Megatron-Core checkpoint (torch_dist), {architecture}, iteration "
    layout = _layout(checkpoint.directory, reader)
    return f"{title}{checkpoint.iteration}, {reader.num_objects} objects besides tensors\nlayout: {layout}", rows


def _layout(directory: Path, reader: "TorchDistReader") -> str:
    """The parallel sizes that a checkpoint was cut for as its converter noted them, else what its chunks tell."""
    from megarlhf.conversion.steps import MANIFEST
    from megarlhf.formats.json_files import read_json_object

    noted = read_json_object(directory / MANIFEST, reader.source) if (directory / MANIFEST).is_file() else {}
    if isinstance(sizes := noted.get("layout"), dict):
        return ", ".join(f"{kind} parallel size {size}" for kind, size in sizes.items())
    embedding = reader.tensors.get("embedding.word_embeddings.weight")
    if embedding is None:
        return "not noted"
    parts = len({chunk.offsets[0] for chunk in embedding.chunks})
    return f"not noted; the embedding's rows lie in {parts} parts, as for tensor parallel size {parts}"


if __name__ == "__main__":
    sys.exit(main())
