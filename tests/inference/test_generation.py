"""Generated text: with a cache as without, the same for the same seed, whole characters, stop texts."""

import pytest
import torch

from adamoe_dist.data import Conversation, Document, Tokenizer, tokens_of_example, train_tokenizer
from adamoe_dist.errors import UserError
from adamoe_dist.hf import transformers_tokenizer
from adamoe_dist.inference import (
    Sampling,
    cut_document,
    encode_chat,
    encode_prompt,
    fit_conversation,
    generate,
    open_model,
    score_documents,
)
from adamoe_dist.inference.decoding import TextStream, find_stop, held_back
from tests.inference.conftest import FAMILIES
from tests.inference.tiny import CONTEXT, TEXT, save_model

PROMPT = "The cat sat"


def greedy_ids(opened, ids: list[int], steps: int) -> list[int]:
    """Greedy decoding that reads everything again for each token; only ids that have text."""
    made: list[int] = []
    while len(made) < steps and (not made or made[-1] != opened.tokenizer.eos_token_id):
        logits_V = opened.model(torch.tensor([ids + made]), use_cache=False).logits[0, -1, : len(opened.tokenizer)]
        made.append(int(logits_V.argmax()))
    return made


def run(opened, prompt: str = PROMPT, number: int = 0, **options):
    pieces: list[str] = []
    use = options.pop("with_expert_use", False)
    sample = generate(
        opened, prompt, encode_prompt(opened, prompt), Sampling(**options), number, pieces.append, with_expert_use=use
    )
    assert "".join(pieces) == sample.text, "what was streamed is not what was returned"
    return sample, pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_without_a_cache(opened_models, family: str) -> None:
    opened = opened_models[family]
    ids = encode_prompt(opened, PROMPT)
    expected = greedy_ids(opened, ids, 20)
    sample, _ = run(opened, max_new_tokens=20, temperature=0)
    assert sample.tokens == len(expected) and sample.prompt_tokens == len(ids)
    assert sample.text == opened.tokenizer.decode(expected, skip_special_tokens=True)
    ended = expected[-1] == opened.tokenizer.eos_token_id
    assert sample.finish_reason == ("end" if ended else "length")


