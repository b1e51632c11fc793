"""Tasks in JSON-lines files: what they become, and what is refused without showing a value."""

import json

import pytest

from fedcore.answers.files import read_task
from fedcore.answers.task import AnswerTask, Row
from fedcore.errors import FedcoreError

SECRET = "confidential"


def write(folder, *rows):
    path = folder / "own.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ((15, 2.5), "number"),
        (("6 * 7 = 42\n#### 42", "#### 1,000"), "number"),
        (("$5", "7"), "number"),
        (("5", "five"), "exact"),
        (("Paris", "Rome"), "exact"),
    ],
)
def test_answers_are_numbers_or_texts(answers, kind, tmp_path):
    path = write(tmp_path, *({"prompt": "q", "answer": answer} for answer in answers))
    task = read_task(path)
    assert (task.name, task.kind) == ("own", kind)
    assert [row.answer for row in task.rows] == [str(answer) for answer in answers]
    assert task.stop == (("\n",) if kind == "exact" else ())
    assert read_task(path, stop=["Q:"], kind="math").stop == ("Q:",)
    assert read_task(path, kind="math").kind == "math"


def test_choices_and_programs(tmp_path):
    path = write(tmp_path, {"prompt": "q", "options": [" a", " b"], "answer": 1})
    assert read_task(path) == AnswerTask("own", "choice", (Row("q", 1, (" a", " b")),))
    path = write(tmp_path, {"prompt": "def f():", "tests": "assert f()"}, "", "")
    task = read_task(path)
    assert (task.kind, task.rows) == ("code", (Row("def f():", "assert f()"),))
    assert "\ndef " in task.stop


GOOD = {"prompt": "q", "answer": SECRET}
CHOICE = {"prompt": "q", "options": [" a", f" {SECRET}"], "answer": 0}


@pytest.mark.parametrize(
    ("rows", "line", "said"),
    [
        ([GOOD, "{"], 2, "not JSON"),
        ([GOOD, "[1]"], 2, "not a JSON object"),
        ([GOOD, '{"prompt": ' + "[" * 100_000], 2, "nests too deeply"),
        ([GOOD, f'{{"prompt": "{SECRET}", "prompt": "x", "answer": "y"}}'], 2, "'prompt' twice"),
        ([GOOD, {"prompt": "q"}], 2, "not those of the first row, answer, prompt"),
        ([{"prompt": "q"}], 1, "a row needs prompt and one of"),
        ([{"answer": SECRET}], 1, "unknown column 'prompt'"),
        ([{**GOOD, "tests": SECRET}], 1, "its columns are answer, prompt, tests"),
        ([{**GOOD, "anwser": 1}], 1, "unknown column 'anwser'; did you mean answer?"),
        ([{**GOOD, "prompt": ""}], 1, "column 'prompt' is not a text"),
        ([{**GOOD, "answer": [SECRET]}], 1, "column 'answer' is not a text"),
        ([{**GOOD, "answer": True}], 1, "column 'answer' is not a text"),
        ([CHOICE, {**CHOICE, "answer": 2}], 2, "index of an option, from 0 to 1"),
        ([{**CHOICE, "answer": f" {SECRET}"}], 1, "index of an option"),
        ([{**CHOICE, "answer": True}], 1, "index of an option"),
        ([{**CHOICE, "options": [" a"]}], 1, "column 'options' must be a list of two"),
        ([{**CHOICE, "options": SECRET}], 1, "column 'options' must be a list of two"),
        ([{**CHOICE, "options": [" a", 1]}], 1, "column 'options' holds what is not a text"),
        ([{**CHOICE, "options": [SECRET, SECRET]}], 1, "column 'options' holds a text twice"),
    ],
)
def test_a_wrong_row_is_named_by_its_line_and_column(rows, line, said, tmp_path):
    path = write(tmp_path, *rows)
    with pytest.raises(FedcoreError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert said in str(error.value)
    assert SECRET not in str(error.value)


def test_files_that_are_not_there_empty_or_of_another_kind(tmp_path):
    with pytest.raises(FedcoreError, match=r"there is no file .*absent.jsonl"):
        read_task(tmp_path / "absent.jsonl")
    with pytest.raises(FedcoreError, match="no rows"):
        read_task(write(tmp_path, "", " "))
    with pytest.raises(FedcoreError, match=r"kind is 'math', and .* of kind choice"):
        read_task(write(tmp_path, CHOICE), kind="math")
    with pytest.raises(FedcoreError, match="unknown kind 'code'"):
        read_task(write(tmp_path, GOOD), kind="code")


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("sums", Row("q", "a"), "unknown kind of own 'sums'"),
        ("exact", Row(" ", "a"), "own, row 1: the prompt is empty"),
        ("number", Row("q", 5), "own, row 1: the answer is not a text"),
        ("choice", Row("q", 0, (" a",)), "own, row 1: a choice needs two options"),
        ("choice", Row("q", 0, (" a", " a")), "own, row 1: an option is empty, or there twice"),
        (
            "choice",
            Row("q", 2, (" a", " b")),
            "own, row 1: the answer must be an index from 0 to 1",
        ),
    ],
)
def test_a_task_is_checked_when_it_is_made(kind, row, said):
    with pytest.raises(FedcoreError) as error:
        AnswerTask("own", kind, (row,))
    assert str(error.value).startswith(said)
