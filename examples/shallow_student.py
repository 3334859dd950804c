"""Write a student for distillation: the first layers of a model, with its embeddings and tokenizer.

    python examples/shallow_student.py models/smollm2 models/student --num_layers 12
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_student(model_dir: Path, output: Path, num_layers: int) -> None:
    """Keep the first `num_layers` layers of a causal LM; nothing is done where `output` is there already."""
    if output.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(output)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("output", type=Path, help="directory of the student")
    parser.add_argument("--num_layers", type=int, default=12, help="layers that stay")
    options = parser.parse_args()
    write_student(options.model, options.output, options.num_layers)


if __name__ == "__main__":
    main()
