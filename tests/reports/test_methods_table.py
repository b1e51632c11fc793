from fedcore.methods import METHODS, describe_methods
from fedcore.reports.methods_table import methods_markdown

ROW = {
    "name": "some",
    "aliases": "other",
    "summary": "does something",
    "paper": "arXiv 0000.00000",
    "adapter": "lora",
    "exact": "when a <= b | c",
    "linear": True,
    "mixed_ranks": False,
    "personalised": False,
    "uplink": "r d_in",
    "downlink": "r d_out",
    "server_cost": "2 N r d_in",
    "privacy_note": "none",
}


def test_a_row_holds_every_trait_in_its_column():
    head, rule, row = methods_markdown([ROW]).splitlines()
    assert head == (
        "| method | adapter | exact | linear | mixed ranks | personalised | up | down "
        "| server cost | source |"
    )
    assert rule == "| " + " | ".join([":---"] * 10) + " |"
    assert row == (
        "| `some` | lora | when a &lt;= b \\| c | yes | no | no | r d_in | r d_out "
        "| 2 N r d_in | arXiv 0000.00000 |"
    )


def test_methods_keep_the_order_of_the_catalog():
    lines = methods_markdown(describe_methods()).splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == [method.name for method in METHODS]
