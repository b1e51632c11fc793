import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.methods import METHODS
from fedcore.recipes import Recipe, load_recipe, parse_settings, shipped_recipes, to_toml


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_under_their_own_name_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert load_recipe(file) == recipe


@given(
    st.text(max_size=20),
    st.floats(1e-6, 10),
    st.lists(st.integers(-3, 3), max_size=3),
    st.sampled_from([m.name for m in METHODS]),
    st.dictionaries(st.sampled_from(["lora", "florg.sketched", "ffa"]), st.floats(1e-5, 1)),
)
def test_any_recipe_round_trips_through_toml(description, rate, layers, method, rates):
    import tomllib

    recipe = Recipe.model_validate(
        {
            "description": description,
            "adapter": {"layers": layers},
            "method": {"name": method},
            "optimiser": {"rate": rate, "rates": rates},
        }
    )
    assert Recipe.model_validate(tomllib.loads(to_toml(recipe))) == recipe


def test_settings_reach_any_key():
    settings = parse_settings(
        [
            "rounds=6",
            "partition.alpha=0.1",
            "adapter.layers=[4, 5]",
            "method.align=false",
            "model.source=org/name",
            "optimiser.state=keep",
        ]
    )
    recipe = load_recipe("bbc-news", settings)
    assert recipe.rounds == 6
    assert recipe.partition.alpha == 0.1
    assert recipe.adapter.layers == (4, 5)
    assert recipe.method.create().align is False
    assert recipe.model.source == "org/name"
    assert recipe.optimiser.settings(recipe.method.create()).state == "keep"


def test_learning_rates_go_from_method_to_family_to_common():
    recipe = load_recipe(
        "bbc-news",
        {
            "optimiser.rate": 1.0,
            "optimiser.rates": {"gram": 2.0, "florg.avg_a": 3.0, "FedAvg": 4.0},
        },
    )

    def rate(name):
        chosen = load_recipe(
            "bbc-news",
            {"optimiser": recipe.optimiser.model_dump(exclude_none=True), "method.name": name},
        )
        return chosen.optimiser.settings(chosen.method.create()).rate

    assert [rate(n) for n in ("ffa", "florg.sketched", "florg.avg_a", "fedit")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bbc-nws", {}, "unknown recipe 'bbc-nws'; did you mean bbc-news"),
        ("nothing.toml", {}, "there is no recipe file nothing.toml"),
        ("bbc-news", {"ruonds": 3}, "unknown recipe key 'ruonds'; did you mean rounds"),
        (
            "bbc-news",
            {"adapter.rnk": 3},
            r"unknown recipe key 'adapter.rnk'; did you mean adapter\.rank",
        ),
        ("bbc-news", {"method.name": "fedt"}, "unknown method 'fedt'; did you mean .*fedit"),
        ("bbc-news", {"method.algn": True}, "did you mean align"),
        ("bbc-news", {"rounds": 0}, "recipe key rounds: .*greater than or equal to 1; got 0"),
        ("bbc-news", {"partition.kind": "dirichle"}, "recipe key partition.kind: .*got 'dirichle'"),
        ("bbc-news", {"rounds.x": 1}, "rounds is not a section"),
        ("bbc-news", {"adapter": 3}, "adapter is a section, not a value"),
        ("bbc-news", {"optimiser.rates": {"floorg": 1.0}}, "did you mean .*florg"),
        ("bbc-news", {"optimiser.rates": {"lora": -1.0}}, "must be positive"),
    ],
)
def test_mistakes_get_one_line(name, settings, message):
    with pytest.raises(FedcoreError, match=message) as caught:
        load_recipe(name, settings)
    assert "\n" not in str(caught.value)


def test_broken_files_and_assignments_are_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("rounds = = 3")
    with pytest.raises(FedcoreError, match=r"mine\.toml"):
        load_recipe(file)
    with pytest.raises(FedcoreError, match="'rounds' is not of the form key=value"):
        parse_settings(["rounds"])


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_recipe_is_a_regular_file(make, tmp_path):
    make(tmp_path / "recipe.toml")
    with pytest.raises(FedcoreError, match=r"recipe .*recipe.toml cannot be read: "):
        load_recipe(tmp_path / "recipe.toml")
