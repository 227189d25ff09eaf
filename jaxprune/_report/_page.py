"""What the page is made of: its style, sections, bars and figures; light or dark, wide or narrow as its reader's window."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxprune._html import escaped

# Light and dark by what the reader's system asks for. Wide things scroll within themselves, never the page.
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --line: #ddd; --kept: #0072b2; --gone: #bbb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --soft: #999; --paper: #14171c; --line: #3a3f47; --kept: #2f8fcb; --gone: #555b64; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile strong { display: block; font-size: 1.4rem; line-height: 1.3; }
.tile span, .note { color: var(--soft); font-size: .9rem; }
.box { max-height: 40rem; overflow: auto; border: 1px solid var(--line); }
table { font-size: .9rem; white-space: nowrap; overflow-wrap: normal; } td { border-bottom: 1px solid var(--line); }
.box > div { overflow: visible !important; } /* else what scrolls is not what its heads stick to */
.box th { position: sticky; top: 0; background: var(--paper); }
.bar { display: grid; grid-template-columns: 16rem 1fr 15rem; gap: .75rem; align-items: center; margin: .3rem 0; }
.track { display: flex; height: 1rem; } .track i { display: block; min-width: 1px; }
.kept { background: var(--kept); } .gone { background: var(--gone); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; max-width: 36rem; min-width: 0; } img { width: 100%; height: auto; }
.remark { border-left: 4px solid #d55e00; padding-left: .8rem; }
@media (max-width: 50rem) { .bar { grid-template-columns: 1fr; gap: 0; margin: .8rem 0; } }
"""


class Bar(NamedTuple):
    """A bar: whose, of how much in all, how much of it stays, and what is said beside it."""

    name: str
    size: float
    kept: float
    said: str


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page that loads nothing."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escaped(title)}</h1>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escaped(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; `kind` is a class of the style."""
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def tiles(found: Sequence[tuple[str, str]]) -> str:
    """Return a few figures with what they are, side by side."""
    inside = "".join(
        f'<div class="tile"><strong>{escaped(value)}</strong><span>{escaped(what)}</span></div>'
        for value, what in found
    )
    return f'<div class="tiles">{inside}</div>'


def bars(found: Sequence[Bar]) -> str:
    """Return bars as long as there is of each, the part that stays in colour."""
    most = max((bar.size for bar in found), default=0) or 1
    rows = []
    for bar in found:
        widths = (f"{100 * part / most:.3f}%" for part in (bar.kept, bar.size - bar.kept))
        parts = "".join(
            f'<i class="{kind}" style="width:{width}"></i>'
            for kind, width in zip(("kept", "gone"), widths, strict=True)
        )
        rows.append(
            f'<div class="bar"><span>{escaped(bar.name)}</span><span class="track">{parts}</span>'
            f'<span class="note">{escaped(bar.said)}</span></div>'
        )
    return f"<div>{''.join(rows)}</div>"


def box(inside: str) -> str:
    """Return what is long in a window of its own."""
    return f'<div class="box" tabindex="0">{inside}</div>'


def figures(found: Sequence[str]) -> str:
    """Return figures side by side, below each other where the window is narrow."""
    return f'<div class="figures">{"".join(found)}</div>'


def figure(alt: str, draw: Callable[[Any], Any], *, height: float = 3.4) -> str:
    """Return a figure of one panel, without a background of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.4, height), layout="constrained")
    draw(drawn.subplots())
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxprune"}):  # the same numbers make the same page
        drawn.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    code = base64.b64encode(picture.getvalue()).decode()
    return f'<figure><img alt="{escaped(alt)}" src="data:image/svg+xml;base64,{code}"></figure>'
