"""What the HTML reports have in common: one file that opens in any browser, light or dark, without scripts."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#465064;--faint:#667085;--line:#e3e6ec;--paper:#fff;--bad:#b0302a;
--band:#f5f7fa}
@media(prefers-color-scheme:dark){:root{--ink:#e5e8ee;--soft:#a3acbb;--faint:#98a2b3;--line:#2b303a;--paper:#14171d;
--bad:#ff8b80;--band:#1b1f27}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1240px;padding:0 1rem;color:var(--ink);
background:var(--paper)}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;margin:1rem 0}
.numbers b{display:block;font-size:1.9rem;line-height:1.2}
table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.45rem .7rem .45rem 0;
border-bottom:1px solid var(--line)}th{font-size:.8rem;color:var(--faint)}
.small{font-size:.82rem;color:var(--soft)}.bad{color:var(--bad);font-weight:600}
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        style: CSS that this page has beside what all have.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{''.join(body)}</body></html>\n"
    )


def numbers(found: Mapping[str, object]) -> str:
    """Figures in large type, each over its name."""
    return '<div class="numbers">' + "".join(f"<div><b>{n}</b>{name}</div>" for name, n in found.items()) + "</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts.

    Args:
        kind: its class.
    """
    parts = [f'<table class="{kind}"><tr>', *(f"<th>{escape(name)}" for name in head)]
    parts += ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return "".join([*parts, "</table>"])


def data_url(content: bytes, kind: str) -> str:
    """A file as an address that holds it.

    Args:
        kind: its MIME type, e.g. `image/png`.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
