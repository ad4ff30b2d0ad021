"""Numbers, intervals and files of a report."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from ijsat_aug.evaluation import Report, Result, to_html, to_markdown, to_table
from ijsat_aug.evaluation.pictures import from_png, to_png
from ijsat_aug.evaluation.report import wilson
from ijsat_aug.evaluation.table import rows


def result(name: str, correct: str, kind: str = "lp", **options) -> Result:
    return Result(
        name, name.split("/")[0].upper(), kind, "8/255", 50, "somebody", correct, **options
    )


def report(**correct: str) -> Report:
    kinds = {"clean": "clean", "linf": "lp", "om": "manifold", "fog": "unseen", "gabor": "unseen"}
    found = {n: result(n, c, kinds[n]) for n, c in correct.items()}
    return Report({"name": "net", "images": 8, "data": "d"}, found)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (3, 7), (7, 7), (913, 1000), (1, 10000)])
def test_intervals_are_those_of_wilson(hits, count) -> None:
    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    share = wilson(hits, count)
    assert share.value == hits / count
    assert share.low == pytest.approx(low, abs=1e-6)
    assert share.high == pytest.approx(high, abs=1e-6)


def test_the_union_is_the_worst_case_of_each_image() -> None:
    found = report(clean="11111110", linf="11110000", om="01111110", fog="11100110", gabor="1" * 8)
    assert found.union().value == 2 / 8  # images 1 and 2
    assert found.union("unseen").value == 5 / 8
    lines = {row.title: row.percent for row in rows(found)}
    assert lines["worst case of the unseen"] == "62.5"
    assert lines["worst case of 4 attacks"] == "25.0"


def test_a_change_is_measured_on_the_same_images() -> None:
    ours = report(clean="11111111", linf="11111000", fog="11110000")
    base = report(clean="11111110", linf="11100001", fog="11110000")
    change = {row.title: row.change for row in rows(ours, base)}
    assert change["LINF"].value == pytest.approx(1 / 8)  # two gained, one lost
    # Agresti and Min: half an image more in each cell of the table of before and after.
    gained, lost, count = 2.5, 1.5, 10
    middle = (gained - lost) / count
    half = 1.96 * ((gained + lost - (gained - lost) ** 2 / count) / count**2) ** 0.5
    assert change["LINF"][1:] == pytest.approx((middle - half, middle + half), rel=1e-5)
    assert change["FOG"] == pytest.approx((0, -1.96 / 10, 1.96 / 10))
    assert change["worst case of 2 attacks"].value == pytest.approx(1 / 8)
    other = Report({**base.settings, "data": "e"}, base.results)
    with pytest.raises(ValueError, match="different images"):
        rows(ours, other)


def test_another_budget_is_not_compared() -> None:
    ours = report(clean="11", linf="10")
    weaker = Result("linf", "LINF", "lp", "4/255", 50, "", "11")
    base = Report(ours.settings, {**ours.results, "linf": weaker})
    assert {row.title: row.difference for row in rows(ours, base)}["LINF"] == ""


def test_corruptions_are_means_of_severities() -> None:
    found = {"clean": result("clean", "1111", "clean")}
    for severity, right in enumerate(("1111", "1110", "1100", "1000", "0000"), 1):
        found[f"fog/{severity}"] = result(f"fog/{severity}", right, "corruption")
        found[f"snow/{severity}"] = result(f"snow/{severity}", "1111", "corruption")
    both = Report({"name": "net", "images": 4, "data": "d"}, found)
    assert both.corruptions() == {"fog": 0.5, "snow": 1.0}
    assert both.summary()["corruptions"] == 0.75
    *lines, mean = rows(both)[1:]
    assert [(row.title, row.percent) for row in lines] == [("FOG", "50.0"), ("SNOW", "100.0")]
    assert mean.title == "mean of 2 (mCE 25.0)"
    # Four images of five severities are four images: no interval of twenty.
    eight = torch.tensor([0.8, 0.6, 0.4, 0.2, 1, 1, 0, 0])  # two right and two wrong images more
    spread = eight.std(correction=0) / 8**0.5
    assert lines[0].accuracy.high == pytest.approx(0.5 + 1.96 * float(spread), abs=1e-6)


def test_a_slip_makes_no_corruption_more_certain() -> None:
    def interval(*lines: str) -> tuple[float, float]:
        found = {"clean": result("clean", "1" * 100, "clean")}
        for severity, right in enumerate(lines, 1):
            found[f"fog/{severity}"] = result(f"fog/{severity}", right, "corruption")
        _, row, _ = rows(Report({"name": "net", "images": 100, "data": "d"}, found))
        return row.accuracy.low, row.accuracy.high

    all_right = interval(*["1" * 100] * 5)
    one_wrong = interval(*["1" * 100] * 4, "0" + "1" * 99)
    assert one_wrong[0] < all_right[0] < 0.97
    assert all_right[1] == one_wrong[1] == 1


def test_files_come_back_as_they_were(tmp_path) -> None:
    found = report(clean="10", linf="00")
    pictured = result("linf", "00", pictures=("abc",), seen=(3,), notes={"APGD-CE": 1.0})
    found = Report(
        found.settings, {**found.results, "linf": pictured}, ("doubt",), (1,), ("cat", "dog")
    )
    found.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == found
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["linf"] == 0
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="no report"):
        Report.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Report.load(tmp_path / "c.json")


def test_the_page_holds_everything_itself() -> None:
    clean, dark = torch.rand(3, 8, 8), torch.zeros(3, 8, 8)
    found = {
        "clean": result("clean", "1", "clean", pictures=(to_png(clean),), seen=(0,)),
        "linf": result("linf", "0", pictures=(to_png(dark),), seen=(1,)),
    }
    page = to_html(
        Report(
            {"name": "<net>", "images": 1, "data": "d"}, found, ("a & b",), (0,), ("<cat>", "dog")
        )
    )
    assert "&lt;net&gt;, 1 images" in page
    assert "&lt;cat&gt;" in page
    assert "a &amp; b" in page
    assert not re.search(r"https?://|<script|<link", page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)" alt="(\w*)"', page)
    assert [kind for _, kind in images] == ["", "", "difference"]
    assert torch.allclose(from_png(images[0][0]), clean, atol=1 / 255)
    expected = (0.5 + 10 * (dark - clean)).clamp(0, 1)
    assert (from_png(images[2][0]) - expected).abs().max() < 0.03  # ten times the rounding
    assert page.count('class="fooled"') == 1


def test_who_shows_pgd_alone_is_told() -> None:
    alone = report(clean="11", linf="10")
    assert "upper bound" in to_markdown(alone)
    assert "upper bound" in to_html(alone)
    assert "upper bound" in to_table(alone).caption
    both = Report(alone.settings, {**alone.results, "autoattack": result("autoattack", "10")})
    assert "upper bound" not in to_markdown(both)
    assert to_table(both).caption is None
    weaker = replace(both.results["autoattack"], budget="1/255")
    assert "upper bound" in to_markdown(Report({}, {**both.results, "autoattack": weaker}))


def test_changes_between_versions_are_told() -> None:
    ours, theirs = (
        Report({"data": "d", "version": version}, report(clean="11").results)
        for version in ("1.2", "1.1")
    )
    assert "against a report of ijsat-aug 1.1, this one is of 1.2" in to_markdown(ours, theirs)
    assert "against a report" not in to_markdown(ours, ours)


def test_large_pictures_are_made_small() -> None:
    assert max(from_png(to_png(torch.rand(3, 500, 300))).shape) <= 96


@pytest.mark.parametrize("chances", [(0.0, 0.0), (0.05, 0.01), (0.5, 0.3), (0.9, 0.02)])
def test_intervals_of_changes_hold_the_truth(chances) -> None:
    """Of images that are gained and lost with these chances; also where nothing ever changes."""
    gained, lost = chances
    generator = torch.Generator().manual_seed(0)
    hits, tries, count = 0, 400, 60
    for _ in range(tries):
        u = torch.rand(count, generator=generator)
        before = ["01"[bool(gained < v < gained + lost or v > 0.95)] for v in u]
        after = ["01"[bool(v < gained or v > 0.95)] for v in u]
        ours, theirs = report(clean="".join(after)), report(clean="".join(before))
        change = rows(ours, theirs)[0].change
        hits += change.low <= gained - lost <= change.high
        assert change.low <= change.value <= change.high
        assert change.low < change.high
    assert hits / tries > 0.93


def test_the_change_under_a_corruption_counts_images_not_severities() -> None:
    """Five severities of one image agree: they are no five images."""

    def found(line: str) -> Report:
        names = [f"fog/{s}" for s in range(1, 6)]
        return Report({"data": "d"}, {n: result(n, line, "corruption") for n in names})

    ours, theirs = "1" * 30 + "0" * 20, "1" * 20 + "0" * 30
    fog = rows(found(ours), found(theirs))[0]
    (one,) = (r for r in rows(report(clean=ours), report(clean=theirs)) if r.title == "CLEAN")
    assert fog.change == pytest.approx(one.change)
    assert fog.difference == one.difference == "+20.0 ± 12.1"


def test_noise_of_another_seed_is_not_compared() -> None:
    def found(seed: int) -> Report:
        return Report({"data": "d", "seed": seed}, {"fog/1": result("fog/1", "1100", "corruption")})

    assert rows(found(0), found(0))[0].change is not None
    assert rows(found(0), found(1))[0].change is None


def test_worst_cases_of_other_budgets_are_not_compared() -> None:
    ours, theirs = report(clean="1111", linf="1100"), report(clean="1111", linf="1000")
    theirs.results["linf"] = replace(theirs.results["linf"], budget="64/255")
    (worst,) = (row for row in rows(ours, theirs) if row.title.startswith("worst case"))
    assert worst.change is None


def test_a_name_is_no_markup() -> None:
    found = Report({"images": 4, "name": "net[/v2] [lr=0.1]"}, report(clean="1110").results)
    console = Console(width=100, file=io.StringIO())
    console.print(to_table(found))
    assert "net[/v2] [lr=0.1]" in console.file.getvalue()


@pytest.mark.parametrize("content", [b"\x80\x02}q", b'{"format": 1, "results": []}', b"{}"])
def test_what_is_no_report(content, tmp_path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="is no report of an evaluation"):
        Report.load(tmp_path / "a.json")


def test_other_steps_are_not_compared() -> None:
    ours = {"clean": result("clean", "11", "clean"), "linf": result("linf", "10")}
    base = Report({"data": "d"}, {**ours, "linf": replace(ours["linf"], steps=10)})
    lines = {row.title: row.difference for row in rows(Report({"data": "d"}, ours), base)}
    assert lines["LINF"] == ""


def test_attacks_along_other_flows_are_not_compared() -> None:
    def found(flow: str, line: str) -> Report:
        om = result("om", line, "manifold")
        return Report(
            {"data": "d", "flow": flow}, {"clean": result("clean", "11", "clean"), "om": om}
        )

    ours, theirs = found("a", "11"), found("b", "10")
    changes = {row.title: row.change for row in rows(ours, theirs)}
    assert changes["OM"] is changes["worst case of 1 attack"] is None
    assert {r.title: r.change for r in rows(ours, found("a", "10"))}["OM"] is not None


def test_the_half_of_an_interval_that_is_cut_off_is_not_told_as_all() -> None:
    (one,) = (r for r in rows(report(clean="0" * 20), report(clean="1" * 20)) if r.title == "CLEAN")
    assert one.change is not None
    assert one.difference == f"-100.0 ± {100 * one.change.high + 100:.1f}"


def test_words_of_the_user_break_neither_tables_nor_pages() -> None:
    clean = Result(
        "clean", "a|b\n<b>", "clean", "", 0, "", "10", pictures=('"><script>',), seen=(0,)
    )
    found = Report({"data": "d", "images": 2, "name": "<img src=x>"}, {"clean": clean}, truth=(0,))
    lines = to_markdown(found).splitlines()
    assert lines[0] == "**&lt;img src=x&gt;, 2 images**"
    assert lines[4].startswith(r"| a\|b &lt;b&gt; |")
    assert "<script>" not in to_html(found)


@pytest.mark.parametrize(("names", "told"), [
    (("linf", "autoattack_l2"), "LINF"), (("l2", "autoattack"), "L2"),
    (("l2", "linf"), "LINF and L2"),
])  # fmt: skip
def test_autoattack_in_the_other_norm_is_no_autoattack(names, told) -> None:
    found = Report({"data": "d"}, {n: result(n, "10") for n in ("clean", *names)})
    assert f"the accuracy under {told} is an upper bound" in to_markdown(found)


def test_results_of_other_images_are_no_report(tmp_path) -> None:
    found = json.loads(report(clean="10", linf="10").to_json())
    found["results"]["linf"]["correct"] = "101"
    (tmp_path / "a").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is no report of an evaluation"):
        Report.load(tmp_path / "a")


def test_what_was_wrong_before_is_no_success_of_an_attack() -> None:
    found = report(clean="1110", linf="1101", fog="0111")
    assert found.union().value == 1 / 4
    assert found.union("lp").value == 1 / 2


def test_a_mean_of_some_of_the_corruptions_is_not_compared() -> None:
    names = [f"{name}/{severity}" for name in ("fog", "snow") for severity in (1, 2)]

    def found(*of: str) -> Report:
        return Report({"data": "d"}, {name: result(name, "1100", "corruption") for name in of})

    fog, snow, mean = (row.change for row in rows(found(*names), found(*names[:2])))
    assert fog is not None
    assert snow is None
    assert mean is None
    fog, snow, mean = (row.change for row in rows(found(*names), found(*names[:3])))
    assert snow is None  # one of its severities
    assert rows(found(*names), found(*names))[-1].change is not None


def test_a_report_of_another_format_is_told(tmp_path) -> None:
    found = json.loads(report(clean="11", linf="10").to_json())
    for other in (0, 2):
        (tmp_path / "a.json").write_text(json.dumps(found | {"format": other}))
        with pytest.raises(ValueError, match=f"has format {other}; this version reads 1"):
            Report.load(tmp_path / "a.json")
