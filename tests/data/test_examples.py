"""Examples from JSONL to samples with masks."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adamoe_dist.data import BatchStream, BlendedSamples, ExampleRules, ExampleSamples, keep_examples, load_examples
from adamoe_dist.data.example_samples import packed
from adamoe_dist.data.example_tokens import tokens_of_example
from adamoe_dist.data.examples import Completion, Conversation, parse_example, read_examples
from adamoe_dist.errors import UserError

EOD = 1


class Letters:
    """One id a character."""

    vocab_size = 200
    eod_id = EOD
    fingerprint = "letters"
    chat_template: str | None = None
    prefix_ids: list[int] = []  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Chat(Letters):
    """With a template: <role>content; and, where it is not stable, a count of the messages before them."""

    chat_template = "of its own"
    fingerprint = "chat"

    def __init__(self, is_stable: bool = True) -> None:
        self.is_stable = is_stable

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, **_: object
    ) -> list[int]:
        if messages[0]["role"] == "tool":
            raise ValueError("no tools\nhere")
        text = "" if self.is_stable else str(len(messages))
        text += "".join(f"<{message['role']}>{message['content']};" for message in messages)
        return self.encode(text + "<assistant>" * add_generation_prompt)


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def learnt(tokens: Any, tokenizer: Letters) -> str:
    """The text that the loss is of, ids of document ends as |."""
    return "".join("|" if token == EOD else chr(token) for token, target in zip(*tokens, strict=True) if target)


CHAT = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B"},
]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("9" * 5000, "is JSON that cannot be read .a number of too many digits"),
        ("[" * 100_000, "is JSON that cannot be read .values within values too deep"),
        ("[1]", "is no JSON object"),
        ({"prompt": "a"}, "its keys are prompt"),
        ({"text": "a"}, 'needs the keys "prompt" and "completion", or "messages"'),
        ({**pair("a", "b"), "messages": []}, "its keys are completion, messages, prompt"),
        (pair("a", "  "), "empty completion"),
        ({"prompt": 3, "completion": "b"}, "prompt is of type int"),
        (pair("a", "\ud800"), "half of a surrogate pair"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is no object"),
        ({"messages": [{"role": "assistant", "content": ""}]}, r"messages\[0\] of the assistant is empty"),
        ({"messages": CHAT[:2]}, "must be the assistant's"),
    ],
)
def test_bad_lines_are_refused_by_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "x.jsonl", [pair("a", "b"), "", line])
    with pytest.raises(UserError, match=message) as caught:
        list(read_examples(path))
    assert str(caught.value).startswith(f"{path}:3 ") and "\n" not in str(caught.value)


def test_files_are_refused_by_name(tmp_path: Path) -> None:
    for name, lines, message in (
        ("absent.jsonl", None, "no such file"),
        ("x.txt", ["a"], "read from .jsonl"),
        ("empty.jsonl", [""], "holds no example"),
    ):
        if lines is not None:
            write(tmp_path / name, lines)
        with pytest.raises(UserError, match=message):
            list(read_examples(tmp_path / name))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair("a", "b")).encode())[:-6])
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(read_examples(tmp_path / "x.jsonl.gz"))
    with pytest.raises(UserError, match="a directory; name a JSONL file"):
        load_examples(str(tmp_path), Letters(), ExampleRules(17), tmp_path / "kept")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(pair("a", "b")) + "\n", encoding="utf-8-sig")
    (example,) = read_examples(tmp_path / "x.jsonl")
    assert isinstance(example, Completion) and example.completion == "b"


def test_the_loss_is_of_completions_and_what_ends_them() -> None:
    example = parse_example(json.dumps({**pair("ab", "cd"), "id": 7}), "f:1")
    tokens = tokens_of_example(example, Letters())
    assert tokens.ids == [*map(ord, "abcd"), EOD] and learnt(tokens, Letters()) == "cd|"
    assert learnt(tokens_of_example(example, Letters(), on_all=True), Letters()) == "abcd|"
    assert learnt(tokens_of_example(Completion("", "xy", "f:1"), Letters()), Letters()) == "xy|"


def test_conversations_without_a_template_are_plain() -> None:
    tokens = tokens_of_example(Conversation(CHAT, "f:1"), Letters())
    text = "".join("|" if token == EOD else chr(token) for token in tokens.ids)
    assert text == "system: be\nuser: a?\nassistant: A|user: b?\nassistant: B|"
    assert learnt(tokens, Letters()) == "A|B|"
    with pytest.raises(UserError, match=r"f:9 messages\[0\] has role 'tool'"):
        tokens_of_example(Conversation([{"role": "tool", "content": "x"}, CHAT[2]], "f:9"), Letters())


def test_conversations_go_through_the_tokenizers_template() -> None:
    tokens = tokens_of_example(Conversation(CHAT, "f:1"), Chat())
    assert tokens.ids == [*map(ord, "<system>be;<user>a?;<assistant>A;<user>b?;<assistant>B;"), EOD]
    assert learnt(tokens, Chat()) == "A;B;|"
    with pytest.raises(UserError, match=r"f:1 messages\[2\]: .*renders the messages before it otherwise"):
        tokens_of_example(Conversation(CHAT, "f:1"), Chat(is_stable=False))
    with pytest.raises(UserError, match=r"f:2: .* does not take its messages \(no tools here\)"):
        tokens_of_example(Conversation([{"role": "tool", "content": "x"}, CHAT[2]], "f:2"), Chat())


def test_what_the_tokenizer_puts_before_a_text_is_read_and_not_learnt() -> None:
    class Begins(Letters):
        prefix_ids = [2]  # noqa: RUF012

    class BeginsChat(Chat):
        prefix_ids = [2]  # noqa: RUF012

    for example, text in ((Completion("ab", "cd", "f:1"), "abcd|"), (Conversation(CHAT[1:3], "f:1"), None)):
        for on_all in (False, True):
            plain, tokens = (tokens_of_example(example, kind(), on_all) for kind in (Letters, Begins))
            assert tokens.ids == [2, *plain.ids] and tokens.targets == [False, *plain.targets]
        assert text is None or learnt(tokens, Begins()) == text
    conversation = Conversation(CHAT, "f:1")
    assert tokens_of_example(conversation, BeginsChat()) == tokens_of_example(conversation, Chat())


LINES = [pair("p" * (n % 5), "c" * (1 + n % 7)) for n in range(40)]


def samples_of(path: str, length: int = 16, **more: Any) -> ExampleSamples:
    store = load_examples(path, Letters(), ExampleRules(length + 1))
    return ExampleSamples(path, store, length, seed=3, tokenizer_fingerprint="letters", **more)


def test_long_examples_are_refused_cut_or_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [pair("a", "bc"), pair("ab", "cdefgh"), pair("abcdefgh", "i")])
    with pytest.raises(UserError, match=r":2 has 9 tokens, more than model.sequence_length \+ 1 = 5"):
        load_examples(path, Letters(), ExampleRules(5))
    cut = load_examples(path, Letters(), ExampleRules(5, "truncate"))
    assert (cut.counts.examples, cut.counts.truncated, cut.counts.skipped) == (2, 1, 1)
    assert cut.lengths.tolist() == [4, 5] and cut.counts.target_bytes == 5
    left = load_examples(path, Letters(), ExampleRules(5, "skip"))
    assert (left.counts.examples, left.counts.truncated, left.counts.skipped) == (1, 0, 2)
    with pytest.raises(UserError, match="nothing is left"):
        load_examples(write(tmp_path / "y.jsonl", [pair("abcdefgh", "i")]), Letters(), ExampleRules(5, "skip"))


@pytest.mark.parametrize("packing", [False, True])
def test_every_example_is_in_each_epoch_once_whole_and_masked(tmp_path: Path, packing: bool) -> None:
    samples = samples_of(write(tmp_path / "x.jsonl", LINES), packing=packing)
    assert (len(samples) == 40) != packing
    orders = []
    for epoch in range(2):
        seen: Counter[tuple[str, str]] = Counter()
        orders.append([])
        for index in range(len(samples)):
            sample = samples[epoch * len(samples) + index]
            real = int((~sample.padding_mask).sum()) + 1
            assert not sample.padding_mask[: real - 1].any() and sample.padding_mask[real - 1 :].all()
            assert not (sample.loss_mask & sample.padding_mask).any()
            text = sample.tokens[:real].tolist()
            wanted = []
            for part in "".join("|" if token == EOD else chr(token) for token in text).split("|")[:-1]:
                prompt = part.count("p")
                seen[part[:prompt], part[prompt:]] += 1
                wanted += [False] * max(prompt, 1) + [True] * (len(part) - max(prompt, 1) + 1)
            assert sample.loss_mask[: real - 1].tolist() == wanted[1:]
            orders[-1].append(text)
        assert seen == Counter((line["prompt"], line["completion"]) for line in LINES)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_packing_fills_sequences_with_whole_examples() -> None:
    lengths = np.random.default_rng(0).integers(1, 17, 500)
    sequences = packed(lengths, np.arange(500), 17)
    assert sorted(example for members in sequences for example in members) == list(range(500))
    sizes = [lengths[members].sum() for members in sequences]
    assert max(sizes) <= 17 and sum(sizes) / (17 * len(sizes)) > 0.9


def test_what_is_kept_is_what_is_cut(tmp_path: Path) -> None:
    path, rules = write(tmp_path / "x.jsonl", LINES), ExampleRules(17)
    fresh = load_examples(path, Letters(), rules, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    keep_examples(fresh, tmp_path / "kept")
    kept = load_examples(path, Letters(), rules, tmp_path / "kept")
    assert isinstance(kept.ids, np.memmap) and kept.fingerprint() == fresh.fingerprint()
    assert kept.counts == fresh.counts
    write(tmp_path / "x.jsonl", LINES[:-1])
    assert load_examples(path, Letters(), rules, tmp_path / "kept").counts.examples == 39


def test_writing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    store = load_examples(write(tmp_path / "x.jsonl", LINES), Letters(), ExampleRules(17))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space"):
        keep_examples(store, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_batches_resume_and_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    sets = [samples_of(write(tmp_path / f"{part}.jsonl", LINES[part::2])) for part in (0, 1)]
    blend = BlendedSamples(sets, [3, 1], seed=1)
    whole = BatchStream(blend, 8, 8, 0, 1)
    steps = [whole.next_step()[0] for _ in range(6)]
    state = json.loads(json.dumps(BatchStream(blend, 8, 8, 0, 1, consumed_samples=32).state_dict()))
    for rank in range(2):
        stream = BatchStream(BlendedSamples(sets, [3, 1], seed=1), 8, 2, rank, 2)
        stream.load_state_dict(state)
        for step in steps[4:]:
            for number, batch in enumerate(stream.next_step()):
                rows = slice((2 * number + rank) * 2, (2 * number + rank) * 2 + 2)
                for name in ("tokens", "loss_mask", "padding_mask"):
                    assert torch.equal(getattr(batch, name), getattr(step, name)[rows])
    masked_otherwise = samples_of(sets[0].prefix, packing=True)
    other = BatchStream(BlendedSamples([masked_otherwise, sets[1]], [3, 1], seed=1), 8, 8, 0, 1)
    with pytest.raises(UserError, match="is not the checkpoint's data"):
        other.load_state_dict(state)


def test_a_hugging_face_template_marks_the_assistants_turns(tmp_path: Path) -> None:
    """The real classes: marks are special tokens, which a text cannot forge."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from adamoe_dist.data import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", additional_special_tokens=["<|turn|>"])
    made.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
    )
    made.save_pretrained(tmp_path / "hf")
    tokenizer = Tokenizer.load(tmp_path / "hf")
    tokens = tokens_of_example(Conversation(CHAT, "f:1"), tokenizer)
    assert tokenizer.decode(tokens.ids) == (
        "<|turn|>system:be</s><|turn|>user:a?</s><|turn|>assistant:A</s><|turn|>user:b?</s><|turn|>assistant:B</s>"
    )
    learnt_ids = [token for token, target in zip(*tokens, strict=True) if target]
    assert tokenizer.decode(learnt_ids) == "A</s>B</s>" and learnt_ids.count(tokenizer.eod_id) == 2
