"""What a node may say of itself, and what is refused by name."""

import pytest

from fedcore.errors import FedcoreError
from fedcore.training.site_settings import SiteSettings, parse_columns, read_site_settings

FULL = {
    "site": "hospital-a",
    "data": "/srv/own notes.jsonl",
    "test-data": "/srv/held out.jsonl",
    "columns": "q:prompt, a:completion",
    "model": "/srv/model",
    "device": "cuda:0",
    "dtype": "bfloat16",
    "quantisation": "nf4",
    "batch-size": 2,
}


def test_every_key_of_a_site_is_read():
    site = SiteSettings.read(FULL)
    assert site.columns == (("q", "prompt"), ("a", "completion"))
    assert (site.site, site.data, site.batch_size) == ("hospital-a", FULL["data"], 2)
    assert site.owns_data
    assert {site: 1}[SiteSettings.read(FULL)] == 1
    part = SiteSettings.read({"partition-id": 0, "num-partitions": 4})
    assert not part.owns_data
    assert part.partition_id == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"patition-id": 1}, "unknown key 'patition-id'; did you mean partition-id"),
        ({"site": "Hospital A"}, "'Hospital A' cannot be the name of a site"),
        ({"site": "a" * 65}, "cannot be the name"),
        ({"site": "a\n"}, "cannot be the name"),
        ({"data": 3}, "data is int or empty"),
        ({"data": ""}, "data is str or empty"),
        ({"batch-size": 0}, "batch-size is 0"),
        ({"batch-size": True}, "batch-size is True"),
        ({"partition-id": 1}, "data and partition-id are both set"),
        ({"columns": "q"}, "pass file column : recipe column"),
        ({"columns": "q:prompt,q:completion"}, "names a column twice"),
        ({"columns": "q:prompt,a:prompt"}, "names a column twice"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, problem):
    with pytest.raises(FedcoreError, match=f"^node-config: .*{problem}"):
        SiteSettings.read({**FULL, **change})


@pytest.mark.parametrize("key", ["site", "test-data", "columns"])
def test_what_belongs_to_data_needs_it(key):
    with pytest.raises(FedcoreError, match=f"{key} is set without data"):
        SiteSettings.read({key: FULL[key], "partition-id": 0})
    with pytest.raises(FedcoreError, match="data is set without site"):
        SiteSettings.read({"data": "x.csv"})


def test_a_file_of_settings_is_read_with_paths_beside_it(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text('site = "a"\ndata = "rows.csv"\ncolumns = "q:text"\nbatch-size = 4\n')
    site = read_site_settings(file)
    assert site.data == str(tmp_path / "rows.csv")
    assert site == SiteSettings("a", site.data, columns=parse_columns("q:text"), batch_size=4)
    file.write_text('site = "a"\ndata = rows.csv\n')
    with pytest.raises(FedcoreError, match=r"site\.toml"):
        read_site_settings(file)
    with pytest.raises(FedcoreError, match=r"none\.toml cannot be read: No such file"):
        read_site_settings(tmp_path / "none.toml")
