import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from fedcore.errors import FedcoreError
from fedcore.federation.row_counts import RowCounts
from fedcore.training.answer_tokens import AnswerTokens, answer_tokens
from fedcore.training.conversations import RowFormat, load_conversations
from fedcore.training.encoding import IGNORED
from fedcore.training.evaluation import evaluate
from fedcore.training.forward import Forward
from fedcore.training.instruction_rows import LEAST_PROMPT, tokenise
from tests.training.instruction_tokenizers import BUILDERS, CHATTING, TEMPLATES, built, copied


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are short."}
TALKS = [
    [user("What is 3 plus 4?"), assistant("The answer is 7.")],
    [SYSTEM, user("Name a colour"), assistant("blue"), user("Name another"), assistant("red")],
    [user("Grüße, 你好"), assistant("  padded 🎈\n")],
]
PAIRS = [
    ("What is 3 plus 4?", " The answer is 7."),
    ("Name a colour: ", "blue"),
    ("Name a colour:\n\n", "red\n"),
    ("Na", "me another"),
    ("ends already ", "yes </s>"),
    ("你好", "🎈"),
]
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName a colour\n\n### Response:"
)
WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "What is\n\n### Input:\n3 {plus} 4\n\n### Response:"
)


def split(prompt, completion):
    blanks = len(prompt) - len(prompt.rstrip())
    return {
        "prompt": prompt[: len(prompt) - blanks],
        "completion": prompt[len(prompt) - blanks :] + completion,
    }


# Rows of a file, how they are read, and the columns that trl's documentation names for the same.
CASES = {
    "text": (
        RowFormat("text"),
        [{"text": a + b} for a, b in PAIRS],
        [{"text": a + b} for a, b in PAIRS],
        {},
    ),
    "prompt_completion": (
        RowFormat("prompt_completion"),
        [{"prompt": a, "completion": b} for a, b in PAIRS],
        [split(a, b) for a, b in PAIRS],
        {},
    ),
    "columns": (
        RowFormat("prompt_completion", {"prompt": "q", "completion": "prompt"}),
        [{"q": a, "prompt": b, "completion": 3} for a, b in PAIRS],
        [split(a, b) for a, b in PAIRS],
        {},
    ),
    "alpaca": (
        RowFormat("alpaca"),
        [
            {"instruction": "Name a colour", "output": "blue"},
            {"instruction": "Name a colour", "input": "", "output": "blue"},
            {"instruction": "What is", "input": "3 {plus} 4", "output": "7"},
        ],
        [
            {"prompt": WITHOUT, "completion": "blue"},
            {"prompt": WITHOUT, "completion": "blue"},
            {"prompt": WITH, "completion": "7"},
        ],
        {},
    ),
    "messages": (
        RowFormat("messages"),
        [{"messages": talk} for talk in TALKS],
        [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS],
        {},
    ),
    "pairs of messages": (
        RowFormat("prompt_completion"),
        [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS],
        [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS],
        {},
    ),
    "all messages": (
        RowFormat("messages", loss="all"),
        [{"messages": talk} for talk in TALKS],
        [{"messages": talk} for talk in TALKS],
        {},
    ),
    "assistant's messages": (
        RowFormat("messages", loss="assistant"),
        [{"messages": talk} for talk in TALKS],
        [{"messages": talk} for talk in TALKS],
        {"assistant_only_loss": True},
    ),
}
OF_MESSAGES = {"messages", "pairs of messages", "all messages", "assistant's messages"}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=512, num_attention_heads=2, num_key_value_heads=1, **sizes)
        return LlamaForCausalLM(config).eval()


