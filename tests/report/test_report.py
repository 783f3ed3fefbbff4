"""The page about runs: what it says, that it is safe to open, and, where a browser is there, what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from written_run import ANSWERS, divergences, read_summary, samples, write_run

from mikv.report.__main__ import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028 {title}"

browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed: what the page shows is not looked at")


def report(tmp_path: Path, *folders: Path) -> str:
    file = tmp_path / "page.html"
    assert main([*map(str, folders), "-o", str(file)]) == 0
    return file.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Names of the elements that a parser sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        self.names.append(tag)


def content_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def shown(page: str, tmp_path: Path, action: str = "") -> str:
    """The document after its script has run, as text. action: JavaScript of a user, run afterwards (the page itself would
    refuse it: its security policy knows its own script alone)."""
    assert BROWSER is not None
    if action:
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
            "</body>", f"<script>{action}</script></body>"
        )
    file = tmp_path / "shown.html"
    file.write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    return subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


def column(document: str, index: int) -> list[str]:
    """Cells of a column of the table of points, first lines."""
    table = document[document.index('id="points"') :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<td[^>]*>([^<]*)", row)[index] for row in rows]


def test_content_is_what_the_records_hold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "digits")
    (run,) = content_of(report(tmp_path, folder))["runs"]
    for point, row in zip(run["points"], read_summary(folder), strict=True):
        assert (point["label"], point["size"]) == (row["label"], row["size_percent"])
        assert point["bytes"] == sum(row["nbytes"].values())
        accuracy = point["measures"]["accuracy"]
        assert (accuracy["value"], accuracy["ci95"]) == (row["value"], row["ci95"])
        assert point["measures"]["kl"]["ci95"] == row["kl_ci95"]
        assert point["measures"]["invented"]["value"] == row["rates"]["invented"]["value"]
        if row["policy"] != "full":
            assert accuracy["difference_ci95"] == row["difference_ci95"]
            assert [accuracy[name] for name in ("mcnemar_p", "lost", "gained")] == [
                row["mcnemar_p"],
                row["lost"],
                row["gained"],
            ]
        else:
            assert "difference" not in accuracy  # to itself
    assert [view["key"] for view in run["views"]] == ["accuracy", "kl", "agreement", "nll_change", "invented"]
    kl = run["views"][1]
    assert kl["log"]
    assert kl["points"] == [1, 2]  # not the full cache, whose own is 0


def test_a_divergence_has_no_change_and_the_full_caches_no_interval(tmp_path: Path) -> None:
    (run,) = content_of(report(tmp_path, write_run(tmp_path / "texts", divergences())))["runs"]
    assert run["views"][0]["key"] == "kl"
    full, *others = [point["measures"]["kl"] for point in run["points"]]
    assert full == {"value": 0.0, "n": 8, "ci95": None, "lower_is_better": True}
    for measure in others:
        assert set(measure) == set(full)
        assert measure["ci95"][0] < measure["value"]
    assert all("difference" in point["measures"]["invented"] for point in run["points"][1:])


def test_flips_show_both_answers(tmp_path: Path) -> None:
    (run,) = content_of(report(tmp_path, write_run(tmp_path / "digits")))["runs"]
    seen = [
        (f["label"], f["sample"], f["better"], *(a["text"] for a in f["answers"]), *(a["outcomes"] for a in f["answers"]))
        for f in run["flips"]
    ]
    lost = [("h2o 20%", str(i), False, str(i), "9", ["correct"], ["invented"]) for i in range(1, 7)]
    gained = ("h2o 20%", "7", True, "9", "7", ["invented"], ["correct"])
    assert seen == [*lost, gained, ("mikv 20% 8/3", "6", False, "6", "7", ["correct"], [])]


def test_two_runs_of_a_task_have_titles_of_their_own(tmp_path: Path) -> None:
    runs = content_of(report(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b")))["runs"]
    assert [run["title"] for run in runs] == ["tiny · digits (a)", "tiny · digits (b)"]


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    """No address but the name of SVG's namespace, no element that loads, and a policy that would stop it."""
    page = report(tmp_path, write_run(tmp_path / "digits"))
    assert re.findall(r"\w+://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert not re.findall(r"<(?:img|iframe|object|embed)\b|\bsrc=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_what_a_model_wrote_can_not_leave_its_string(tmp_path: Path) -> None:
    rows = samples({("full", "full"): ["0", "1"], ("mikv", "mikv 20% 8/3"): ["0", EVIL]})
    page = report(tmp_path, write_run(tmp_path / "evil", rows))

    reader = Elements()
    reader.feed(page)
    assert reader.names.count("script") == 2
    assert "img" not in reader.names
    assert "\u2028" not in page
    assert content_of(page)["runs"][0]["flips"][0]["answers"][1]["text"] == EVIL


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "holds no results"),
        (lambda folder: folder.mkdir() or folder, "holds no results"),
        (lambda folder: (write_run(folder) / "summary.jsonl").write_text("{"), "is damaged"),
        (lambda folder: (write_run(folder) / "summary.jsonl").write_text("[1]\n"), "is damaged"),
        (lambda folder: (write_run(folder) / "summary.jsonl").write_text('{"label": "full"}\n'), "older version (ci95, metric"),
        (lambda folder: (write_run(folder) / "samples.jsonl").write_text("?\n"), "is no record"),
    ],
)
def test_a_folder_without_results_is_said(tmp_path: Path, make: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_can_not_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "run")), "-o", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_summary_without_its_samples_is_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "digits")
    (folder / "samples.jsonl").unlink()
    (run,) = content_of(report(tmp_path, folder))["runs"]
    assert (run["flips"], run["has_samples"]) == ([], False)


