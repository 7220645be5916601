"""Generating text: transformers' generate with a cache, one sample at a time, told apart by seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adamoe_dist.data import PLAIN_TURN, plain_pieces, prefix_ids_of
from adamoe_dist.errors import UserError
from adamoe_dist.inference.decoding import TextStream, find_stop, held_back
from adamoe_dist.inference.expert_use import count_experts
from adamoe_dist.inference.opening import OpenedModel, not_finite

DEFAULT_NEW_TOKENS = 128
SMALLEST = 1e-6
"""Of what divides logits: they must stay finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: stop after so many; None: 128, or fewer where the model's length ends before.
        temperature: divides the logits; 0: always the most likely token.
        top_k: draw from so many most likely tokens; 0: from all.
        top_p: draw from the most likely tokens that together have this probability; 1: from all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are there already; 1: none.
        seed: decides what is drawn.
        stop: texts that end a sample and are not part of it.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what nothing can be drawn with.

        Raises:
            UserError: naming the option.
        """
        for name, is_good, wanted in (
            ("max-new-tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature == 0 or SMALLEST <= self.temperature < float("inf"),
                f"0 (the most likely token), or {SMALLEST:g} or more",
            ),
            ("top-k", self.top_k >= 0, "0 (off) or more"),
            ("top-p", 0 < self.top_p <= 1, "more than 0, up to 1 (off)"),
            (
                "repetition-penalty",
                SMALLEST <= self.repetition_penalty <= 1 / SMALLEST,
                f"{SMALLEST:g} to {1 / SMALLEST:g}; 1 is off",
            ),
            ("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
            ("stop", all(self.stop), "a text that is not empty"),
        ):
            if not is_good:
                raise UserError(f"--{name} {getattr(self, name.replace('-', '_'))}: give {wanted}")


@dataclass(frozen=True)
class Sample:
    """What was generated.

    Attributes:
        prompt: the prompt.
        text: what comes after it.
        prompt_tokens: tokens of the prompt, with those that the tokenizer or the chat template adds.
        tokens: tokens generated.
        finish_reason: "end" (the model ended it), "stop" (a stop text) or "length".
        seed: what its draws started from.
        expert_use: what the routers did with the generated tokens; None: not asked for, or a dense model.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    seed: int
    expert_use: dict[str, Any] | None = None


def encode_prompt(opened: OpenedModel, prompt: str) -> list[int]:
    """Return a prompt's ids as the tokenizer makes them; of an empty one the id that begins a text."""
    return list(opened.tokenizer.encode(prompt)) or [opened.prefix_id]


def encode_chat(opened: OpenedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to where the assistant begins.

    They are the tokenizer's chat template's; without one those of the plain format, as fine-tuning makes them.

    Raises:
        UserError: the plain format does not know a role.
    """
    if not opened.tokenizer.chat_template:
        return _plain_chat(opened, messages)
    encoded = opened.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _plain_chat(opened: OpenedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    ids = prefix_ids_of(opened.tokenizer)
    for text, _ in (*plain_pieces(messages, "the conversation's"), (PLAIN_TURN, False)):
        if text is None:
            ids.append(opened.tokenizer.eos_token_id)
        else:
            ids += opened.tokenizer.encode(text, add_special_tokens=False)
    return ids


def fit_conversation(
    opened: OpenedModel, messages: Sequence[dict[str, str]], sampling: Sampling
) -> list[dict[str, str]]:  # fmt: skip
    """Return a conversation without as many of its first exchanges as leave no room for the answer.

    Room is ``max_new_tokens``, else 128 tokens or half of what the model reads, whichever is less. What a system says
    at the beginning stays, and so does the last message, whether it fits or not.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    kept = list(messages[len(system) :])
    wanted = sampling.max_new_tokens or min(DEFAULT_NEW_TOKENS, opened.context // 2)
    while len(kept) > 1 and len(encode_chat(opened, [*system, *kept])) + wanted > opened.context:
        kept = kept[2:]
    return [*system, *kept]


def generate(
    opened: OpenedModel,
    prompt: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    sample_number: int = 0,
    on_text: Callable[[str], Any] = lambda text: None,
    with_expert_use: bool = False,
) -> Sample:
    """Generate one sample.

    Args:
        opened: the model.
        prompt: the prompt, for the result.
        prompt_ids: its ids.
        sampling: how to choose tokens.
        sample_number: added to the seed: a sample is the same however many are made.
        on_text: told each piece of text as it is made, whole characters only; never a stop text.
        with_expert_use: read the result once more and count which experts its tokens use.

    Raises:
        UserError: the prompt is too long for the model, or the model's output is NaN.
    """
    room = _room(opened, len(prompt_ids), sampling)
    watcher = _Watcher(opened.tokenizer, prompt_ids, sampling.stop, on_text)
    ids_BS = torch.tensor([list(prompt_ids)], device=opened.device)
    torch.manual_seed(sampling.seed + sample_number)
    with torch.inference_mode():
        whole_BS = opened.model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            generation_config=_generation_config(opened, sampling, room),
            streamer=watcher,
            logits_processor=[_refusing_nan(opened)],
            stopping_criteria=[watcher.should_stop],
        )
    watcher.finish()
    ids = whole_BS[0].tolist()
    new_ids = ids[len(prompt_ids) :]
    ended = new_ids[-1] in _end_ids(opened)
    return Sample(
        prompt=prompt,
        text=watcher.text,
        prompt_tokens=len(prompt_ids),
        tokens=len(new_ids),
        finish_reason="stop" if watcher.stopped else "end" if ended else "length",
        seed=sampling.seed + sample_number,
        expert_use=_expert_use(opened, ids, len(prompt_ids)) if with_expert_use else None,
    )


def _room(opened: OpenedModel, prompt_tokens: int, sampling: Sampling) -> int:
    left = opened.context - prompt_tokens
    if left < 1:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens; with what it writes the model reads {opened.context}; shorten it"
        )
    if sampling.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, left)
    if sampling.max_new_tokens > left:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens}: after a prompt of {prompt_tokens} tokens the model, made for "
            f"{opened.context}, can write {left}; give so many, or shorten the prompt"
        )
    return sampling.max_new_tokens


