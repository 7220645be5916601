"""From an example to token ids, and which of them the loss is of.

What the tokenizer puts before every text by itself comes first, where a chat template does not say how the text begins.
Without a chat template the text is plain. A prompt and a completion are cut into tokens each by itself, joined as they
are, and ended by the end-of-document id. Of a conversation each message becomes ``role: content``; one of the assistant
ends with the end-of-document id, every other with a line break. ``assistant: `` counts as prompt.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from adamoe_dist.data.examples import PLAIN_ROLES, Completion, Conversation, Example
from adamoe_dist.data.tokenizer import Message, Tokenizer
from adamoe_dist.errors import UserError

PLAIN_TURN = "assistant: "
"""What the assistant's turn begins with in the plain format."""


class ExampleTokens(NamedTuple):
    """Token ids of one example and, for each, whether the loss is of it. The first id is never predicted."""

    ids: list[int]
    targets: list[bool]


def tokens_of_example(example: Example, tokenizer: Tokenizer, on_all: bool = False) -> ExampleTokens:
    """Cut an example into tokens; the last is the end-of-document id, or what the chat template ends with and it.

    Args:
        example: from :func:`read_examples`.
        tokenizer: whose chat template, where it has one, renders conversations.
        on_all: let the loss be of all tokens, and not of completions and assistant turns alone.

    Raises:
        UserError: a role is not known, or the template does not take the conversation; file and line are named.
    """
    prefix = tokenizer.prefix_ids
    if isinstance(example, Completion):
        tokens = _completion(example, tokenizer)
    elif tokenizer.chat_template is not None:
        prefix, tokens = [], _templated(example, tokenizer)
    else:
        tokens = _plain(example, tokenizer)
    targets = [True] * len(tokens.ids) if on_all else tokens.targets
    return ExampleTokens([*prefix, *tokens.ids], [False] * len(prefix) + targets)


def _completion(example: Completion, tokenizer: Tokenizer) -> ExampleTokens:
    prompt, completion = tokenizer.encode(example.prompt), [*tokenizer.encode(example.completion), tokenizer.eod_id]
    return ExampleTokens([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


def _plain(example: Conversation, tokenizer: Tokenizer) -> ExampleTokens:
    ids: list[int] = []
    targets: list[bool] = []
    for text, is_target in plain_pieces(example.messages, example.source):
        piece = [tokenizer.eod_id] if text is None else tokenizer.encode(text)
        ids += piece
        targets += [is_target] * len(piece)
    return ExampleTokens(ids, targets)


def plain_pieces(messages: Sequence[Message], source: str) -> Iterator[tuple[str | None, bool]]:
    """Yield what a conversation is in the plain format: texts, each to be cut by itself, and whether they are learnt.

    Args:
        messages: each with ``role`` and ``content``.
        source: where they are from, for the refusal.

    Yields:
        A text, None for the end-of-document id, and whether the loss is of it.

    Raises:
        UserError: the format does not know a role.
    """
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in PLAIN_ROLES:
            raise UserError(
                f"{source} messages[{number}] has role {role!r}, and the plain format of a tokenizer without chat "
                f"template knows {', '.join(PLAIN_ROLES)}; mend or remove the line"
            )
        if role == "assistant":
            yield from ((PLAIN_TURN, False), (content, True), (None, True))
        else:
            yield f"{role}: {content}\n", False


def _templated(example: Conversation, tokenizer: Tokenizer) -> ExampleTokens:
    """Find the assistant's turns by rendering more and more messages: each rendering must begin with the one before."""
    ids: list[int] = []
    targets: list[bool] = []

    def extend(longer: list[int], is_target: bool, number: int) -> None:
        if longer[: len(ids)] != ids:
            raise UserError(
                f"{example.source} messages[{number}]: the tokenizer's chat template renders the messages before it "
                "otherwise once it follows, so that the assistant's turns cannot be told apart; give the tokenizer a "
                "template that only adds, or write prompts and completions"
            )
        targets.extend([is_target] * (len(longer) - len(ids)))
        ids[:] = longer

    for number, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        extend(_rendered(example, tokenizer, number, True), False, number)
        extend(_rendered(example, tokenizer, number + 1, False), True, number)
    if ids[-1] != tokenizer.eod_id:
        ids.append(tokenizer.eod_id)
        targets.append(True)
    return ExampleTokens(ids, targets)


def _rendered(example: Conversation, tokenizer: Tokenizer, count: int, begins_turn: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            example.messages[:count], tokenize=True, return_dict=False, add_generation_prompt=begins_turn
        )
    except Exception as problem:  # a template raises what it likes
        words = " ".join(str(problem).split())
        raise UserError(
            f"{example.source}: the tokenizer's chat template does not take its messages ({words}); mend or remove the "
            "line"
        ) from problem
    return ids