@browser
def test_a_browser_shows_curves_table_and_flips(tmp_path: Path) -> None:
    """With its security policy in force: its own script is the one that it allows."""
    document = shown(report(tmp_path, write_run(tmp_path / "digits")), tmp_path)
    assert column(document, 0) == [label for _, label in ANSWERS]
    assert column(document, 1) == ["0.875", "0.250", "0.750"]
    assert column(document, 4) == ["", "-62.5", "-12.5"]  # points against the full cache
    assert document.count('class="point"') == 3 + 2  # accuracy, and the divergence of two
    assert document.count("got worse</span>") == 6


@browser
def test_a_click_sorts_and_a_second_one_turns_around(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "digits"))
    click = "document.querySelectorAll('#points th button')[1].click();"
    assert column(shown(page, tmp_path, click), 1) == ["0.250", "0.750", "0.875"]
    assert column(shown(page, tmp_path, click + click), 1) == ["0.875", "0.750", "0.250"]


@browser
def test_points_say_their_numbers_and_policies_can_be_hidden(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "digits"))
    hover = "document.querySelectorAll('.point')[1].dispatchEvent(new Event('mouseenter'));"
    tip = re.search(r'<div class="tip"[^>]*>([^<]+)</div>', shown(page, tmp_path, hover))
    assert tip
    assert "h2o 20%\naccuracy 0.250" in tip[1]
    assert "against full: -62.5 points" in tip[1]
    assert "got worse 6, got better 1" in tip[1]
    hide = "document.querySelector('.legend button').click();"
    assert shown(page, tmp_path, hide).count('class="point"') == 2 + 2
    choose = "const s = document.querySelector('.chart select'); s.value = 4; s.dispatchEvent(new Event('change'));"
    assert 'aria-label="tiny · digits: invented"' in shown(page, tmp_path, choose)


@browser
def test_a_browser_shows_what_a_model_wrote_as_text(tmp_path: Path) -> None:
    rows = samples({("full", "full"): ["0", "1"], ("mikv", "mikv 20% 8/3"): ["0", EVIL]})
    document = shown(report(tmp_path, write_run(tmp_path / "evil", rows)), tmp_path)
    assert "<pre>&lt;/script&gt;&lt;script&gt;" in document
    assert "<img" not in document
    assert "<title>mikv: tiny digits</title>" in document
