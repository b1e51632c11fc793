import json
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import FedcoreError
from fedcore.training.datasets import (
    TextDataset,
    load_dataset,
    split_indices,
    subsample,
    train_test_split,
)


@pytest.fixture(scope="module")
def bbc() -> TextDataset:
    return load_dataset("bbc-news")


def _toy(*counts: int) -> TextDataset:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return TextDataset(
        tuple(f"text {i}" for i in range(len(labels))),
        tuple(labels.tolist()),
        tuple(f"class {k}" for k in range(len(counts))),
        "toy",
    )


def test_bbc_news_holds_its_documents_once(bbc: TextDataset, capsys) -> None:
    assert len(bbc) + bbc.duplicates == 2225
    assert bbc.duplicates == 100
    assert len({" ".join(text.split()) for text in bbc.texts}) == len(bbc)
    assert bbc.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert bbc.class_counts.tolist() == [503, 369, 403, 503, 347]
    assert list(bbc.labels) == sorted(bbc.labels)
    assert bbc.texts[0].startswith("Ad sales boost Time Warner profit")
    load_dataset("bbc-news")
    assert capsys.readouterr().out == ""


def test_no_bbc_text_stands_on_both_sides_of_a_split(bbc: TextDataset) -> None:
    train, test = train_test_split(bbc, 0.2, seed=3)
    assert not set(train.texts) & set(test.texts)
    assert len(test) == round(0.2 * len(bbc))
    assert np.abs(test.class_counts - 0.2 * bbc.class_counts).max() < 1


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_three_file_kinds_hold_the_same_data(tmp_path: Path, suffix: str) -> None:
    rows = [("a, b\tc", "10"), ('say "hi"\nnow', "9"), ("Grüße \u2028", "9"), ("a,  b c", "10")]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"y": int(y), "id": 7, "x": x}, ensure_ascii=False) for x, y in rows]
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    else:
        sep = "," if suffix == ".csv" else "\t"
        quoted = [sep.join((y, "7", '"' + x.replace('"', '""') + '"')) for x, y in rows]
        path.write_text("\n".join([sep.join(("y", "id", "x")), *quoted]), encoding="utf-8-sig")
    data = load_dataset(str(path), text_column="x", label_column="y")
    assert data.texts == tuple(x for x, _ in rows[:3])
    assert data.label_names == ("9", "10")
    assert data.labels == (1, 0, 0)
    assert data.duplicates == 1


def test_labels_sort_as_numbers_only_if_all_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,10\nb,9\nc,x\n")
    assert load_dataset(str(path)).label_names == ("10", "9", "x")


