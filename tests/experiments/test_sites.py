"""Sites that own their data, simulated in this process: one file per site."""

from __future__ import annotations

import json

import pytest
import torch

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.experiments.site_data import read_site, site_files
from fedcore.recipes import load_recipe, parse_recipe, to_toml, with_settings
from fedcore.training.datasets import train_test_split
from fedcore.training.site_settings import SiteSettings
from tests.experiments.site_jobs import SITES, site_recipe, write_site, write_sites


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sites")
    write_sites(home / "sites")
    return home


def simulated(home, task="classification", **settings):
    return site_recipe(home, task, **{"data.sites": str(home / "sites"), **settings})


@pytest.mark.parametrize("task", ["classification", "causal", "sft"])
def test_a_run_of_sites_trains_each_on_all_of_its_own_training_rows(task, home, tmp_path):
    summary = start(simulated(home, task), tmp_path / "run")
    assert summary["finished"]
    assert summary["clients"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["sampled"] for line in lines[1:]] == [list(SITES)] * 2
    examples = {c["client"]: c["examples"] for c in lines[-1]["clients"]}
    assert examples == {"hospital-a": 80, "hospital-b": 32}
    # The recipe that the run wrote is read again as it was meant.
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    assert "partition" not in recipe.model_fields_set
    assert recipe.most_clients is None
    assert resume(tmp_path / "run")["finished"]


def test_rows_and_their_split_depend_on_the_site_alone(home):
    """A node that sees its own file alone holds what the simulation gives it."""
    recipe = simulated(home)
    both = build_experiment(recipe, Observer())
    assert both.held == {"hospital-a": 80, "hospital-b": 32}
    assert {c: len(s) for c, s in both.test_shards.items()} == {"hospital-a": 20, "hospital-b": 8}
    for site in site_files(home / "sites"):
        alone = build_experiment(recipe, Observer(), site=site)
        name = site.site
        assert alone.trainers == (name,)
        for theirs, ours in ((both.shards, alone.shards), (both.test_shards, alone.test_shards)):
            one, other = both.examples.take(theirs[name]), alone.examples.take(ours[name])
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.labels, other.labels)


def test_the_split_is_drawn_by_seed_and_site(home):
    recipe = simulated(home)
    site = site_files(home / "sites")[0]
    own = read_site(with_settings(recipe, {"seed": 3}), site)
    assert not {*own.train.texts} & {*own.test.texts}
    assert len(own.train) + len(own.test) == 100
    held_out = str(home / "sites/hospital-b.jsonl")
    whole = read_site(recipe, SiteSettings("x", site.data, held_out))
    train, test = train_test_split(whole.train, 0.2, derive_seed(3, "split", "hospital-a"))
    assert (own.train.texts, own.test.texts) == (train.texts, test.texts)
    assert read_site(with_settings(recipe, {"seed": 4}), site).test.texts != own.test.texts


def test_held_out_rows_of_a_site_replace_the_split(home, tmp_path):
    recipe, (a, b) = simulated(home), site_files(home / "sites")
    own = read_site(recipe, SiteSettings("a", a.data, b.data))
    assert (len(own.train), len(own.test)) == (100, 40)
    with pytest.raises(FedcoreError, match="site a: 100 texts of test-data are in data too"):
        read_site(recipe, SiteSettings("a", a.data, a.data))


