"""`fedcore audit`: table, page, pictures and rows."""

from __future__ import annotations

import json
import sys

import pytest

from fedcore.audit.page import CAVEATS
from fedcore.cli import main
from tests.reports.test_page import check_self_contained

QUICK = ("--batch", "1", "--seeds", "2", "--starts", "1", "--steps", "30", "--refinements", "10")


@pytest.fixture
def audited(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["fedcore", "audit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return run


def test_the_audit_prints_a_table_and_leaves_a_page(audited, tmp_path):
    code, printed = audited(*QUICK, "--uploads", "full, ce_lora", "--out", str(tmp_path / "new"))
    assert code == 0
    lines = printed.out.splitlines()
    full = next(line for line in lines if line.startswith("full fine-tuning"))
    core = next(line for line in lines if line.startswith("CE-LoRA"))
    assert "8,970 64 of 64" in " ".join(full.split())
    assert "48 21 of 64" in " ".join(core.split())
    assert "no upload: noise" in printed.out
    page = check_self_contained(tmp_path / "new" / "audit.html")
    for caveat in CAVEATS:
        assert caveat in page.text
    assert page.tags.count("figure") == 2
    for name in ("reconstructions", "nearness"):
        png = (tmp_path / "new" / "plots" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "new" / "audit.json").read_text())
    assert stored["settings"]["uploads"] == ["full", "ce_lora"]
    assert [row["name"] for row in stored["rows"]] == [
        *("full", "ce_lora"),
        *("label mean", "mean", "noise"),
    ]
    assert stored["rows"][0]["psnr_half_width"] > 0


def test_one_silent_seed_as_json(audited):
    code, printed = audited(
        *("--uploads", "ce_lora", "--warm-up", "0", "--json", "--steps", "1"),
        *("--seeds", "1", "--batch", "2", "--refinements", "0"),
    )
    assert code == 0
    rows = json.loads(printed.out)
    assert (rows[0]["silent"], rows[0]["loss_mean"], rows[0]["unknowns"]) == (1, 0.0, 128)
    assert rows[0]["psnr_half_width"] is None
    assert rows[1]["loss_mean"] is None


def test_unknown_uploads_end_with_one_line(audited):
    code, printed = audited("--uploads", "fll")
    assert (code, printed.out) == (2, "")
    assert printed.err == "fedcore: unknown upload 'fll'; did you mean full or florg?\n"
