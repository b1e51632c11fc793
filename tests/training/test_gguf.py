import pytest
import torch
from datasets import Dataset

from fedcore.errors import FedcoreError
from fedcore.training.base_identity import identity_of
from fedcore.training.language_models import load_language_model
from fedcore.training.local_training import LocalSettings
from tests.training.gguf_files import QUANTISED, WORDS, write_gguf
from tests.training.test_sft_turn import adapted, take, values


def test_a_gguf_file_is_read_into_what_its_blocks_stand_for(tmp_path, capfd):
    expected = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_language_model(str(tmp_path))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name
    assert any("up_proj" in name for name in expected), QUANTISED
    assert tokenizer("ab a").input_ids == [WORDS.index(word) for word in ("ab", "Ġ", "a")]
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<end>", "right")
    assert capfd.readouterr() == ("", "")


def test_a_model_of_a_gguf_file_is_plain_and_can_be_trained_by_trl(tmp_path):
    """transformers calls it quantised, and no Trainer would train it then."""
    write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_language_model(str(tmp_path))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    parts = identity_of(model, tokenizer).entries["quantisation"]
    assert not any("quantization_config" in name for name in parts)
    model = adapted(model=model)
    before = values(model)
    data = Dataset.from_dict({"input_ids": [[3, 4, 6, 2]] * 4, "labels": [[-100, 4, 6, 2]] * 4})
    result = take(model, tokenizer, data, local=LocalSettings(batch_size=2, steps=2))
    assert result.steps == 2
    changed = {
        name for name, value in values(model).items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_a_broken_gguf_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FedcoreError, match="cannot be loaded") as error:
        load_language_model(str(tmp_path))
    assert "\n" not in str(error.value)
