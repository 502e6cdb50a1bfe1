"""Builds the HTML pages of the commands: one self-contained file with tables and bar charts."""

import html
import itertools
from collections.abc import Iterable, Mapping

STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1120px; margin: 36px auto; padding: 0 20px; }
 h1 { font-size: 1.45rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2.2em 0 .5em; }
 .lead, figcaption, th { color: #5a6779; } .lead { margin-top: .3em; }
 table { border-collapse: collapse; } td, th { padding: 4px 20px 4px 0; text-align: left; vertical-align: top; }
 th { font-weight: 500; } tr { border-bottom: 1px solid #e6eaf0; } td.number, th.number { text-align: right; }
 .charts { display: flex; gap: 44px; flex-wrap: wrap; } figure { margin: 0; } figcaption { font-size: .85rem; }
 svg text { font: 11px system-ui, sans-serif; fill: #5a6779; }
 .sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
 .sheet figure { overflow-wrap: anywhere; } .sheet img { width: 100%; height: 120px; object-fit: contain;
 background: #f3f5f8; border-radius: 4px; } .good { color: #1a7f4b; } .bad { color: #b3372b; }
"""
BAR_WIDTH, CHART_HEIGHT = 330, 120


def page(title: str, lead: str, body: Iterable[str]) -> str:
    """Returns a whole HTML page; title and lead are text, body is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        + "\n".join(body)
        + "\n</html>\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns an HTML table; columns of numbers are right-aligned, and text is escaped."""
    body = [list(row) for row in rows]
    if not body:
        return "<p>none</p>"
    is_number = [all(isinstance(row[i], int | float) for row in body) for i in range(len(body[0]))]

    def line(cells: Iterable[object], tag: str) -> str:
        classes = [' class="number"' if i < len(is_number) and is_number[i] else "" for i in range(99)]
        return "".join(f"<{tag}{classes[i]}>{cell_text(cell)}</{tag}>" for i, cell in enumerate(cells))

    lines = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in body)
    return f"<table><tr>{line(header, 'th')}</tr>\n{lines}</table>"


def cell_text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.3f}"
    return f"{cell:,}" if isinstance(cell, int) else html.escape(str(cell))


def bars(caption: str, counts: Mapping[float, int], marked: float | None = None) -> str:
    """Draws a histogram as SVG. `counts` has the lower edges of evenly spaced bins, or whole numbers, as keys; `marked`
    draws a line at a value."""
    if not counts:
        return f"<figure><figcaption>{html.escape(caption)}: nothing to show</figcaption></figure>"
    edges = sorted(counts)
    step = min((b - a for a, b in itertools.pairwise(edges)), default=1) or 1
    low, high = edges[0], edges[-1] + step
    scale, top = BAR_WIDTH / (high - low), max(counts.values())
    shapes = []
    for edge in edges:
        height, width = CHART_HEIGHT * counts[edge] / top, max(step * scale - 1, 1)
        shapes.append(
            f'<rect x="{(edge - low) * scale:.1f}" y="{CHART_HEIGHT - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill="#2f6fb5"><title>{edge:g}: {counts[edge]:,}</title></rect>'
        )
    if marked is not None and low <= marked <= high:
        x = (marked - low) * scale
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{CHART_HEIGHT}" stroke="#b3372b" stroke-width="2"/>')
    is_whole = step == 1 and all(edge == int(edge) for edge in edges)
    last, indent = (edges[-1], scale / 2) if is_whole else (high, 0.0)
    return (
        f'<figure><svg width="{BAR_WIDTH + 10}" height="{CHART_HEIGHT + 20}" role="img">'
        f'<line x1="0" x2="{BAR_WIDTH}" y1="{CHART_HEIGHT}" y2="{CHART_HEIGHT}" stroke="#c5cdd8"/>{"".join(shapes)}'
        f'<text x="{indent:.1f}" y="{CHART_HEIGHT + 15}" {anchor(is_whole, "start")}>{low:g}</text>'
        f'<text x="{BAR_WIDTH - indent:.1f}" y="{CHART_HEIGHT + 15}" {anchor(is_whole, "end")}>{last:g}</text>'
        f"</svg><figcaption>{html.escape(caption)} (highest bar: {top:,})</figcaption></figure>"
    )


def anchor(is_whole: bool, side: str) -> str:
    return f'text-anchor="{"middle" if is_whole else side}"'
