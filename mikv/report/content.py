"""What the page shows, as plain data: it becomes JSON, and the page's script draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mikv.metrics.pareto import pareto_front
from mikv.plots.style import look
from mikv.results import Results, flips, measures

MOST_FLIPS = 400
"""Flipped samples per run that are shown, and characters of an answer: a page must stay light enough to open."""
MOST_CHARACTERS = 4000

UNITS = {"kl": " (nats per token)", "nll_change": " (nats per token)", "agreement": " (of top-1 tokens)"}


def content(runs: Sequence[Results]) -> dict[str, Any]:
    """runs: with views (curves), rows (the table) and flips; style: colour and marker by policy."""
    policies = dict.fromkeys(row["policy"] for run in runs for row in run.summary)
    shown = [_run(run) for run in runs]
    titles = [run["title"] for run in shown]
    for run in shown:
        if titles.count(run["title"]) > 1:
            run["title"] += f" ({run['name']})"
    return {
        "runs": shown,
        "style": {name: dict(zip(("colour", "marker"), look(name), strict=True)) for name in policies},
    }


def _run(run: Results) -> dict[str, Any]:
    first = run.summary[0]
    points = [_point(row) for row in run.summary]
    changed = [_flip(full, mine, first.get("lower_is_better", False)) for full, mine in flips(run)]
    return {
        "name": run.name,
        "title": f"{first['model']} · {first['task']}",
        "facts": _facts(run),
        "config": run.config,
        "points": points,
        "views": [_view(name, points) for name in points[0]["measures"]],
        "flips": changed[:MOST_FLIPS],
        "flips_left_out": len(changed) - len(changed[:MOST_FLIPS]),
        "has_samples": bool(run.samples),
    }


def _facts(run: Results) -> list[tuple[str, str]]:
    first, environments = run.summary[0], list(run.environments.values())
    commits = dict.fromkeys(map(_commit, environments)) or ["not known"]
    model = run.about.get("identity", {}).get("model", {})
    versions = dict.fromkeys(f"{name} {of}" for one in environments for name, of in one.get("packages", {}).items())
    facts = {
        "samples": str(first["samples"]),
        "question": f"{first['question']} when the cache is compressed",
        "weights": " ".join(filter(None, (model.get("weights"), model.get("dtype")))),
        "commit": "; ".join(commits),
        "packages": ", ".join(versions),
    }
    return [(name, text) for name, text in facts.items() if text]


def _commit(environment: dict[str, Any]) -> str:
    commit = str(environment.get("git_commit") or "not known")[:12]
    return commit + (" and changes that are in no commit" if environment.get("git_dirty") else "")


def _point(row: dict[str, Any]) -> dict[str, Any]:
    full = row["policy"] == "full"
    found = measures(row)
    if full:  # its difference to itself is no result
        found = {name: {k: of[k] for k in ("value", "n", "ci95", "lower_is_better")} for name, of in found.items()}
    return {
        "policy": row["policy"],
        "label": row["label"],
        "size": row["size_percent"],
        "bytes": sum(row["nbytes"].values()) if "nbytes" in row else None,
        "parts": row.get("nbytes", {}),
        "measures": found,
    }


def _view(name: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One measure: which points are drawn (of a divergence not those that are 0: its scale is logarithmic), and the front."""
    logarithmic = name == "kl"
    drawn = [i for i, p in enumerate(points) if name in p["measures"] and (not logarithmic or p["measures"][name]["value"] > 0)]
    values = [points[i]["measures"][name]["value"] for i in drawn]
    lower = points[0]["measures"][name]["lower_is_better"]
    front = pareto_front([points[i]["size"] for i in drawn], values, lower)
    return {
        "name": name.replace("_", " ") + UNITS.get(name, ""),
        "key": name,
        "lower": lower,
        "log": logarithmic,
        "share": name not in ("kl", "nll_change") and all(0 <= value <= 1 for value in values),
        "points": drawn,
        "front": [drawn[i] for i in front],
    }


def _flip(full: dict[str, Any], mine: dict[str, Any], lower_is_better: bool) -> dict[str, Any]:
    return {
        "label": mine["label"],
        "sample": mine["sample"],
        "better": (float(mine["score"]) > float(full["score"])) != lower_is_better,
        "target": _short(mine.get("target", "")),
        "answers": [{"text": _short(row.get("answer", "")), "outcomes": _outcomes(row)} for row in (full, mine)],
    }


def _outcomes(row: dict[str, Any]) -> list[str]:
    """Flags that are set; `ended` says how the answer ended, not what it is."""
    return [name for name, value in row.items() if value is True and name != "ended"]


def _short(text: Any) -> str:
    text = text if isinstance(text, str) else str(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text)} characters)"
