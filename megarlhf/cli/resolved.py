"""What a run takes from several files, in words for `--dry-run`."""

from megarlhf.config.arguments import ModelArguments, PromptDataArguments
from megarlhf.config.supervised_arguments import SFTDataArguments
from megarlhf.data.token_ids import token_text
from megarlhf.data.tokenizer import load_tokenizer, stop_tokens, template_source
from megarlhf.formats.huggingface import read_config


def resolved_files(model: ModelArguments, data: PromptDataArguments | SFTDataArguments) -> str:
    """Tokenizer, chat template, the tokens that end a response, and dtypes, with the files that they come from.

    A supervised run has no stop tokens: what it puts after each row is the tokenizer's EOS.

    Raises:
        ValueError: files that cannot be read.
    """
    directory = model.tokenizer or model.pretrain
    tokenizer = load_tokenizer(directory, chat_template=data.tokenizer_chat_template)
    config = read_config(model.pretrain)
    template = "none (apply_chat_template=False)"
    if data.apply_chat_template:
        template = template_source(directory, data.tokenizer_chat_template)
    lines = [
        f"tokenizer: {directory} ({len(tokenizer)} tokens; vocab_size={config.vocab_size})",
        f"chat template: {template}",
    ]
    if isinstance(data, PromptDataArguments):
        stops = stop_tokens(tokenizer, model.pretrain, config)
        lines += [f"stop token: {stop.token_id} {stop.text} ({', '.join(stop.sources)})" for stop in stops]
    elif tokenizer.eos_token_id is not None:
        token = tokenizer.eos_token_id
        lines.append(f"end of every row: {token} {token_text(tokenizer, token)} (the tokenizer's EOS)")
    dtype = "bfloat16" if model.bf16 else "float32"
    lines.append(f"dtype: {dtype} (bf16={model.bf16}); config.json of pretrain says {config.dtype or 'nothing'}")
    return "\n".join(lines)
