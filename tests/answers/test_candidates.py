"""Adapters and their base, compared row by row."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedcore.answers.candidates import adapter_candidates
from fedcore.answers.outcome import answers_of, paired_difference
from fedcore.answers.scoring import TaskScore, mean_score, score_tasks
from fedcore.answers.task import AnswerTask, Row
from fedcore.errors import FedcoreError
from fedcore.reports.intervals import estimate
from tests.answers.tiny import byte_tokenizer, language_model

WORDS = (" red", " blue", " green")
ROWS = tuple(Row(f"item {i} is", i % 3, WORDS) for i in range(12))
TASK = AnswerTask("colours", "choice", ROWS)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and an adapter that was trained until it knows which colour follows."""
    folder = tmp_path_factory.mktemp("answers")
    model, tokenizer = language_model(spread=0.1), byte_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        )
        adapted = get_peft_model(language_model(spread=0.1), config).train()
        texts = [row.prompt + row.options[row.answer] for row in ROWS]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(80):
            loss = adapted(**batch, labels=labels).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    config_file = folder / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": str(folder / "base")}))
    return folder


def test_a_trained_adapter_answers_better_than_its_base(home):
    candidates = adapter_candidates(home / "adapter", None)
    scores = candidates.score([TASK])
    base, adapter = scores["base"][0], scores["adapter"][0]
    assert adapter.value("acc") >= base.value("acc") + 0.3
    plain = score_tasks(language_model(spread=0.1), byte_tokenizer(), [TASK])[0]
    assert base.rows == plain.rows
    loaded = PeftModel.from_pretrained(language_model(spread=0.1), home / "adapter").eval()
    assert adapter.rows == score_tasks(loaded, byte_tokenizer(), [TASK])[0].rows


def test_a_residual_beside_an_adapter_is_added(home, tmp_path):
    from fedcore.data.peft_files import read_adapter, write_adapter

    state = read_adapter(home / "adapter")
    write_adapter(state, tmp_path / "sum")
    write_adapter(state, tmp_path / "sum" / "residual")
    double = PeftModel.from_pretrained(language_model(spread=0.1), home / "adapter").eval()
    for module in double.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    candidates = adapter_candidates(tmp_path / "sum", str(home / "base"))
    ids = torch.tensor([[40, 50, 60]])
    with torch.no_grad():
        ours, theirs = candidates.model(ids).logits, double(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(home, tmp_path):
    with pytest.raises(FedcoreError, match=r"adapter_config.json is missing"):
        adapter_candidates(tmp_path, None)
    gpt2 = tmp_path / "gpt2"
    language_model("gpt2").save_pretrained(gpt2)
    byte_tokenizer().save_pretrained(gpt2)
    with pytest.raises(FedcoreError, match=r"does not fit the base .*; pass its own by --base"):
        adapter_candidates(home / "adapter", str(gpt2))
    # Its first layer alone: what the others hold finds no place.
    small = language_model(spread=0.1)
    small.config.num_hidden_layers = 1
    del small.model.layers[1]
    small.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(FedcoreError, match=r"layers\.1\..* is in one of them alone"):
        adapter_candidates(home / "adapter", str(tmp_path / "small"))


def test_an_adapter_without_a_base_needs_one(home, tmp_path):
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    weights = (home / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(FedcoreError, match="names no base model; pass --base"):
        adapter_candidates(tmp_path, None)


BASE = TaskScore("t", "number", {"exact_match": (0.0, 1.0, 0.0, 1.0)})
BETTER = TaskScore("t", "number", {"exact_match": (1.0, 1.0, 0.0, 1.0)})


def test_differences_are_paired():
    difference = paired_difference(BETTER, BASE, "exact_match")
    assert difference == estimate([1, 0, 0, 0])
    assert difference.mean == BETTER.value("exact_match") - BASE.value("exact_match") == 0.25
    mean = mean_score([BASE, BETTER])
    assert mean.rows["exact_match"] == (0.5, 1.0, 0.0, 1.0)
    # Sample deviation over the root of n.
    assert BETTER.standard_error("exact_match") == pytest.approx(0.25)


def test_the_table_is_80_wide_and_the_json_has_its_numbers():
    from io import StringIO

    from rich.console import Console

    from fedcore.reports.answers import answer_grids
    from fedcore.reports.grid import stacked

    scores = {"base": (BASE,), "local-only, mean": (BETTER,), "client-0123456": (BASE,)}
    console = Console(file=StringIO(), width=80)
    console.print(stacked(*answer_grids(answers_of(scores))))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    line = next(line for line in text.splitlines() if line.startswith("local-only, mean"))
    assert line.split()[2:] == ["exact_match", "0.750", "0.250", "4", "+0.250", "±", "0.796"]
    record = answers_of(scores).plain()["tasks"]["t"]
    assert (record["kind"], record["n"]) == ("number", 4)
    better = record["models"]["local-only, mean"]["exact_match"]
    assert better["minus_base"]["low"] == pytest.approx(0.25 - 0.7956, abs=1e-4)
    assert better["rows"] == [1.0, 1.0, 0.0, 1.0]
    assert record["models"]["base"]["exact_match"]["minus_base"] is None
    json.dumps(record, allow_nan=False)
