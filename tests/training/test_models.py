import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from fedcore.errors import FedcoreError
from fedcore.training.datasets import TextDataset, subsample
from fedcore.training.encoding import EncodedDataset, encode
from fedcore.training.models import check_model_source, load_classifier


@pytest.fixture(scope="module")
def minilm():
    return load_classifier("minilm", 5, seed=0)


def _save_tiny_bert(folder, **config) -> BertConfig:
    tiny = BertConfig(
        vocab_size=30522,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        **config,
    )
    source = check_model_source("minilm").path
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    return tiny


def test_minilm_has_its_published_weights_and_a_head_of_the_asked_size(minilm) -> None:
    model, tokenizer = minilm
    assert model.classifier.weight.shape == (5, 384)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # The checkpoint's own numbers, read past transformers.
    from safetensors.torch import load_file

    saved = load_file(check_model_source("minilm").path / "model.safetensors")
    name = "encoder.layer.5.output.dense.weight"
    assert torch.equal(model.bert.state_dict()[name], saved[name])
    assert torch.equal(model.bert.pooler.dense.weight, saved["pooler.dense.weight"])
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0


def test_head_follows_the_seed_and_the_global_generator_is_untouched(minilm, capfd) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    again, _ = load_classifier("minilm", 5, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    other, _ = load_classifier("minilm", 5, seed=1)
    head = minilm[0].classifier.weight
    assert torch.equal(again.classifier.weight, head)
    assert not torch.equal(other.classifier.weight, head)
    assert float(head.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert capfd.readouterr() == ("", "")


def test_transformers_stays_as_loud_as_it_was() -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_classifier("minilm", 2, seed=0)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_dtype_is_that_of_every_weight() -> None:
    model, _ = load_classifier("minilm", 2, seed=0, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_local_folder_keeps_a_fitting_head_and_replaces_another(tmp_path) -> None:
    tiny = _save_tiny_bert(tmp_path, num_labels=3)
    torch.manual_seed(0)
    saved = AutoModelForSequenceClassification.from_config(tiny)
    saved.save_pretrained(tmp_path)
    kept, _ = load_classifier(str(tmp_path), 3, seed=0)
    assert torch.equal(kept.classifier.weight, saved.classifier.weight)
    replaced, _ = load_classifier(str(tmp_path), 4, seed=0)
    assert replaced.classifier.weight.shape == (4, 8)
    assert torch.equal(
        replaced.bert.embeddings.word_embeddings.weight,
        saved.bert.embeddings.word_embeddings.weight,
    )


def test_a_checkpoint_without_encoder_weights_is_refused(tmp_path) -> None:
    tiny = _save_tiny_bert(tmp_path)
    model = BertForMaskedLM(tiny)
    model.save_pretrained(tmp_path)
    load_classifier(str(tmp_path), 2, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FedcoreError, match=r"lacks 16 weights .*bert\.encoder\.layer\.2"):
        load_classifier(str(tmp_path), 2, seed=0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FedcoreError, match="cannot be loaded") as error:
        load_classifier(str(tmp_path), 2, seed=0)
    assert "\n" not in str(error.value)


def test_decoders_pad_with_their_end_token(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    model, tokenizer = load_classifier(str(tmp_path), 2, seed=0)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model.config.use_cache is False
    texts = TextDataset(("a b", "b"), (0, 1), ("x", "y"), "toy")
    encoded = encode(texts, tokenizer, 4)
    assert encoded.input_ids.tolist() == [[2, 3, 0, 0], [3, 0, 0, 0]]
    with torch.no_grad():
        together = model(encoded.input_ids, attention_mask=encoded.attention_mask).logits
        alone = model(torch.tensor([[3]])).logits
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 1}, "num_labels is 1; classification needs two"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8; weights need a floating type"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(FedcoreError, match=message):
        load_classifier("minilm", **{"num_labels": 2, "seed": 0, **arguments})


def test_encoding_is_fixed_length_and_matches_the_tokenizer(minilm) -> None:
    _, tokenizer = minilm
    long = "word " * 50
    data = TextDataset(("a cat", long, "dogs bark"), (0, 1, 0), ("x", "y"), "toy")
    encoded = encode(data, tokenizer, 8)
    ids = tokenizer.convert_tokens_to_ids
    assert encoded.input_ids[0].tolist() == ids(["[CLS]", "a", "cat", "[SEP]"] + 4 * ["[PAD]"])
    assert encoded.input_ids[1].tolist() == ids(["[CLS]", *6 * ["word"], "[SEP]"])
    assert encoded.attention_mask.sum(1).tolist() == [4, 8, 4]
    assert encoded.labels.tolist() == [0, 1, 0]
    assert (len(encoded), encoded.length) == (3, 8)
    assert encoded.nbytes == 8 * (3 * 8 + 3 * 8 + 3)
    part = encoded.take([2, 0])
    assert torch.equal(part.input_ids, encoded.input_ids[[2, 0]])
    assert torch.equal(part.attention_mask, encoded.attention_mask[[2, 0]])
    assert part.labels.tolist() == [0, 0]
    assert len(encoded.take([])) == 0


def test_encoding_refuses_lengths_without_room_or_positions(minilm) -> None:
    _, tokenizer = minilm
    data = TextDataset(("a", "b"), (0, 1), ("x", "y"), "toy")
    for length in (2, 513):
        with pytest.raises(FedcoreError, match=f"max_length is {length}; .* between 3 and 512"):
            encode(data, tokenizer, length)
    with pytest.raises(FedcoreError, match="'toy' has no examples to encode"):
        encode(data.take([]), tokenizer, 8)
    with pytest.raises(FedcoreError, match=r"must be \(n, T\), \(n, T\) and \(n,\)"):
        EncodedDataset(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_subsample_of_a_small_dataset_encodes_the_same(minilm) -> None:
    data = TextDataset(("a", "b"), (0, 1), ("x", "y"), "toy")
    whole = encode(data, minilm[1], 4)
    assert torch.equal(encode(subsample(data, 9, seed=0), minilm[1], 4).input_ids, whole.input_ids)
