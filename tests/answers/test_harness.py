"""Tasks of lm-eval: what is said without it, and with it that both count alike."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedcore.answers.harness import HarnessTask
from fedcore.answers.scoring import score_tasks
from fedcore.answers.task import AnswerTask, Row
from fedcore.errors import FedcoreError, MissingExtraError
from tests.answers.tiny import byte_tokenizer, language_model

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_the_extra_is_named(tmp_path):
    task = HarnessTask("lm-eval:own", tmp_path)
    with pytest.raises(MissingExtraError, match=r"lm-eval .*fedcore-lora\[answers\]"):
        score_tasks(language_model(), byte_tokenizer(), [task])


def adapted():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        model = get_peft_model(language_model(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write(folder, name, kind, rows):
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + kind)
    return HarnessTask(f"lm-eval:{name}", tasks)


def test_choices_are_those_of_lm_eval(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = [
        {
            "prompt": "what is " + "plus " * (i % 4) + f"{i}?",
            "options": [str(2 * i), f"{i}9 the", "the answer"],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    # lm-eval puts a blank between prompt and option.
    own = AnswerTask(
        "own",
        "choice",
        tuple(Row(r["prompt"], r["answer"], tuple(f" {o}" for o in r["options"])) for r in rows),
    )
    model, tokenizer = adapted(), byte_tokenizer()
    theirs = write(tmp_path, "own", CHOICE, rows)
    ours, harness = score_tasks(model, tokenizer, [own, theirs])
    assert harness.rows == ours.rows
    assert 0 < ours.value("acc") < 1
    limited = score_tasks(model, tokenizer, [theirs], limit=5)[0]
    assert limited.rows["acc"] == ours.rows["acc"][:5]
    values = {}
    original = HarnessTask._by_document

    def keep(self, result):
        values.update(result)
        return original(self, result)

    monkeypatch.setattr(HarnessTask, "_by_document", keep)
    score_tasks(model, tokenizer, [theirs])
    from fedcore.answers.cached import CachedModel
    from fedcore.answers.likelihoods import option_likelihoods

    with torch.no_grad():
        scores = option_likelihoods(CachedModel(model, 0), tokenizer, own, 8)
    samples = sorted(values["samples"]["own"], key=lambda sample: sample["doc_id"])
    for sample, mine in zip(samples, scores, strict=True):
        assert mine == pytest.approx([one[0] for one in sample["filtered_resps"]], abs=1e-5)


def test_continuations_are_those_of_lm_eval(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    model, tokenizer = adapted(), byte_tokenizer()
    prompts = ["what is 1?", "the", "what is plus plus 5?"]
    from fedcore.answers.cached import CachedModel
    from fedcore.answers.writing import continuations

    task = AnswerTask(
        "own", "exact", tuple(Row(p, "x") for p in prompts), stop=("e",), max_tokens=9
    )
    with torch.no_grad():
        texts = continuations(CachedModel(model, 0), tokenizer, task, 8)
    answers = [texts[0], "another", texts[2]]
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    (score,) = score_tasks(model, tokenizer, [write(tmp_path, "written", WRITTEN, rows)])
    assert score.rows == {"exact_match": (1.0, 0.0, 1.0)}


def test_what_is_not_there_is_named(tmp_path):
    pytest.importorskip("lm_eval")
    task = write(tmp_path, "own", CHOICE, [{"prompt": "q", "options": ["a", "b"], "answer": 0}])
    model, tokenizer = language_model(), byte_tokenizer()
    with pytest.raises(FedcoreError, match="lm-eval:other: there is no such task in"):
        score_tasks(model, tokenizer, [replace(task, name="lm-eval:other")])
    with pytest.raises(FedcoreError, match=r"there is no folder .*absent; pass --task-folder"):
        score_tasks(model, tokenizer, [replace(task, folder=tmp_path / "absent")])
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(FedcoreError, match="lm-eval:own: lm-eval cannot run it"):
        score_tasks(model, tokenizer, [task])