def test_a_seed_decides_and_samples_do_not_depend_on_their_number(opened_models) -> None:
    opened = opened_models["adamoe"]
    texts = [run(opened, number=number, seed=5, max_new_tokens=12)[0].text for number in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert run(opened, seed=6, max_new_tokens=12)[0].text == texts[1]
    assert run(opened, seed=6, max_new_tokens=12)[0].seed == 6


def test_sampling_follows_the_options(opened_models) -> None:
    opened = opened_models["mixtral"]
    greedy = run(opened, temperature=0, max_new_tokens=10)[0].text
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert run(opened, max_new_tokens=10, seed=3, **narrow)[0].text == greedy, narrow
    wide = {run(opened, max_new_tokens=10, seed=seed)[0].text for seed in range(4)}
    assert len(wide) == 4
    ids = greedy_ids(opened, encode_prompt(opened, PROMPT), 30)
    assert len(set(ids)) < len(ids)
    unlike = run(opened, temperature=0, max_new_tokens=30, repetition_penalty=50.0)[0]
    assert unlike.text != run(opened, temperature=0, max_new_tokens=30)[0].text


def test_every_option_reaches_the_drawing_whatever_the_directory_says(tmp_path) -> None:
    """A directory may bring sampling settings of its own; options that are off stay off."""
    from transformers import GenerationConfig

    path = save_model(tmp_path, "olmoe")
    plain = run(open_model(path), max_new_tokens=12, seed=1)[0].text
    GenerationConfig(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0).save_pretrained(path)
    assert run(open_model(path), max_new_tokens=12, seed=1)[0].text == plain


@pytest.mark.parametrize("cut", [1, 3])
def test_a_stop_text_ends_a_sample_and_is_never_shown(opened_models, cut: int) -> None:
    opened = opened_models["olmoe"]
    whole = run(opened, temperature=0, max_new_tokens=40)[0].text
    stop = whole[len(whole) // 2 :][:cut]
    sample, pieces = run(opened, temperature=0, max_new_tokens=40, stop=("not there", stop))
    assert sample.text == whole[: whole.index(stop)] and sample.finish_reason == "stop"
    assert stop not in "".join(pieces) and sample.tokens < 40


def test_rows_without_text_are_never_drawn(opened_models) -> None:
    opened = opened_models["mixtral"]
    rows = opened.model.get_input_embeddings().weight.shape[0]
    assert rows > len(opened.tokenizer)
    with torch.no_grad():
        opened.model.lm_head.weight[-5:] *= 1e3
        try:
            ids = encode_prompt(opened, PROMPT)
            expected = greedy_ids(opened, ids, 8)
            sample, _ = run(opened, temperature=0, max_new_tokens=8)
        finally:
            opened.model.lm_head.weight[-5:] /= 1e3
    assert sample.text == opened.tokenizer.decode(expected, skip_special_tokens=True)


def test_experts_of_generated_tokens_alone_are_counted(opened_models) -> None:
    opened = opened_models["adamoe"]
    sample, _ = run(opened, temperature=0, max_new_tokens=9, with_expert_use=True)
    assert sample.expert_use["tokens"] == sample.tokens == 9
    ids = encode_prompt(opened, PROMPT)
    whole = ids + greedy_ids(opened, ids, 9)
    logits = opened.model(torch.tensor([whole]), output_router_logits=True).router_logits
    for layer, logits_TA in zip(sample.expert_use["layers"], logits, strict=True):
        chosen_TK = logits_TA[len(ids) :].topk(3).indices
        assert layer["true_experts_per_token"] == pytest.approx((chosen_TK < 4).sum().item() / 9)
    assert sample.expert_use["expert_flops_saved"] == pytest.approx(1 - sample.expert_use["true_experts_per_token"] / 2)


def test_length_is_that_of_the_model(opened_models) -> None:
    opened = opened_models["mixtral"]
    assert run(opened, temperature=0)[0].tokens <= CONTEXT - len(encode_prompt(opened, PROMPT))
    with pytest.raises(UserError, match="--max-new-tokens 64: after a prompt of"):
        run(opened, max_new_tokens=64)
    with pytest.raises(UserError, match="; shorten it"):
        run(opened, prompt="house " * 99)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_broken_model_is_refused(tmp_path, temperature: float) -> None:
    opened = open_model(save_model(tmp_path, "adamoe"))
    with torch.no_grad():
        opened.model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match="its output is NaN or infinite"):
        run(opened, temperature=temperature)
    with pytest.raises(UserError, match="its output is NaN or infinite"):
        score_documents(opened, [cut_document(opened, "The cat", "text", 8, 8)], 1)


def test_an_empty_prompt_begins_a_text(opened_models) -> None:
    for family in ("mixtral", "olmoe"):
        opened = opened_models[family]
        assert encode_prompt(opened, "") == [opened.prefix_id]
        assert run(opened, prompt="", temperature=0, max_new_tokens=4)[0].prompt_tokens == 1


def test_a_conversation_without_a_template_is_that_of_fine_tuning(opened_models, tmp_path) -> None:
    opened = opened_models["mixtral"]
    opened.tokenizer.save_pretrained(tmp_path)
    said = [("system", "Be short."), ("user", "Is it blue?"), ("assistant", "yes"), ("user", "And red?")]
    messages = [{"role": role, "content": content} for role, content in said]
    answered = Conversation([*messages, {"role": "assistant", "content": "no"}], "here")
    learnt, targets = tokens_of_example(answered, Tokenizer.load(tmp_path))
    ids = encode_chat(opened, messages)
    assert learnt[: len(ids)] == ids
    assert all(targets[len(ids) :]) and not targets[len(ids) - 1], "the answer begins there"


def test_a_conversation_by_the_template(tmp_path) -> None:
    messages = [{"role": "user", "content": "blue?"}]
    chatty = open_model(save_model(tmp_path, "adamoe", with_bos=False, with_chat=True))
    ids = encode_chat(chatty, messages)
    assert chatty.tokenizer.decode(ids) == "<user>blue?\n<assistant>"
    exchange = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    sampling = Sampling(max_new_tokens=8)
    assert fit_conversation(chatty, messages, sampling) == messages
    system = [{"role": "system", "content": "be kind"}]
    begun = fit_conversation(chatty, [*system, *exchange * 9, *messages], sampling)
    assert begun == [*system, *exchange * ((len(begun) - 2) // 2), *messages] and len(begun) < 20
    kept = fit_conversation(chatty, [*exchange * 9, *messages], sampling)
    assert kept == [*exchange * ((len(kept) - 1) // 2), *messages] and 1 < len(kept) < 19
    assert len(encode_chat(chatty, kept)) + 8 <= CONTEXT < len(encode_chat(chatty, [*exchange, *kept])) + 8


@pytest.mark.parametrize("start", [0, 1, 5, 30])
def test_text_comes_in_whole_characters_and_complete(opened_models, start: int) -> None:
    tokenizer = opened_models["mixtral"].tokenizer
    for text in TEXT:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(tokenizer, ids[:start])
        pieces = [stream.push(token_id) for token_id in ids[start:]]
        assert not any("\ufffd" in piece for piece in pieces[1:])
        whole = "".join(pieces) + stream.finish()
        if "\ufffd" not in tokenizer.decode(ids[:start]):
            assert tokenizer.decode(ids[:start]) + whole == text


def test_a_sentencepiece_tokenizer_keeps_its_spaces(tmp_path) -> None:
    train_tokenizer((Document(text, "text") for text in TEXT * 20), 340, tmp_path)
    tokenizer = transformers_tokenizer(tmp_path)
    for text in [*TEXT, " two  spaces", "\nlines\n\n", "\u2581 mark"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for start in (0, 1, 9):
            stream = TextStream(tokenizer, ids[:start])
            whole = "".join([stream.push(token_id) for token_id in ids[start:]]) + stream.finish()
            if "\ufffd" not in tokenizer.decode(ids[:start]):
                assert tokenizer.decode(ids[:start]) + whole == text


def test_bytes_that_are_no_character_come_out_at_the_end(opened_models) -> None:
    tokenizer = opened_models["mixtral"].tokenizer
    half = tokenizer.encode("日", add_special_tokens=False)[:-1]
    assert half
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in half] == [""] * len(half)
    assert stream.finish() == tokenizer.decode(half) != ""


def test_what_may_become_a_stop_text_waits() -> None:
    assert held_back("abcEN", ["END", "x"]) == 2
    assert held_back("abc", ["END"]) == 0 and held_back("abc", []) == 0
    assert held_back("aa", ["aab"]) == 2 and held_back("b" * 9, ["bb"]) == 1
    assert find_stop("one two", ["two", "ne"]) == 1 and find_stop("one", ["two"]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"stop": ("",)}, "--stop"),
    ],
)
def test_options_that_draw_nothing_are_refused(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options).check()
