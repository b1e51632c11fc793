from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub import constants

from fedcore.errors import FedcoreError
from fedcore.experiments.trials import check_sources
from fedcore.recipes import load_recipe
from fedcore.training.hub_access import check_obtainable
from fedcore.training.sources import NamedSource

MODEL = NamedSource("org/name", "hub", "org/name")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with what the test puts into the list, and an empty cache."""
    answers = [URLError("no route")]
    asked = []

    def opened(request, timeout):
        asked.append((request.full_url, request.get_method(), timeout))
        raise answers[0]

    monkeypatch.setattr("fedcore.training.hub_access.urlopen", opened)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return answers, asked, tmp_path


def test_a_hub_out_of_reach_is_said_with_what_to_pass(hub):
    with pytest.raises(FedcoreError, match=r"'org/name' is not in .* cannot be reached; .* folder"):
        check_obtainable("model", MODEL)
    with pytest.raises(FedcoreError, match=r"a local file with --set data\.source=PATH"):
        check_obtainable("dataset", MODEL)
    assert hub[1] == 2 * [(constants.ENDPOINT, "HEAD", 5.0)]


def test_any_answer_and_any_copy_in_the_cache_will_do(hub):
    answers, asked, cache = hub
    (cache / "models--org--name" / "snapshots").mkdir(parents=True)
    check_obtainable("model", MODEL)
    check_obtainable("model", NamedSource("x", "local", "x"))
    assert asked == []
    answers[0] = HTTPError("https://hub", 405, "no HEAD", {}, None)
    check_obtainable("dataset", MODEL)


def test_offline_mode_is_respected_and_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FedcoreError, match="is offline"):
        check_obtainable("model", MODEL)
    assert hub[1] == []


@pytest.mark.parametrize(
    "name",
    ["roberta-large-qnli", "roberta-large-mnli", "llama2-7b-commonsense", "llama2-7b-gsm8k"],
)
def test_recipes_of_papers_say_at_once_that_their_model_is_not_here(name, hub):
    recipe = load_recipe(name)
    with pytest.raises(FedcoreError, match=f"model '{recipe.model.source}' is not in this machine"):
        check_sources(recipe)