def _end_ids(opened: OpenedModel) -> list[int]:
    """Return the ids that end a text: those of the model's generation settings, and the tokenizer's."""
    given = opened.model.generation_config.eos_token_id
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    own = opened.tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]


def _generation_config(opened: OpenedModel, sampling: Sampling, room: int) -> Any:
    """Return complete settings: what stays unset would be taken from the model's directory."""
    from transformers import GenerationConfig

    end_ids, size = _end_ids(opened), len(opened.tokenizer)
    rows = opened.model.get_input_embeddings().weight.shape[0]
    drawn = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    return GenerationConfig(
        max_new_tokens=room,
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
        num_beams=1,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=end_ids or None,
        pad_token_id=opened.tokenizer.pad_token_id if not end_ids else end_ids[0],
        bos_token_id=opened.tokenizer.bos_token_id,
        suppress_tokens=list(range(size, rows)) or None,  # rows that only fill up the embedding have no text
        use_cache=True,
    )


def _refusing_nan(opened: OpenedModel) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def processor(_input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise UserError(not_finite(opened))
        return scores

    return processor


def _expert_use(opened: OpenedModel, ids: list[int], prompt_tokens: int) -> dict[str, Any] | None:
    """Read a text once more and count the experts of its generated tokens, the last one too."""
    ids_BS = torch.tensor([ids], device=opened.device)
    with count_experts(opened.model) as use, torch.inference_mode():
        use.mask_BS = (torch.arange(len(ids), device=opened.device) >= prompt_tokens)[None]
        opened.model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
    return use.report(opened.reference_top_k)


class _Watcher:
    """Sees each token as transformers' streamer, keeps the text, and says when to stop."""

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], stops: tuple[str, ...], on_text: Callable[[str], Any]
    ) -> None:
        self.text = ""
        self.stopped = False
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = stops
        self._on_text = on_text
        self._shown = 0
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt at first, then one id at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token_id in value.flatten().tolist():
            self._grow(self._stream.push(token_id))

    def end(self) -> None:
        """Take that transformers is done."""

    def should_stop(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Tell transformers whether a stop text is there."""
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device, dtype=torch.bool)

    def finish(self) -> None:
        """Give out what is left."""
        if not self.stopped:
            self._grow(self._stream.finish())
        self._show(len(self.text))

    def _grow(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        self.text += piece
        place = find_stop(self.text, self._stops)
        if place is not None:
            self.text, self.stopped = self.text[:place], True
        self._show(len(self.text) - (0 if self.stopped else held_back(self.text, self._stops)))

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._on_text(self.text[self._shown : end])
            self._shown = end
