import importlib.util

import pytest

from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.training.datasets import PACKAGED_DATA, check_data_source
from fedcore.training.models import PACKAGED_MODELS, check_model_source
from fedcore.training.sources import Packaged, resolve


@pytest.mark.parametrize(
    ("source", "location"),
    [
        ("owner/name", "owner/name"),
        ("hf:imdb", "imdb"),
        ("hf:owner/na-me.v2", "owner/na-me.v2"),
    ],
)
def test_hub_names_are_recognised(source: str, location: str) -> None:
    found = check_data_source(source)
    assert (found.kind, found.location) == ("hub", location)
    assert check_model_source(source).location == location


@pytest.mark.parametrize("source", ["bbc-nws", "bbcnews", "BBC-News"])
def test_misspelt_corpus_names_the_nearest_one_on_one_line(source: str) -> None:
    with pytest.raises(FedcoreError, match=r"unknown dataset .*did you mean bbc-news\?") as error:
        check_data_source(source)
    assert "\n" not in str(error.value)


def test_misspelt_model_names_the_nearest_one() -> None:
    with pytest.raises(FedcoreError, match=r"unknown model 'minlm'; did you mean minilm or"):
        check_model_source("minlm")


@pytest.mark.parametrize("source", ["", "hf:", "hf:a/b/c", "hf:../x", "a b", "a/b/c", "-x/y"])
def test_names_that_can_be_nothing_are_refused(source: str) -> None:
    with pytest.raises(FedcoreError, match="unknown dataset"):
        check_data_source(source)


def test_absent_file_names_the_nearest_one_beside_it(tmp_path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(FedcoreError, match=r"no such file; did you mean .*train\.csv\?"):
        check_data_source(str(tmp_path / "trian.csv"))


def test_an_existing_parent_makes_a_one_slash_name_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert-base").mkdir(parents=True)
    with pytest.raises(FedcoreError, match=r"no such folder; did you mean models/bert-base\?"):
        check_model_source("models/bert-bse")
    assert check_model_source("hf:models/bert-bse").kind == "hub"


def test_data_suffix_without_folder_is_a_missing_file_not_a_hub_id(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("train.csv", "data/train.jsonl"):
        with pytest.raises(FedcoreError, match="no such file"):
            check_data_source(source)


def test_wrong_kind_of_path_is_said(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FedcoreError, match="a folder, where a file is needed"):
        check_data_source(str(tmp_path))
    with pytest.raises(FedcoreError, match="a file, where a folder is needed"):
        check_model_source(str(tmp_path / "notes.txt"))
    with pytest.raises(FedcoreError, match=r"ending '\.txt'; valid: \.csv, \.tsv, \.jsonl"):
        check_data_source(str(tmp_path / "notes.txt"))


def test_model_folder_needs_a_config(tmp_path) -> None:
    with pytest.raises(FedcoreError, match=r"model .*: cannot read .*config\.json: .*No such file"):
        check_model_source(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FedcoreError, match=r"config\.json must hold a JSON object"):
        check_model_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FedcoreError, match="names no model_type"):
        check_model_source(str(tmp_path))


def test_missing_packages_name_the_extra(monkeypatch) -> None:
    found = importlib.util.find_spec

    def without(*names: str):
        return lambda name, package=None: None if name in names else found(name, package)

    absent = {"x": Packaged("some-dist", "surely_absent_module", "data")}
    with pytest.raises(MissingExtraError, match=r"some-dist .*fedcore-lora\[examples\]"):
        resolve("dataset", "x", absent, wanted="file")
    monkeypatch.setattr("fedcore.training.datasets.find_spec", without("datasets"))
    with pytest.raises(MissingExtraError, match=r"datasets .*fedcore-lora\[hub\]"):
        check_data_source("hf:imdb")
    monkeypatch.setattr("fedcore.training.models.find_spec", without("transformers"))
    with pytest.raises(MissingExtraError, match=r"transformers .*fedcore-lora\[peft\]"):
        check_model_source("minilm")


def test_packaged_sources_are_found_without_importing_their_packages() -> None:
    import sys

    assert (check_data_source("bbc-news").path / "business").is_dir()
    assert (check_model_source("minilm").path / "model.safetensors").is_file()
    for item in (*PACKAGED_DATA.values(), *PACKAGED_MODELS.values()):
        assert item.module not in sys.modules
