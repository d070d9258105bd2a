"""The Grafana dashboard asks for metrics that the code registers, all of them, each as its kind can be asked."""

import json
import re
from itertools import combinations
from typing import Any

import pytest

from services.metrics import METRICS
from tests.deploy.files import DEPLOY

EXPORTED = {metric.exported: metric for metric in METRICS}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "mtpd.json").read_text())


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Of its panels and of its variables."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return panels + [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def test_it_shows_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    named = {re.sub(r"_bucket$", "", name) for query in queries(dashboard) for name in re.findall(r"ray_\w+", query)}
    assert named == EXPORTED.keys()


def test_counters_are_asked_for_their_rate_and_gauges_are_not(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        for function, name, labels in re.findall(r"(\w*)\(?(ray_\w+)(?:\{([^}]*)\})?", query):
            metric = EXPORTED[re.sub(r"_bucket$", "", name)]
            rated = function in ("rate", "increase")
            assert rated == (metric.kind != "gauge"), query
            assert name.endswith("_bucket") == (metric.kind == "histogram"), query
            assert set(re.findall(r"(\w+)=", labels)) <= set(metric.tags), query
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            tags = {"le"}.union(*(EXPORTED[re.sub(r"_bucket$", "", n)].tags for n in re.findall(r"ray_\w+", query)))
            assert {label.strip() for label in grouped.split(",")} <= tags, query
        assert query.count("(") == query.count(")")


def test_panels_have_places_of_their_own_and_the_data_source_that_is_chosen(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    for a, b in combinations((panel["gridPos"] for panel in dashboard["panels"]), 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
