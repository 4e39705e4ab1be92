"""Assemble a self-contained HTML page that loads no other file and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.hf.disk import write_text
from megatron_moe.report.balance import balance
from megatron_moe.report.evaluation import evaluation
from megatron_moe.report.html import Child, Html, el, join
from megatron_moe.report.mixture import mixture
from megatron_moe.report.origin import configuration, layout, receipt
from megatron_moe.report.overview import overview
from megatron_moe.report.parts import Section
from megatron_moe.report.read import RunFiles
from megatron_moe.report.specialization import specialization
from megatron_moe.report.training import losses, speed

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: no scripts and no requests, whatever a run's files contain."""


def run_page(run: RunFiles) -> Html:
    """Return the report of one run."""
    sections = [
        losses(run), evaluation(run), speed(run), balance(run), mixture(run), specialization(run),
        receipt(run), layout(run), configuration(run),
    ]  # fmt: skip
    return page(f"{run.name} - megatron_moe", overview(run), sections)


def page(title: str, head: Child, sections: Sequence[Section]) -> Html:
    """Return a page with a table of contents."""
    contents = el(
        "nav",
        el("ol", [el("li", el("a", s.title, href=f"#{s.id}")) for s in sections]),
        aria_label="Contents",
    )
    body = el(
        "body",
        el("a", "Skip to the report", href="#report", class_="skip"),
        el("header", head),
        contents,
        el("main", [section.html() for section in sections], id="report", tabindex=-1),
    )
    meta = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(STYLE.read_text(encoding="utf-8"))),
    ]
    return join([Html("<!DOCTYPE html>\n"), el("html", el("head", meta), body, lang="en")])


def write_page(html: Html, path: Path) -> None:
    """Write a page atomically."""
    write_text(path, html)
