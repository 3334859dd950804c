"""Make everything the demo needs on this machine: a tiny untrained model, its tokenizer and the data of its task.

The task is to sort the digits of a list: the prompt "sort 7 1 4=" has the label "147". No held-out list occurs
in training. The supervised part (run.sh) is too short to learn the task; a verifiable reward (reward.py) has to do the
rest.

    python examples/demo/make_assets.py OUT --seed 42

writes OUT/model (a Hugging Face checkpoint), OUT/sft.jsonl ({"input", "output"}), OUT/prompts.jsonl and
OUT/heldout.jsonl ({"input", "label"}). The same seed gives the same files.
"""

import argparse
import json
import string
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = string.digits + string.ascii_lowercase + " ="
LIST_LENGTH = 3
NUM_SFT, NUM_HELDOUT = 200, 150  # of 1000 lists

Example = tuple[str, str]  # prompt and answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; decoding puts nothing between them, and nothing is added around a text."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 0.7 million random fp32 weights. vLLM's CPU attention needs a head_dim of 32 or more."""
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **tokens,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**tokens)
    return model


def make_examples(seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: every list there is, in random order, NUM_HELDOUT of them held out."""
    lists = list(product(string.digits, repeat=LIST_LENGTH))
    Random(seed).shuffle(lists)
    examples = [(f"sort {' '.join(digits)}=", "".join(sorted(digits))) for digits in lists]
    return examples[NUM_HELDOUT:], examples[:NUM_HELDOUT]


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write model, tokenizer and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write to")
    parser.add_argument("--seed", type=int, default=42, help="seed of the weights and of the data")
    arguments = parser.parse_args()

    disable_progress_bar()
    tokenizer = make_tokenizer()
    make_model(tokenizer, arguments.seed).save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    train, heldout = make_examples(arguments.seed)
    write_jsonl(arguments.out / "sft.jsonl", ({"input": p, "output": answer} for p, answer in train[:NUM_SFT]))
    write_jsonl(arguments.out / "prompts.jsonl", ({"input": p, "label": answer} for p, answer in train))
    write_jsonl(arguments.out / "heldout.jsonl", ({"input": p, "label": answer} for p, answer in heldout))
    print(f"{arguments.out}: model, {NUM_SFT} demonstrations, {len(train)} prompts, {len(heldout)} held-out prompts")


if __name__ == "__main__":
    main()
