import csv
import json

import pytest

from fedcore.errors import FedcoreError
from fedcore.training.conversations import Example, RowFormat, load_conversations

SECRET = "Schmidt"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [user("What is 3 plus 4?"), assistant("7"), user("And 5?"), assistant("12")]


def test_messages_are_divided_by_what_is_learned():
    row = {"messages": TALK}
    assert RowFormat().example(row, 3, "x:3") == Example(3, tuple(TALK[:3]), tuple(TALK[3:]))
    whole = tuple(TALK)
    assert RowFormat(loss="all").example(row, 1, "x") == Example(1, (), whole)
    assert RowFormat(loss="assistant").example(row, 1, "x") == Example(1, (), whole, True)
    pair = {"prompt": TALK[:1], "completion": TALK[1:]}
    example = RowFormat("prompt_completion").example(pair, 1, "x")
    assert example == Example(1, tuple(TALK[:1]), tuple(TALK[1:]))


@pytest.mark.parametrize("blanks", ["", " ", "\n\n", " \t\n"])
def test_blanks_at_a_prompt_s_end_move_to_the_completion(blanks):
    form = RowFormat("prompt_completion")
    example = form.example({"prompt": f" a b{blanks}", "completion": " c "}, 1, "x")
    assert (example.prompt, example.completion) == (" a b", f"{blanks} c ")
    text = RowFormat("text").example({"text": f"a{blanks}"}, 1, "x")
    assert (text.prompt, text.completion) == ("", f"a{blanks}")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_holds_the_same_conversations(tmp_path, suffix):
    rows = [{"id": "7", "talk": TALK}, {"id": "8", "talk": [*TALK[:1], assistant("a\u2028, b\n")]}]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif suffix == ".parquet":
        from pyarrow import Table, parquet

        # A message of other rows may have more keys, which are null here.
        talks = [[{**message, "name": None} for message in row["talk"]] for row in rows]
        parquet.write_table(Table.from_pylist([{"id": 7, "talk": talk} for talk in talks]), file)
    else:
        with open(file, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, delimiter="," if suffix == ".csv" else "\t")
            writer.writerow(["id", "talk"])
            writer.writerows((row["id"], json.dumps(row["talk"])) for row in rows)
    form = RowFormat(columns={"messages": "talk"})
    found = load_conversations(str(file), form)
    assert [example.completion for example in found.examples] == [
        tuple(row["talk"][-1:]) for row in rows
    ]
    first = 1 if suffix in (".jsonl", ".parquet") else 2
    assert [found.place(i) for i in range(2)] == [f"{file}:{first}", f"{file}:{first + 1}"]
    assert found.take([1]).place(0) == f"{file}:{first + 1}"
    with pytest.raises(FedcoreError, match="has no splits; leave out split"):
        load_conversations(str(file), form, split="test")


def test_a_dataset_of_the_hub_is_read_by_rows(monkeypatch):
    import datasets

    asked = []

    def load(path, **chosen):
        asked.append((path, chosen))
        rows = [{"q": "2 + 2", "a": "4", "n": 1}, {"q": "", "a": "5", "n": 2}]
        return datasets.Dataset.from_list(rows[: len(asked)])

    monkeypatch.setattr("datasets.load_dataset", load)
    form = RowFormat("prompt_completion", {"prompt": "q", "completion": "a"})
    found = load_conversations("openai/gsm8k", form, subset="main")
    assert found.examples == (Example(1, "2 + 2", "4"),)
    assert asked == [("openai/gsm8k", {"split": "train", "name": "main"})]
    with pytest.raises(FedcoreError, match=r"'openai/gsm8k', split 'test', row 2: column 'q' is e"):
        load_conversations("openai/gsm8k", form, split="test")
    with pytest.raises(FedcoreError, match="unknown column 'prompt'; valid: a, n, q"):
        load_conversations(
            "openai/gsm8k", RowFormat("prompt_completion", {"completion": "prompts"})
        )
    with pytest.raises(FedcoreError, match=r"dataset 'bbc-news': unknown column 'q'"):
        load_conversations("bbc-news", form)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat",), "unknown format 'chat'"),
        (("alpaca", {}, "all"), "loss is 'all' and format 'alpaca'; pass format 'messages'"),
        (("messages", {}, "first"), "unknown loss 'first'"),
        (("text", {"prompt": "q"}), "unknown column of format 'text' 'prompt'; valid: text"),
        (("text", {"text": ""}), r"columns\.text is not a name"),
        (("prompt_completion", {"prompt": "completion"}), "reads the file's column 'completion' t"),
    ],
)
def test_formats_that_are_none_are_refused(arguments, message):
    with pytest.raises(FedcoreError, match=message):
        RowFormat(*arguments)


