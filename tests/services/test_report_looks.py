"""How the report of real runs looks: lines that are told apart, values that are kept apart, and how it fits a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from services.charts import Band, Line, line_chart
from services.report import write_report
from tests.services.pages import charts, copy_run, legends


def test_lines_of_one_chart_are_named_and_told_apart(made, tmp_path: Path) -> None:
    _, folder = made
    masked = copy_run(folder, tmp_path / "work" / "masked", segm_mAP=0.25)
    text = write_report(masked, images=0).read_text()
    (legend,) = legends(text)
    assert list(legend) == ["box AP", "mask AP"]
    drawn = charts(text)["AP over the epochs of all stages: box AP, mask AP"]
    assert drawn == list(legend.values())
    assert len(set(drawn)) == 2
    # of several runs each kind has its chart, and of the run with masks alone a small one of mask AP
    copy_run(folder, tmp_path / "work" / "boxes")
    text = write_report(tmp_path / "work", images=0).read_text()
    assert {"mask AP of masked", "box AP of masked", "box AP of boxes"} <= charts(text).keys()
    assert "mask AP of boxes" not in charts(text)
    assert [list(legend) for legend in legends(text)] == [["boxes", "masked"], ["masked"], ["boxes", "masked"]]


def test_more_arms_than_colours_differ_in_their_dashes_and_seeds_share_a_line(made, tmp_path: Path) -> None:
    _, folder = made
    for arm in "abcdefghij":
        copy_run(folder, tmp_path / f"{arm}-0")
    copy_run(folder, tmp_path / "a-1")
    text = write_report(tmp_path, images=0).read_text()
    above, _ = legends(text)
    assert list(above) == ["a, 2 seeds", *(f"{arm}-0" for arm in "bcdefghij")]
    assert len(set(above.values())) == 10
    (drawn,) = (looks for name, looks in charts(text).items() if name.startswith("box AP of 11 runs"))
    assert set(drawn) == set(above.values())
    assert ".d1 { stroke-dasharray" in text


def test_charts_keep_their_points_inside_and_their_values_apart() -> None:
    lines = [
        Line(name, [[(1, 10.0), (5, end)]], n, [5]) for n, (name, end) in enumerate({"a": 30.0, "b": 30.1}.items())
    ]
    chart = line_chart(lines, title="t", size=(340, 200), labels=("x", "y"), bands=[Band(0, 5, "s<1>")])
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert len(dots) == 4
    assert all(0 <= x <= 340 and 0 <= y <= 200 for x, y in dots)
    values = [float(y) for y in re.findall(r'class="value[^>]* y="([\d.]+)"', chart)]
    assert abs(values[0] - values[1]) >= 12
    assert "s&lt;1&gt;" in chart
    assert line_chart([Line("one", [[(1, 0.0)]])], title="t", size=(340, 200), labels=("x", "y")).count("<circle") == 1
    assert line_chart([], title="t", size=(340, 200), labels=("x", "y")) == ""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_is_no_wider_than_a_phone(made, tmp_path: Path) -> None:
    _, folder = made
    long = tmp_path / "work" / ("retinanet_distilled_from_many_" * 6)
    shutil.copytree(folder, tmp_path / "work" / "short")
    shutil.copytree(folder, long)
    for file in (*long.glob("recipe.json"), *long.glob("stage-*/stage.json")):
        file.write_text(file.read_text().replace('"swin"', json.dumps("swin" * 45)))
    costs = {long.name: {"swin" * 45: 0.5}, "swin" * 45: {long.name: 0.25}}
    order = {"costs": costs, "aps": {"swin" * 45: 30.0}, "sequence": ["swin" * 45], "reasons": {}}
    (long / "order.json").write_text(json.dumps(order))
    study = tmp_path / "study.json"
    study.write_text(json.dumps({long.name: {"arms": {f"{long.name}-0": {"mAP": 10.0}}}}))
    text = write_report(tmp_path / "work", study=study, out=tmp_path / "page.html", images=1).read_text()
    assert "data:image/jpeg" in text
    # a window is never narrower than 500 px, a frame is
    measure = (
        "<script>parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')</script></body>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", measure))
    (tmp_path / "phone.html").write_text(
        "<script>onmessage = event => document.title = event.data</script>"
        '<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>'
    )
    command = [
        "chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/phone.html",
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"<title>390 of 390</title>", dumped), dumped[:600]
