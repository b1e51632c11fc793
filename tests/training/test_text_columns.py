import json

import pytest

from fedcore.errors import FedcoreError
from fedcore.training.datasets import load_dataset
from fedcore.training.text_columns import columns_of, fill


def test_a_template_is_filled_word_for_word():
    row = {"question": "2+2 {x}?", "answer": "4", "n": 3}
    assert columns_of("Q: {question}\nA: {answer} {question}") == ("question", "answer")
    assert fill("Q: {question}\nA: {answer}", row) == "Q: 2+2 {x}?\nA: 4"
    assert fill("{{{answer}}}", row) == "{4}"
    assert fill("question", row) == "2+2 {x}?"
    assert fill("{answer}{n}", row) == 3


@pytest.mark.parametrize("text", ["{a", "{}", "{a!r}", "{a:>3}"])
def test_what_is_no_template_is_refused(text):
    with pytest.raises(FedcoreError, match="is not a valid template"):
        columns_of(text)


def test_tables_take_templates_and_need_no_labels(tmp_path):
    rows = [{"q": f"how many {i}", "a": str(i)} for i in range(3)]
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "t.csv"
    table.write_text("a,q\n" + "".join(f"{row['a']},{row['q']}\n" for row in rows))
    for file in (lines, table):
        found = load_dataset(str(file), text_column="{q}: {a}", label_column="")
        assert found.texts == ("how many 0: 0", "how many 1: 1", "how many 2: 2")
        assert (found.label_names, found.labels) == (("all",), (0, 0, 0))
    with pytest.raises(FedcoreError, match=r"t\.csv:1: unknown column 'r'"):
        load_dataset(str(table), text_column="{q}{r}", label_column="")
    lines.write_text('{"q": "how", "a": 4}\n')
    with pytest.raises(FedcoreError, match=r"t\.jsonl:1: .* holds int, not a text"):
        load_dataset(str(lines), text_column="{q}{a}", label_column="")
    local = load_dataset(str(table), text_column="q", label_column="", subset="main")
    assert local.texts == ("how many 0", "how many 1", "how many 2")


def test_a_subset_and_a_pair_of_columns_reach_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(path, **chosen):
        asked.append((path, chosen))
        return datasets.Dataset.from_dict({"question": ["a b", "c"], "answer": ["d", "e"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    text = "{question}</s></s>{answer}"
    found = load_dataset("openai/gsm8k", text_column=text, label_column="", subset="main")
    assert asked == [("openai/gsm8k", {"split": "train", "name": "main"})]
    assert found.texts == ("a b</s></s>d", "c</s></s>e")