BAD_FILES = {
    "no header": ("a.csv", b"", r"a\.csv:1: unknown column 'text'"),
    "column": ("a.csv", b"txt,label\nx,1\n", r"a\.csv:1: unknown column 'text'; did you mean txt"),
    "column twice": (
        "a.csv",
        b"text,text,label\nx,y,1\n",
        r"a\.csv:1: column 'text' appears 2 times",
    ),
    "short row": ("a.csv", b"text,label\nx,1\ny\n", r"a\.csv:3: 1 fields; the header has 2"),
    "long row": ("a.csv", b"text,label\nx,1,2\n", r"a\.csv:2: 3 fields; the header has 2"),
    "empty label": ("a.csv", b"text,label\nx,1\n\ny, \n", r"a\.csv:4: column 'label' is empty"),
    "empty text": ("a.csv", b"text,label\n,1\n", r"a\.csv:2: column 'text' is empty"),
    "open quote": ("a.csv", b'text,label\n"x,1\n', r"a\.csv:\d: unexpected end of data"),
    "bytes": ("a.csv", b"text,label\nx,1\n\xa3,2\n", r"a\.csv:3: byte 0xa3 is not UTF-8"),
    "no rows": ("a.tsv", b"text\tlabel\n", r"a\.tsv: no rows"),
    "one class": ("a.csv", b"text,label\nx,1\ny,1\n", r"1 class \['1'\]; classification needs two"),
    "not json": ("a.jsonl", b'{"text": "x", "label": 1}\n{\n', r"a\.jsonl:2: not JSON"),
    "not an object": ("a.jsonl", b"[1]\n", r"a\.jsonl:1: list, not a JSON object"),
    "no key": ("a.jsonl", b'{"text": "x"}\n', r"a\.jsonl:1: unknown column 'label'"),
    "null label": (
        "a.jsonl",
        b'{"text": "x", "label": null}\n',
        r"jsonl:1: .*'label' holds NoneType",
    ),
    "float label": (
        "a.jsonl",
        b'{"text": "x", "label": 1.5}\n',
        r"jsonl:1: .*'label' holds float",
    ),
    "bool label": ("a.jsonl", b'{"text": "x", "label": true}\n', r"jsonl:1: .*'label' holds bool"),
    "text type": ("a.jsonl", b'{"text": 3, "label": 1}\n', r"jsonl:1: column 'text' holds int"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_malformed_files_name_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FedcoreError, match=message) as error:
        load_dataset(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_only_hub_datasets_have_splits() -> None:
    with pytest.raises(FedcoreError, match="has no splits; split='test' was given"):
        load_dataset("bbc-news", split="test")


class _FakeHub:
    def __init__(self, monkeypatch, tables) -> None:
        self.asked: list[tuple[str, str]] = []

        def load(name, split):
            self.asked.append((name, split))
            if split not in tables:
                raise ValueError(f'Unknown split "{split}".\nmore')
            return tables[split]

        monkeypatch.setattr("datasets.load_dataset", load)


def test_hub_datasets_keep_their_declared_classes(monkeypatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    plain = datasets.Dataset.from_dict({"body": ["a", "b", "a"], "label": ["y", "x", "y"]})
    hub = _FakeHub(monkeypatch, {"train": train, "test": hidden, "plain": plain})

    data = load_dataset("hf:imdb")
    assert hub.asked == [("imdb", "train")]
    assert (data.texts, data.labels, data.label_names) == (("a", "b"), (1, 0), ("pos", "neg"))
    other = load_dataset("owner/name", split="plain", text_column="body")
    assert (other.labels, other.label_names, other.duplicates) == ((1, 0), ("x", "y"), 1)
    with pytest.raises(FedcoreError, match=r"'owner/name', split 'plain': unknown column 'text'"):
        load_dataset("owner/name", split="plain")
    with pytest.raises(FedcoreError, match="row 1: 'label' is -1, not a label"):
        load_dataset("hf:imdb", split="test")
    with pytest.raises(FedcoreError, match=r"split 'dev': Unknown split \"dev\"\.$"):
        load_dataset("hf:imdb", split="dev")


def test_a_bad_name_never_reaches_the_hub(monkeypatch) -> None:
    hub = _FakeHub(monkeypatch, {})
    with pytest.raises(FedcoreError, match="did you mean bbc-news"):
        load_dataset("bbc-nws")
    assert hub.asked == []


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("counts", [(40, 40), (61, 7, 2), (100, 1, 3)])
def test_split_is_stratified_disjoint_and_deterministic(counts, fraction: float) -> None:
    data = _toy(*counts)
    train, test = split_indices(data, fraction, seed=5)
    assert sorted([*train, *test]) == list(range(len(data)))
    assert len(test) == round(fraction * len(data))
    held = data.take(test).class_counts
    assert np.abs(held - fraction * np.array(counts)).max() <= 1
    assert (held < np.array(counts)).all()
    again = split_indices(data, fraction, seed=5)
    assert np.array_equal(train, again[0])
    assert np.array_equal(test, again[1])
    assert not np.array_equal(test, split_indices(data, fraction, seed=6)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan"), 0.99, 0.001])
def test_impossible_test_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(FedcoreError, match="test_fraction"):
        split_indices(_toy(10, 10), fraction, seed=0)


def test_subsample_keeps_proportions_and_every_class() -> None:
    data = _toy(900, 90, 10)
    small = subsample(data, 100, seed=1)
    assert len(small) == 100
    assert small.class_counts.tolist() == [90, 9, 1]
    assert subsample(_toy(990, 7, 3), 20, seed=1).class_counts.tolist() == [18, 1, 1]
    assert subsample(data, 3, seed=1).class_counts.tolist() == [1, 1, 1]
    assert subsample(data, 100, seed=1) == small
    assert subsample(data, 100, seed=2) != small
    assert subsample(data, 1000, seed=1) is data
    order = [int(text.split()[1]) for text in small.texts]
    assert order == sorted(order)
    with pytest.raises(FedcoreError, match="max_examples is 2; 3 classes need one each"):
        subsample(data, 2, seed=1)


def test_a_dataset_checks_its_labels() -> None:
    with pytest.raises(FedcoreError, match="2 texts, 1 labels"):
        TextDataset(("a", "b"), (0,), ("x", "y"), "toy")
    with pytest.raises(FedcoreError, match="labels span 0 to 2, where there are 2 label names"):
        TextDataset(("a", "b"), (0, 2), ("x", "y"), "toy")
