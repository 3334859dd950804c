"""Tiny model directories with tokenizers, weight files, and log-probs by Transformers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megarlhf.data.tensor_file import TensorFile, TensorSpec, adjacent_order
from megarlhf.data.types import Prompt, Sample
from tests.tiny_models import VOCAB_SIZE, make_model


def make_engine_model(directory: Path, *, family: str = "llama", tied: bool = True) -> Path:
    """A tiny model whose tokens are the words t0, t1, ...; head_dim 32, which vLLM's CPU attention needs."""
    make_model(directory, family=family, tied=tied, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(directory)
    return directory


def perturbed(model_dir: Path, seed: int) -> PreTrainedModel:
    """The model with every weight moved, as training would."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_weights(
    path: Path, model: PreTrainedModel, *, adjacent: bool = True, dtype: torch.dtype = torch.float32
) -> str:
    """Put a model's weights into a new file, the parts of fused layers together if `adjacent`; returns the checksum."""
    with TemporaryDirectory() as scratch:  # a checkpoint has the experts one by one, and no tied head
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "model.safetensors")
    names = adjacent_order(tensors) if adjacent else sorted(tensors)
    specs = [TensorSpec(name, tuple(tensors[name].shape), dtype) for name in names]
    file = TensorFile.create(path, specs)
    return file.checksum({name: file.write(name, tensors[name]) for name in names})


def transformers_log_probs(model: PreTrainedModel, sample: Sample, temperature: float) -> torch.Tensor:
    """[num_response_tokens] log-probs of a sample's tokens at this temperature."""
    prompt = len(sample.prompt.token_ids)
    tokens = torch.tensor([sample.prompt.token_ids + sample.response_ids])
    with torch.no_grad():
        log_probs = (model(tokens).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[0, prompt:, None])[:, 0]


def make_prompts(lengths: list[int]) -> list[Prompt]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = [tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths]
    return [Prompt(index=10 + i, text="", token_ids=ids, label=None) for i, ids in enumerate(tokens)]