def test_a_site_that_lacks_classes_has_the_labels_of_all(home, tmp_path):
    rows = [
        {"text": f"goal match {w}", "label": "sport"}
        for w in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    ]
    folder = write_sites(tmp_path / "sites")
    (folder / "one-class.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = build_experiment(simulated(home, **{"data.sites": str(folder)}), Observer())
    assert experiment.label_names == ("film", "money", "sport")
    assert experiment.counts.class_counts[2] == (0, 0, 8)
    wanted = ["sport", "money", "film"]
    recipe = simulated(home, **{"data.sites": str(folder), "data.labels": wanted})
    assert build_experiment(recipe, Observer()).label_names == tuple(wanted)
    missing = simulated(home, **{"data.sites": str(folder), "data.labels": wanted[:2]})
    with pytest.raises(FedcoreError, match=r"site hospital-a: .*jsonl:1: .*not in data\.labels$"):
        build_experiment(missing, Observer())


def test_columns_of_a_file_are_renamed_to_the_recipes(home, tmp_path):
    site = SiteSettings.read(
        {
            "site": "c",
            "data": str(write_site(tmp_path / "c.jsonl", 30, 9, "note", "kind")),
            "columns": "note:text, kind:label",
        }
    )
    recipe = simulated(home)
    assert len(read_site(recipe, site, ["film", "money", "sport"]).train) == 24
    absent = SiteSettings("c", site.data, columns=(("remark", "text"),))
    with pytest.raises(FedcoreError, match=r"site c: .*c\.jsonl:1: unknown column 'remark'"):
        read_site(recipe, absent)


SECRET = "Patient-Zero"


@pytest.mark.parametrize(
    "row",
    [
        {"text": SECRET, "label": [SECRET]},
        {"text": [SECRET], "label": "sport"},
        {"text": SECRET, "label": SECRET},
        {"txt": SECRET, "label": "sport"},
    ],
    ids=["label of another type", "text of another type", "unknown label", "absent column"],
)
def test_a_refusal_names_site_file_and_line_and_no_value(row, home, tmp_path):
    file = write_site(tmp_path / "d.jsonl", 10, 1)
    with file.open("a") as handle:
        handle.write(json.dumps(row))
    labels = ["film", "money", "sport"]
    with pytest.raises(FedcoreError, match=r"^site d: .*d\.jsonl:11: ") as caught:
        read_site(simulated(home), SiteSettings("d", str(file)), labels)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Hospital C.jsonl", "cannot be the name of a site"),
        ("notes.txt", "is not a site's file"),
        ("hospital-a.csv", "are both of site hospital-a"),
    ],
)
def test_a_folder_of_sites_holds_one_file_per_site(name, problem, home, tmp_path):
    folder = write_sites(tmp_path / "sites")
    (folder / name).write_text("text,label\na,b\n")
    with pytest.raises(FedcoreError, match=problem):
        site_files(folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"partition.alpha": 0.1}, r"recipe key partition\.alpha: every site trains on its own"),
        ({"data.source": "bbc-news"}, "both set"),
        ({"data.max_examples": 20}, r"data\.max_examples is set"),
        ({"round.expected": 2, "round.quorum": 3}, "quorum is 3"),
        ({"data.labels": ["a", "a"]}, "names a label twice"),
    ],
)
def test_keys_that_do_not_apply_to_sites_are_refused_by_name(settings, problem, home):
    with pytest.raises(FedcoreError, match=problem):
        simulated(home, **settings)


def test_clients_bound_the_number_of_sites(home):
    assert build_experiment(simulated(home, clients=5), Observer()).recipe.clients == 2
    with pytest.raises(FedcoreError, match="there are 2 sites and clients = 1"):
        build_experiment(simulated(home, clients=1), Observer())


DEPLOYED = {
    "data.source": "sites",
    "data.labels": ["film", "money", "sport"],
    "round.expected": 2,
    "evaluation.on": "sites",
}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("data.labels", None, r"data\.labels is not set"),
        ("round.expected", None, r"round\.expected is not set"),
        ("evaluation.on", "server", "the server has no rows"),
        ("adapter.client_ranks", [1, 2], r"adapter\.client_ranks"),
        ("clients", 1, r"round\.expected is 2; pass 1 to clients = 1"),
    ],
)
def test_a_recipe_of_deployed_sites_says_what_no_file_can(key, value, problem, home):
    settings = {k: v for k, v in {**DEPLOYED, key: value}.items() if v is not None}
    with pytest.raises(FedcoreError, match=problem):
        site_recipe(home, **settings)


def test_a_recipe_of_sites_reads_back_from_its_text(home):
    for recipe in (simulated(home), site_recipe(home, **DEPLOYED)):
        again = parse_recipe(to_toml(recipe))
        assert again == recipe
        assert again.most_clients is None


def test_the_server_of_deployed_sites_builds_no_data(home):
    experiment = build_experiment(site_recipe(home, **DEPLOYED), Observer())
    assert len(experiment.examples) == 0
    assert experiment.shards == {}
    assert len(experiment.test) == 0


def test_a_device_and_a_model_folder_are_the_sites_own(home):
    site = site_files(home / "sites")[0]
    model = str(home / "site-model")
    recipe = simulated(home, **{"model.source": model})
    experiment = build_experiment(
        recipe, Observer(), site=SiteSettings(site.site, site.data, model=model, device="cpu")
    )
    assert experiment.recipe.training.device == "cpu"
    assert experiment.recipe.model.source == model
    for settings, problem in (
        ({"model": str(home / "none")}, "model is not a folder"),
        ({"batch_size": 2}, "batch-size is 2, and training.batch_size is 8"),
        ({"device": "warp"}, "'warp' cannot be used"),
    ):
        with pytest.raises(FedcoreError, match=problem):
            build_experiment(
                recipe, Observer(), site=SiteSettings(site.site, site.data, **settings)
            )