def trl_rows(model, tokenizer, rows, folder, **options):
    """``(input_ids, labels)`` of each row as a trainer of trl makes them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Silent(SFTTrainer):
        def _send_telemetry(self):
            pass

    arguments = SFTConfig(
        str(folder),
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    with torch.random.fork_rng():
        trainer = Silent(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    if "forward" in vars(model):
        del model.forward
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def read(form, rows, where="rows.jsonl:"):
    return form.read(enumerate(rows, start=1), where)


def pairs(rows):
    """``(input_ids, labels)`` of each row as lists."""
    return [(a.tolist(), b.tolist()) for a, b in zip(rows.input_ids, rows.labels, strict=True)]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("case", CASES)
def test_labels_are_those_of_trl_token_for_token(model, tmp_path, name, case):
    form, ours, theirs, options = CASES[case]
    tokenizer = built(name)
    if case in OF_MESSAGES and name not in CHATTING:
        with pytest.raises(FedcoreError, match="has no chat template"):
            tokenise(read(form, ours), tokenizer, max_length=400)
        return
    if options and name == "spanning":
        with pytest.raises(FedcoreError, match=r"no generation blocks.*or pass loss = 'last'"):
            tokenise(read(form, ours), tokenizer, max_length=400)
        return
    rows = tokenise(read(form, ours), tokenizer, max_length=400)
    assert pairs(rows) == trl_rows(model, copied(name), theirs, tmp_path, **options)
    assert rows.counts == RowCounts(
        read=len(ours),
        used=len(ours),
        merged=rows.counts.merged,
        targets=sum(label != IGNORED for _, labels in pairs(rows) for label in labels[1:]),
    )
    for labels in rows.labels:
        learned = labels[labels != IGNORED]
        last = tokenizer.decode(learned[-3:]).rstrip()
        end = "<|im_end|>" if case in OF_MESSAGES and name != "spanning" else tokenizer.eos_token
        assert last.endswith(end)


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_public_templates_give_trl_s_labels_or_are_refused(model, tmp_path, file):
    tokenizer = copied("spanning")
    tokenizer.chat_template = file.read_text()
    talks = [TALKS[0], TALKS[2]]
    for loss, options in (("last", {}), ("assistant", {"assistant_only_loss": True})):
        rows = [{"messages": talk} for talk in talks]
        try:
            ours = tokenise(read(RowFormat(loss=loss), rows), tokenizer, max_length=4000)
        except FedcoreError:
            continue
        if loss == "last":
            rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
        assert pairs(ours) == trl_rows(model, tokenizer, rows, tmp_path, **options)


def test_rows_whose_tokens_span_the_prompt_s_end_are_counted():
    rows = [
        {"prompt": "What is 3 plus 4?", "completion": " The answer"},
        {"prompt": "What is 3 plus 4? ", "completion": "The answer"},
        {"prompt": "The ans", "completion": "wer is 7."},
    ]
    form = RowFormat("prompt_completion")
    for name, merged in (("plain", 1), ("wordpiece", 1)):
        assert tokenise(read(form, rows), built(name), max_length=99).counts.merged == merged
    # The template's own prompt ends in a colon, which a token of the answer may span.
    talks = [{"messages": [user("Name"), assistant(text)]} for text in (" blue.", "blue.", "The")]
    rows = tokenise(read(RowFormat(), talks), built("spanning"), max_length=99)
    assert rows.merged.tolist() == [True, False, False]


def sized(prompt, completion):
    """A row of so many prompt and completion tokens, the end token among the latter."""
    return {"prompt": "~" * prompt, "completion": "~" * (completion - 1)}


def test_long_rows_are_dropped_shortened_or_refused():
    tokenizer = built("plain")
    shape = [(4, 3), (30, 5), (2, 13), (20, 12), (3, 40)]
    rows = [sized(*size) for size in shape]
    given = read(RowFormat("prompt_completion"), rows)
    whole = tokenise(given, tokenizer, max_length=99)
    assert [len(ids) for ids in whole.input_ids] == [a + b for a, b in shape]
    assert whole.targets.tolist() == [b for _, b in shape]
    dropped = tokenise(given, tokenizer, max_length=20)
    assert dropped.counts == RowCounts(read=5, used=2, dropped=3, targets=16)
    assert dropped.positions.tolist() == [0, 2]
    # 30 + 5 keeps 15 of its prompt, 20 + 12 the last 8.
    cut = tokenise(given, tokenizer, max_length=20, overlong="cut_prompt")
    assert cut.counts == RowCounts(read=5, used=4, dropped=1, truncated=2, targets=33)
    assert cut.truncated.tolist() == [False, True, False, True]
    for i, position in enumerate(cut.positions):
        keep = min(20, sum(shape[position]))
        assert cut.input_ids[i].tolist() == whole.input_ids[position][-keep:].tolist()
        assert cut.labels[i].tolist() == whole.labels[position][-keep:].tolist()
    with pytest.raises(FedcoreError, match=r"rows.jsonl:2: 3 of 5 rows.* max_length = 20 tokens"):
        tokenise(given, tokenizer, max_length=20, overlong="error")
    with pytest.raises(FedcoreError, match=r"rows.jsonl:1: 5 of 5 rows"):
        tokenise(given, tokenizer, max_length=5)


def test_a_shortened_prompt_keeps_its_start_token():
    tokenizer = built("unigram")
    given = read(RowFormat("prompt_completion"), [{"prompt": "What is " * 30, "completion": "7"}])
    whole = tokenise(given, tokenizer, max_length=999).input_ids[0].tolist()
    cut = tokenise(given, tokenizer, max_length=20, overlong="cut_prompt").input_ids[0].tolist()
    assert cut == [tokenizer.bos_token_id, *whole[-19:]]
    assert whole[0] == tokenizer.bos_token_id


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["plain", "unigram", "wordpiece"]),
    rows=st.lists(
        st.tuples(
            st.text("abc ?:\n🎈", min_size=1, max_size=40).filter(str.strip),
            st.text("abc ?:\n🎈", min_size=1, max_size=40).filter(str.strip),
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.integers(2, 60),
)
def test_whatever_is_shortened_keeps_its_completion_and_its_end(name, rows, length):
    tokenizer = built(name)
    given = read(RowFormat("prompt_completion"), [{"prompt": a, "completion": b} for a, b in rows])
    whole = tokenise(given, tokenizer, max_length=9999)
    fits = [len(ids) <= length for ids in whole.input_ids]
    completions = [labels[labels != IGNORED] for labels in whole.labels]
    room = [length - len(completion) >= LEAST_PROMPT for completion in completions]
    expected = [i for i in range(len(rows)) if fits[i] or room[i]]
    if not expected:
        with pytest.raises(FedcoreError, match="have more than max_length"):
            tokenise(given, tokenizer, max_length=length, overlong="cut_prompt")
        return
    cut = tokenise(given, tokenizer, max_length=length, overlong="cut_prompt")
    assert cut.positions.tolist() == expected
    for i, position in enumerate(expected):
        ids, labels = cut.input_ids[i], cut.labels[i]
        assert len(ids) == min(length, len(whole.input_ids[position]))
        assert labels[labels != IGNORED].tolist() == completions[position].tolist()
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        assert ids[0] == whole.input_ids[position][0] or tokenizer.bos_token_id is None
        assert (ids[labels != IGNORED] == labels[labels != IGNORED]).all()
    counts = cut.counts
    assert counts.used == len(expected) == counts.read - counts.dropped
    assert counts.truncated == sum(not fits[i] for i in expected)


def test_rows_are_dealt_before_it_is_known_which_are_too_long():
    tokenizer = built("plain")
    shape = [(4, 3), (30, 5), (2, 13), (20, 12), (3, 40)]
    rows = [sized(*size) for size in shape]
    given = read(RowFormat("prompt_completion"), rows)
    everything = tokenise(given, tokenizer, max_length=20, overlong="cut_prompt")
    shards = [[4, 0, 3], torch.tensor([2, 1])]
    parts = [everything.take(shard) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        alone = tokenise(given.take(shard), tokenizer, max_length=20, overlong="cut_prompt")
        assert pairs(part) == pairs(alone)
        assert part.counts == alone.counts
        assert part.positions.tolist() == alone.positions.tolist()
    assert [part.counts.dropped for part in parts] == [1, 0]
    assert RowCounts.sum(part.counts for part in parts) == everything.counts
    assert everything.take([4]).counts == RowCounts(read=1, dropped=1)


def test_counts_are_numbers_that_agree():
    counts = RowCounts(read=5, used=4, dropped=1, truncated=2, merged=1, targets=33)
    assert json.loads(json.dumps(counts.plain())) == {
        "read": 5,
        "used": 4,
        "dropped": 1,
        "truncated": 2,
        "merged": 1,
        "targets": 33,
    }
    assert RowCounts(**counts.plain()) == counts
    assert str(counts) == (
        "5 rows read, 4 used, 1 dropped as too long, 2 with a truncated prompt, 1 with a token "
        "across the prompt's end; 33 target tokens"
    )
    for wrong in ({"read": 5, "used": 4}, {"truncated": 1}, {"targets": -1}, {"read": 0.5}):
        with pytest.raises(ValidationError):
            RowCounts(**wrong)


def test_tokenizers_and_templates_that_cannot_end_a_row_are_refused():
    talk = read(RowFormat(), [{"messages": TALKS[0]}])
    text = read(RowFormat("text"), [{"text": "What is"}])
    tokenizer = copied("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(FedcoreError, match=r"not learn to stop; set tokenizer\.chat_template"):
        tokenise(talk, tokenizer, max_length=99)
    tokenizer.chat_template = "{{ messages[0]['content'] }}</s>"
    with pytest.raises(FedcoreError, match="would not learn to stop"):
        tokenise(talk, tokenizer, max_length=99)
    marks = "{% generation %}{{ m['content'] }}{% endgeneration %}</s>"
    tokenizer.chat_template = "{% for m in messages %}" + marks + "{% endfor %}"
    marked = read(RowFormat(loss="assistant"), [{"messages": TALKS[0]}])
    with pytest.raises(FedcoreError, match="an end token inside its generation block"):
        tokenise(marked, tokenizer, max_length=99)
    assert len(tokenise(talk, tokenizer, max_length=99)) == 1
    tokenizer.eos_token = None
    with pytest.raises(FedcoreError, match=r"has no end token; set tokenizer\.eos_token"):
        tokenise(text, tokenizer, max_length=99)
    bert = copied("wordpiece")
    bert.eos_token = "[UNK]"
    with pytest.raises(FedcoreError, match=r"rows.jsonl:1: the tokenizer ends a text with another"):
        tokenise(text, bert, max_length=99)
    bert.model_max_length = 50
    with pytest.raises(FedcoreError, match="max_length is 51; it must lie between 2 and 50"):
        tokenise(text, bert, max_length=51)
    with pytest.raises(FedcoreError, match="unknown overlong 'cut'; did you mean cut_prompt"):
        tokenise(text, bert, max_length=50, overlong="cut")


def test_a_template_s_own_words_are_shown_and_a_row_s_are_not():
    tokenizer = copied("chatml")
    body = tokenizer.chat_template
    first = "{% if messages[0]['role'] == 'system' %}"
    rows = read(RowFormat(), [{"messages": TALKS[0]}, {"messages": TALKS[1]}])
    tokenizer.chat_template = first + "{{ raise_exception('no system message') }}{% endif %}" + body
    with pytest.raises(FedcoreError, match=r"jsonl:2: .*conversation \(no system message\); ch"):
        tokenise(rows, tokenizer, max_length=99)
    tokenizer.chat_template = (
        first + "{{ raise_exception('not ' + messages[0]['content']) }}{% endif %}" + body
    )
    with pytest.raises(FedcoreError, match=r"jsonl:2: .* refuses this conversation; ch") as error:
        tokenise(rows, tokenizer, max_length=99)
    assert "short" not in str(error.value)


MARKER = "Schmidt"


@pytest.mark.parametrize("name", ["plain", "chatml", "unigram"])
def test_no_output_shows_what_a_row_holds(name, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    tokenizer = copied(name)
    # Past the model's limit, across the prompt's end, and with the prompt shortened.
    tokenizer.model_max_length = 64
    rows = [
        {"prompt": f"{MARKER} " * 30, "completion": MARKER},
        {"prompt": f"is {MARKER[:3]}", "completion": MARKER[3:]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = load_conversations(str(file), RowFormat("prompt_completion"))
    outcomes = []
    for overlong in ("drop", "cut_prompt"):
        counts = tokenise(given, tokenizer, max_length=64, overlong=overlong).counts
        outcomes += [str(counts), json.dumps(counts.plain()), repr(counts)]
    for options in ({"max_length": 64, "overlong": "error"}, {"max_length": 3}):
        with pytest.raises(FedcoreError) as error:
            tokenise(given, tokenizer, **options)
        outcomes.append(str(error.value))
    if name in CHATTING:
        talk = read(RowFormat(), [{"messages": [user(MARKER * 30), assistant(MARKER)]}])
        outcomes.append(str(tokenise(talk, tokenizer, max_length=64, overlong="cut_prompt").counts))
    output = capfd.readouterr()
    assert output.out == output.err == caplog.text == ""
    assert all(MARKER not in text for text in outcomes)


def test_a_dataset_for_trl_has_the_rows_and_can_be_packed(model):
    from trl import pack_dataset

    form, ours, _, _ = CASES["prompt_completion"]
    rows = tokenise(read(form, ours), built("plain"), max_length=64)
    dataset = answer_tokens(rows, built("plain")).dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert [(row["input_ids"], row["labels"]) for row in dataset] == pairs(rows)
    packed = pack_dataset(dataset, 64, "bfd")
    assert sum(map(len, packed["input_ids"])) == sum(map(len, rows.input_ids))
    with torch.no_grad():
        for row in dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            assert torch.isfinite(model(input_ids=ids, labels=labels).loss)


def test_our_own_loop_predicts_the_answers_alone(model):
    form, ours, _, _ = CASES["prompt_completion"]
    tokenizer = built("plain")
    rows = tokenise(read(form, ours), tokenizer, max_length=64)
    examples = answer_tokens(rows, tokenizer)
    length = max(map(len, rows.input_ids))
    everything = torch.arange(len(rows))
    inputs = examples.inputs(everything)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(rows), length)
    assert inputs["attention_mask"].sum(dim=1).tolist() == list(map(len, rows.input_ids))
    assert (
        len(inputs["input_ids"][0])
        > len(rows.input_ids[0])
        == examples.inputs(everything[:1])["input_ids"].shape[1]
    )
    assert examples.labels.tolist() == [0] * len(rows)
    assert examples.predictions(everything) == rows.counts.targets
    found = evaluate(Forward(model, examples), examples, everything, batch_size=2)
    assert found.predictions.tolist() == rows.targets.tolist()
    with torch.no_grad():
        for i, (ids, labels) in enumerate(pairs(rows)):
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            single = found.on(torch.tensor([i])).loss
            assert single == pytest.approx(float(loss), rel=1e-5)
            targets = examples.targets(torch.tensor([i]))[0]
            assert targets[: len(ids) - 1].tolist() == labels[1:]
            assert (targets[len(ids) - 1 :] == IGNORED).all()


def test_answers_follow_their_examples():
    form, ours, _, _ = CASES["prompt_completion"]
    rows = tokenise(read(form, ours), built("plain"), max_length=64)
    examples = answer_tokens(rows, built("plain"), domains=range(len(rows)))
    part = examples.take([3, 1])
    assert isinstance(part, AnswerTokens)
    assert part.labels.tolist() == [3, 1]
    for mine, theirs in ((part.input_ids, examples.input_ids), (part.answers, examples.answers)):
        assert [row.tolist() for row in mine] == [theirs[3].tolist(), theirs[1].tolist()]
    tensors = examples.tensors()
    assert examples.nbytes == sum(t.nbytes for t in tensors.values())
    assert tensors["lengths"].tolist() == list(map(len, rows.input_ids))
    assert tensors["input_ids"].tolist() == [i for row in rows.input_ids for i in row]
    assert tensors["answers"].tolist() == [i for row in rows.labels for i in row]
    with pytest.raises(FedcoreError, match="must have rows of the same lengths"):
        replace(examples, answers=examples.answers[1:])
    with pytest.raises(FedcoreError, match=r"pass one label for each row"):
        answer_tokens(rows, built("plain"), domains=[0])
    none = answer_tokens(rows.take(np.arange(0)), built("plain"))
    assert len(none) == 0
    assert len(none.tensors()["input_ids"]) == 0
