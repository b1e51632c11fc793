"""Options read from the prompt's cache, against the whole text read without one."""

from dataclasses import replace

import pytest
import torch

from fedcore.answers.cached import CachedModel
from fedcore.answers.likelihoods import option_likelihoods
from fedcore.answers.scoring import score_tasks
from fedcore.answers.task import AnswerTask, Row
from fedcore.errors import FedcoreError
from tests.answers.tiny import FAMILIES, byte_tokenizer, language_model

ROWS = tuple(
    Row("what is " + "plus " * (i % 4) + f"{i}?", i % 3, (f" {2 * i}", " the answer", " the a9 b"))
    for i in range(7)
)
TASK = AnswerTask("sums", "choice", ROWS)


def whole(model, tokenizer, row):
    """Each option's log-likelihood in fp64, from a pass over prompt and option without a cache."""
    start = len(tokenizer(row.prompt).input_ids)
    values = []
    for option in row.options:
        ids = tokenizer(row.prompt + option, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].double()
        values.append(float(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()))
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(family):
    model, tokenizer = language_model(family), byte_tokenizer()
    cached = CachedModel(model, tokenizer.pad_token_id)
    assert cached.caches == (family != "mamba")
    expected = [whole(model, tokenizer, row) for row in ROWS]
    assert len({round(value) for values in expected for value in values}) > 9
    with torch.no_grad():
        for batch_size in (1, 3, 50):
            scores = option_likelihoods(cached, tokenizer, TASK, batch_size)
            for ours, theirs in zip(scores, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_a_prompt_is_read_once():
    model, tokenizer = language_model(), byte_tokenizer()
    read = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    one = replace(TASK, rows=ROWS[3:4])
    score_tasks(model, tokenizer, [one])
    prompt = tokenizer(ROWS[3].prompt).input_ids
    options = [
        len(tokenizer(ROWS[3].prompt + option).input_ids) - len(prompt)
        for option in ROWS[3].options
    ]
    # Then the options, without their last tokens.
    assert read == [(1, len(prompt)), (3, max(options) - 1)]


def test_a_choice_is_the_likeliest_option_and_by_characters():
    model, tokenizer = language_model(), byte_tokenizer()
    (score,) = score_tasks(model, tokenizer, [TASK])
    for i, row in enumerate(ROWS):
        values = torch.tensor(whole(model, tokenizer, row))
        lengths = torch.tensor([len(option.strip()) for option in row.options])
        assert score.rows["acc"][i] == float(int(values.argmax()) == row.answer)
        assert score.rows["acc_norm"][i] == float(int((values / lengths).argmax()) == row.answer)
    # Otherwise the two would not be told apart here.
    assert score.rows["acc"] != score.rows["acc_norm"]


@pytest.mark.parametrize(("prompt", "option"), [("what i", "s the"), ("the answer", "")])
def test_an_option_that_changes_the_prompts_tokens_is_refused(prompt, option):
    tokenizer = byte_tokenizer()
    row = Row(prompt, 0, (option or " x", " 7"))
    task = AnswerTask("own", "choice", (ROWS[0], row))
    if option:
        with pytest.raises(FedcoreError, match="own, row 2: an option changes the prompt's tokens"):
            score_tasks(language_model(), tokenizer, [task])
    else:
        score_tasks(language_model(), tokenizer, [task])


def test_what_is_longer_than_the_model_reads_is_refused_before_anything_is_computed():
    model, tokenizer = language_model("gpt2"), byte_tokenizer()
    task = AnswerTask("own", "choice", (ROWS[0], Row("x" * 127, 0, (" y", " z"))))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        FedcoreError, match="own, row 2: it has 129 tokens, and the model reads 128"
    ):
        score_tasks(model, tokenizer, [task])
    assert not calls


def test_the_model_is_left_in_the_mode_that_it_was_in():
    model, tokenizer = language_model(), byte_tokenizer()
    model.train()
    score_tasks(model, tokenizer, [TASK])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
