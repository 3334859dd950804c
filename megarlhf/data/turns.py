"""What the assistant says in a chat: its text, cut where the assistant begins and ends to speak.

A chat becomes segments of text, by turns without and with a loss: [prompt, answer], or [prompt, answer, what follows,
answer, ...]. They end with the assistant's last word; what a template puts behind that, such as a line break, is left
out, for generation has stopped before it.
"""

from megarlhf.data.templates import Message, Renderer, Tools


def last_turn(
    renderer: Renderer, messages: list[Message], answer: list[Message], *, tools: Tools | None
) -> list[str]:
    """Prompt and answer of a chat.

    Args:
        answer: empty where `messages` holds the whole chat, whose last message it then is.
    Raises:
        ValueError: no answer, an empty one, or a template that renders the prompt otherwise before it.
    """
    if not answer:
        _check_whole(messages)
        messages, answer = messages[:-1], messages[-1:]
    _check_answer(answer[-1])
    before = renderer.chat(messages, add_generation_prompt=True, tools=tools)
    whole = renderer.chat(messages + answer, add_generation_prompt=False, tools=tools)
    if not whole.startswith(before):
        raise ValueError(
            "apply_chat_template=True: the rendered chat does not begin with its rendered prompt, so the answer's "
            "tokens cannot be told apart: set tokenizer_chat_template to one that only appends"
        )
    return [before, whole[len(before) :].rstrip()]


def every_turn(
    renderer: Renderer, messages: list[Message], answer: list[Message], *, tools: Tools | None
) -> list[str]:
    """A chat by turns; arguments and errors as for `last_turn`.

    Where the template marks with {% generation %} what the assistant says, these marks count. Otherwise a turn is what
    the chat up to and with its message adds to the prompt before it, and each must begin with the one before.
    """
    messages = messages + answer
    _check_whole(messages)
    _check_answer(messages[-1])
    if renderer.marks_turns:
        whole, spans = renderer.marked_turns(messages, tools=tools)
        if not spans:
            raise ValueError("the chat template marks nothing in it with {% generation %}: correct the template")
    else:
        whole = renderer.chat(messages, add_generation_prompt=False, tools=tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span(renderer, messages, number, whole, tools) for number in turns]
    segments, done = [], 0
    for start, end in spans:
        segments += [whole[done:start], whole[start:end]]
        done = end
    return [*segments[:-1], segments[-1].rstrip()]


def _span(
    renderer: Renderer, messages: list[Message], number: int, whole: str, tools: Tools | None
) -> tuple[int, int]:
    """Where a message's text starts and ends in the text of the whole chat."""
    before = renderer.chat(messages[:number], add_generation_prompt=True, tools=tools)
    until = renderer.chat(messages[: number + 1], add_generation_prompt=False, tools=tools)
    if not (until.startswith(before) and whole.startswith(until)):
        raise ValueError(
            f"multiturn=True: the chat template renders message {number} otherwise once others follow, so that its "
            "tokens are not those that the assistant generates: set tokenizer_chat_template to one that only appends "
            "or marks turns with {% generation %}, or give each turn a row of its own without multiturn"
        )
    return len(before), max(len(before), len(until.rstrip()))


def _check_whole(messages: list[Message]) -> None:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("a whole chat ends with the assistant's message, after at least one other")


def _check_answer(message: Message) -> None:
    content = message["content"]
    said = content if isinstance(content, str | None) else "".join(part["text"] for part in content)
    if not said and not message.get("tool_calls"):
        raise ValueError("the last message is empty: remove the row")
