"""Pages of reports, and the runs that they are of."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page as a browser's parser meets it: it must be balanced, and fetch nothing."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[list[str]] = []
        self.words = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "p":
            self.words += " "

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.words += data
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data.strip()


def copy_run(folder: Path, to: Path, **metrics: float) -> Path:
    """A copy of a run without its weights, with these metrics of its first stage beside or in place of its own."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.pth"))
    file = to / "stage-1" / "result.json"
    content = json.loads(file.read_text())
    content["metrics"] |= metrics
    file.write_text(json.dumps(content))
    return to


def charts(text: str) -> dict[str, list[str]]:
    """By what a chart is called the looks of its lines, class by class."""
    found = re.findall(r'<svg class="chart"[^>]*aria-label="([^"]*)">(.*?)</svg>', text)
    return {name: re.findall(r'<path class="line ([^"]*)"', inside) for name, inside in found}


def legends(text: str) -> list[dict[str, str]]:
    """By name the look of each entry of each legend."""
    entries = r'<path class="line ([^"]*)" d="[^"]*"/></svg>([^<]*)</li>'
    return [
        {name: look for look, name in re.findall(entries, one)}
        for one in re.findall(r'<ul class="legend">(.*?)</ul>', text)
    ]
