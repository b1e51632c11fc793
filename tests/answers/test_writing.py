"""Greedy continuations in padded batches with a cache, against transformers one by one."""

from dataclasses import replace

import pytest
import torch

from fedcore.answers.cached import CachedModel
from fedcore.answers.scoring import score_tasks
from fedcore.answers.task import AnswerTask, Row
from fedcore.answers.writing import continuations
from fedcore.errors import FedcoreError
from tests.answers.tiny import FAMILIES, byte_tokenizer, language_model

PROMPTS = ("what is 1?", "the", "what is plus plus plus 5 and 77?", "answer 12")
TASK = AnswerTask("own", "exact", tuple(Row(p, "x") for p in PROMPTS), max_tokens=9)


def written(model, tokenizer, task, batch_size=4):
    with torch.no_grad():
        return continuations(
            CachedModel(model, tokenizer.pad_token_id), tokenizer, task, batch_size
        )


def alone(model, tokenizer, prompt, tokens):
    """Each token from the whole text, read without a cache."""
    ids = list(tokenizer(prompt).input_ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            following = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_write_what_each_prompt_alone_does(family):
    model, tokenizer = language_model(family), byte_tokenizer()
    expected = [alone(model, tokenizer, prompt, 9) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert written(model, tokenizer, TASK) == expected
    assert written(model, tokenizer, TASK, batch_size=1) == expected


def test_it_ends_at_an_end_token_a_stop_string_and_the_most_tokens():
    model, tokenizer = language_model(), byte_tokenizer()
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    whole = written(model, tokenizer, TASK)
    assert len(steps) == 9
    one = replace(TASK, rows=TASK.rows[:1])
    third = whole[0][2]
    steps.clear()
    assert written(model, tokenizer, replace(one, stop=(third,))) == [
        whole[0][: whole[0].index(third)]
    ]
    assert len(steps) <= 3
    with torch.no_grad():
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        first = int(model(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 7]
    assert written(model, tokenizer, one) == [""]


def test_a_row_that_has_ended_does_not_change_the_others():
    model, tokenizer = language_model(), byte_tokenizer()
    whole = written(model, tokenizer, TASK)
    stop = next(c for c in whole[1] if c not in whole[2])
    cut = written(model, tokenizer, replace(TASK, stop=(stop,)))
    assert cut[1] == whole[1][: whole[1].index(stop)]
    assert cut[2] == whole[2]


def test_it_ends_where_the_model_has_no_more_positions():
    model, tokenizer = language_model("gpt2"), byte_tokenizer()
    prompt = "x" * 120
    task = AnswerTask("own", "exact", (Row(prompt, "x"),), max_tokens=50)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    written(model, tokenizer, task)
    assert len(steps) == 8
    with pytest.raises(FedcoreError, match="own, row 1: it has 129 tokens"):
        written(model, tokenizer, replace(task, rows=(Row("x" * 128, "x"),)))


def test_a_task_is_scored_by_what_is_written():
    model, tokenizer = language_model(), byte_tokenizer()
    whole = written(model, tokenizer, TASK)
    right = [Row(PROMPTS[0], whole[0].upper()), Row(PROMPTS[1], "another")]
    seen = []
    (score,) = score_tasks(
        model,
        tokenizer,
        [replace(TASK, rows=(*right, *TASK.rows[2:]))],
        limit=2,
        progress=lambda *step: seen.append(step),
    )
    assert score.rows == {"exact_match": (1.0, 0.0)}
    assert (score.value("exact_match"), score.standard_error("exact_match")) == (0.5, 0.5)
    assert seen == [("own", 0, 2), ("own", 2, 2)]


def test_code_is_run_only_when_allowed(monkeypatch):
    model, tokenizer = language_model(), byte_tokenizer()
    rows = (Row("x = 5 #", "assert x == 5"), Row("y = 5 #", "assert y == 6"))
    task = AnswerTask("programs", "code", rows, stop=("\n",), max_tokens=3)
    with pytest.raises(FedcoreError, match=r"programs: .* pass --run-code"):
        score_tasks(model, tokenizer, [task])
    (score,) = score_tasks(model, tokenizer, [task], run_code=True)
    assert score.rows == {"pass@1": (1.0, 0.0)}
