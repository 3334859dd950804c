"""Every option of `megarlhf chat`: what it is set to, and where a session of one message shows it."""

from tests.config.in_process import Trace
from tests.config.in_process_programs import TEMPLATE
from tests.config.option_probes import Probe, Seen
from tests.config.option_probes_ppo import llm


def drawn(name: str) -> Seen:
    """A field of vLLM's SamplingParams."""
    return lambda trace: getattr(trace.llms[0].streams[0][1], name)


def continued(trace: Trace) -> str:
    """The text that the model continues, one character a token; special tokens as dots."""
    letters = "...." + "0123456789abcdefghijklmnopqrstuvwxyz ="
    return "".join(letters[token] for token in trace.llms[0].streams[0][0]["prompt_token_ids"])


CHAT_MODEL = {"pretrain": "{}/chat_model", "apply_chat_template": True}
CHAT = {
    "pretrain": Probe(value="{}/other", seen=lambda t: t.llms[0].options["model"].rsplit("/", 1)[1], expected="other"),
    "bf16": Probe(value=True, seen=llm("dtype"), expected="bfloat16"),
    "max_len": Probe(value=77, seen=llm("max_model_len")),
    "vllm_tensor_parallel_size": Probe(value=2, seen=llm("tensor_parallel_size")),
    "vllm_gpu_memory_utilization": Probe(value=0.37, seen=llm("gpu_memory_utilization")),
    "vllm_kv_cache_gib": Probe(value=0.25, seen=llm("kv_cache_memory_bytes"), expected=2**28),
    "greedy_sampling": Probe(value=True, seen=drawn("temperature"), expected=0.0),
    "temperature": Probe(value=0.31, seen=drawn("temperature")),
    "top_p": Probe(value=0.77, seen=drawn("top_p")),
    "repetition_penalty": Probe(value=1.09, seen=drawn("repetition_penalty")),
    "seed": Probe(value=1234, seen=llm("seed")),
    "apply_chat_template": Probe(value=True, seen=continued, expected="q 0 1 a ", also={"pretrain": "{}/chat_model"}),
    "tokenizer_chat_template": Probe(
        value=TEMPLATE.replace("q ", "z "), seen=continued, expected="z 0 1 a ", also=CHAT_MODEL
    ),
    "input_template": Probe(value="n {} a ", seen=continued, expected="n 0 1 a "),
    "ta_prompt": Probe(value="{}/few.txt", seen=continued, expected="f 0.n 0 1", also={"input_template": "n {}"}),
    "enable_csft": Probe(
        value=True, seen=continued, expected="q 0 1 a r ", also=CHAT_MODEL, before={"csft_prompt": "r"}
    ),
    "csft_prompt": Probe(value="x", seen=continued, expected="q 0 1 a x ", also=CHAT_MODEL | {"enable_csft": True}),
}