def test_an_optional_column_that_is_renamed_must_be_there(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("instruction,output,context\nsay,b,\n")
    assert RowFormat("alpaca").optional == ("input",)
    assert "Input" not in load_conversations(str(file), RowFormat("alpaca")).examples[0].prompt
    renamed = RowFormat("alpaca", {"input": "contexts"})
    assert (renamed.wanted, renamed.optional) == (("instruction", "output", "contexts"), ())
    with pytest.raises(FedcoreError, match="unknown column 'contexts'; did you mean context"):
        load_conversations(str(file), renamed)


PAIR = RowFormat("prompt_completion")
BAD_ROWS = {
    "empty text": (RowFormat("text"), {"text": " "}, "'text' is empty"),
    "no text": (RowFormat("text"), {"text": [SECRET]}, "'text' is of type list"),
    "number": (PAIR, {"prompt": SECRET, "completion": 3}, "'completion' is of type int"),
    "blank prompt": (PAIR, {"prompt": "\n", "completion": SECRET}, "'prompt' is empty"),
    "mixed": (PAIR, {"prompt": [user(SECRET)], "completion": SECRET}, "is a text and not JSON"),
    "nothing": (PAIR, {"prompt": None, "completion": SECRET}, "'prompt' is missing"),
    "no output": (
        RowFormat("alpaca"),
        {"instruction": SECRET, "output": ""},
        "column 'output' is empty",
    ),
    "input": (
        RowFormat("alpaca"),
        {"instruction": SECRET, "input": [SECRET], "output": SECRET},
        "'input' is of type list",
    ),
    "surrogate": (RowFormat("text"), {"text": f"{SECRET} \ud800"}, "half a surrogate pair"),
    "text for messages": (RowFormat(), {"messages": SECRET}, "is a text and not JSON"),
    "no messages": (RowFormat(), {"messages": []}, "'messages' is an empty list"),
    "an object": (RowFormat(), {"messages": {SECRET: SECRET}}, "is of type dict"),
    "message": (RowFormat(), {"messages": [SECRET]}, "has message 1 of type str; pass objects"),
    "key": (
        RowFormat(),
        {"messages": [user(SECRET), {**assistant(SECRET), SECRET: SECRET}]},
        "has message 2 with keys beside role and content",
    ),
    "role": (
        RowFormat(),
        {"messages": [{"role": SECRET, "content": SECRET}]},
        "has message 1 of an unknown role; valid: system",
    ),
    "role of a list": (
        RowFormat(),
        {"messages": [{"role": [SECRET], "content": SECRET}]},
        "has message 1 of an unknown role",
    ),
    "content": (
        RowFormat(),
        {"messages": [user(SECRET), {"role": "assistant", "content": None}]},
        "has message 2 whose content is missing; pass a text",
    ),
    "empty answer": (
        RowFormat(),
        {"messages": [user(SECRET), assistant(" ")]},
        "has message 2 whose content is empty",
    ),
    "parts": (
        RowFormat(),
        {"messages": [user([{"type": "text", "text": SECRET}]), assistant(SECRET)]},
        "has message 1 whose content is of type list",
    ),
    "ends with the user": (
        RowFormat(loss="all"),
        {"messages": [user(SECRET), assistant(SECRET), user(SECRET)]},
        "does not end with a message of the assistant",
    ),
    "one message": (
        RowFormat(),
        {"messages": [assistant(SECRET)]},
        "has one message; write the prompt before it",
    ),
    "half a message": (
        RowFormat(),
        {"messages": [user(f"{SECRET} \udc00"), assistant(SECRET)]},
        "half a surrogate pair",
    ),
}


@pytest.mark.parametrize(("form", "row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_column_and_never_shown(
    tmp_path, form, row, message, caplog, capfd
):
    good = {"text": "a", "prompt": "a", "completion": "b", "instruction": "a", "output": "b"}
    file = tmp_path / "rows.jsonl"
    lines = [{**good, "messages": TALK}, {**good, **row}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    with pytest.raises(FedcoreError, match=message) as error:
        load_conversations(str(file), form)
    assert str(error.value).startswith(f"{file}:3: column ")
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None
    output = capfd.readouterr()
    assert SECRET not in output.out + output.err + caplog.text


def test_a_file_without_rows_or_columns_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n")
    with pytest.raises(FedcoreError, match=r"rows\.jsonl: no rows$"):
        load_conversations(str(file), RowFormat())
    file.write_text('{"conversation": []}')
    with pytest.raises(FedcoreError, match=r"rows\.jsonl:1: unknown column 'messages'"):
        load_conversations(str(file), RowFormat())
    with pytest.raises(FedcoreError, match="unknown dataset 'rows'"):
        load_conversations("rows", RowFormat())
