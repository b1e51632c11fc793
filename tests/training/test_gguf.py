import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.training.language_models import load_language_model
from tests.training.gguf_files import QUANTISED, WORDS, write_gguf


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


def test_a_broken_gguf_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(FedcoreError, match="cannot be loaded") as error:
        load_language_model(str(tmp_path))
    assert "\n" not in str(error.value)
