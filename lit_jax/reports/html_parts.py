"""The parts of HTML pages: the page itself, tables, pictures, drawings.

A page needs no network: its style, pictures and drawings are part of the file.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from lit_jax.data.image import ImageFile, decode
from lit_jax.display import printable
from lit_jax.reports.matplotlib_figures import (
    FAINT,
    INK,
    PALE_BLUE,
    RIGHT,
    WRONG,
    save,
)
from lit_jax.reports.result_files import Table

# The longer edge of a thumbnail in pixels, twice the displayed size for screens of high resolution.
THUMBNAIL = 192
# The longer edge in pixels up to which an image is enlarged without smoothing.
PIXEL_ART = 64
STYLE = f"""
:root {{ --ink: {INK}; --faint: {FAINT}; --right: {RIGHT}; --wrong: {WRONG}; --line: #e3e6e8;
  --wash: #f6f8f9; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 5rem; background: white; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 0.2rem; }}
h2 {{ font-size: 1.4rem; line-height: 1.25; margin: 3.5rem 0 0.4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin: 2rem 0 0.3rem; }}
p {{ margin: 0.2rem 0 0.8rem; max-width: 44rem; }}
.note {{ color: var(--faint); font-size: 0.92rem; }}
.pan {{ overflow-x: auto; }}
.wide {{ overflow-x: auto; background-repeat: no-repeat;
  background-image: linear-gradient(to left, white 30%, transparent),
    linear-gradient(to left, #0003, transparent);
  background-position: right; background-size: 2rem 100%, 0.7rem 100%;
  background-attachment: local, scroll; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.4rem 0 1rem;
  font-size: 0.95rem; }}
th, td {{ padding: 0.4rem 0.9rem 0.4rem 0; text-align: right; vertical-align: middle;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--faint); font-weight: 500; font-size: 0.85rem; line-height: 1.25; vertical-align: bottom; }}
th:first-child, td:first-child, td.text, th.text {{ text-align: left; }}
td:first-child {{ font-weight: 600; }}
td:first-child, td.text {{ max-width: 22rem; overflow-wrap: break-word; }}
.cards {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 1.4rem 1.2rem;
  margin: 0.8rem 0 1rem; }}
.card img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--wash); border-radius: 6px;
  display: block; }}
.card strong {{ display: block; margin: 0.45rem 0 0.15rem; line-height: 1.3; overflow-wrap: anywhere; }}
.guess {{ display: grid; grid-template-columns: 1fr auto; column-gap: 0.6rem; font-size: 0.86rem;
  color: var(--faint); line-height: 1.35; margin-top: 0.25rem; overflow-wrap: anywhere; }}
.guess i {{ grid-column: 1 / -1; height: 4px; border-radius: 2px; background: #aeb6bd; min-width: 2px; }}
.guess.right {{ color: var(--right); font-weight: 600; }}
.guess.right i {{ background: var(--right); }}
.cells {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: 4px;
  margin: 0.8rem 0 1rem; }}
.cells div {{ padding: 0.35rem 0.5rem; border-radius: 4px; font-size: 0.85rem;
  background: color-mix(in srgb, {PALE_BLUE} calc(var(--part) * 100%), var(--wash)); }}
.cells b {{ display: block; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }}
.row {{ margin: 1.1rem 0 1.5rem; }}
.row > p {{ margin: 0 0 0.4rem; font-weight: 600; max-width: none; overflow-wrap: anywhere; }}
.strip {{ display: grid; grid-template-columns: repeat(8, 1fr); gap: 0.6rem; }}
.strip img, .small {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--wash);
  border-radius: 5px; display: block; }}
.strip figure {{ margin: 0; }}
.strip img.right {{ outline: 3px solid var(--right); outline-offset: 1px; }}
.strip figcaption {{ font-size: 0.78rem; color: var(--faint); line-height: 1.3; padding-top: 0.3rem;
  overflow-wrap: anywhere; }}
.small {{ width: 3.4rem; }}
.pixels {{ image-rendering: pixelated; }}
.answer {{ display: grid; grid-template-columns: minmax(6rem, 9rem) 1fr; gap: 0.4rem 1.2rem;
  margin: 1.2rem 0 1.6rem; }}
.answer > img {{ width: 100%; max-height: 12rem; object-fit: contain; object-position: top left;
  border-radius: 6px; display: block; }}
.answer ol {{ margin: 0; padding: 0 1.4rem; color: var(--faint); overflow-wrap: anywhere; }}
.answer li {{ padding: 0.1rem 0; }}
.answer li.right {{ color: var(--right); font-weight: 600; }}
@media (max-width: 40rem) {{ .cards {{ grid-template-columns: 1fr 1fr; }}
  .strip {{ grid-template-columns: repeat(4, 1fr); }} }}
.figure {{ width: 100%; min-width: 36rem; height: auto; display: block; margin: 0.6rem 0; }}
""".strip()


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return a whole HTML document. Title and subtitle are escaped here; `body` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}: {text(subtitle)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f'<h1>{text(title)}</h1>\n<p class="note">{text(subtitle)}</p>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def text(value: str) -> str:
    """Return a text for HTML: printable and escaped."""
    return html.escape(printable(value))


def table(content: Table) -> str:
    """Return a table in HTML, under its title."""
    rows = "\n".join(
        "<tr>" + "".join(f'<td dir="auto">{text(cell)}</td>' for cell in row) + "</tr>"
        for row in content.rows
    )
    return f"<h3>{text(content.title)}</h3>\n{plain_table(content.columns, rows)}"


def plain_table(columns: Sequence[str], rows: str, texts: int = 1) -> str:
    """Return a table from rows that are HTML already; the first `texts` columns are aligned as text."""
    # Non-breaking spaces keep a unit or an arrow on the line of its word.
    whole = [text(column).replace(" %", "&nbsp;%").replace(" →", "&nbsp;→") for column in columns]
    head = "".join(
        f'<th class="text">{column}</th>' if i < texts else f"<th>{column}</th>"
        for i, column in enumerate(whole)
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'


def picture(image: ImageFile, alt: str, kind: str = "") -> str:
    """Return an HTML thumbnail of an image. Raise BadSampleError if the image cannot be decoded."""
    thumbnail = decode(image)
    # The size before it is reduced: a photograph's thumbnail is not pixel art.
    tiny = max(thumbnail.size) <= PIXEL_ART
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    # JPEG would blur the hard edges of a tiny image, which the browser enlarges pixel by pixel.
    content = io.BytesIO()
    thumbnail.save(content, **({"format": "PNG"} if tiny else {"format": "JPEG", "quality": 82}))
    mime = "image/png" if tiny else "image/jpeg"
    kind = " ".join(filter(None, (kind, "pixels" if tiny else "")))
    return _image(mime, content.getvalue(), alt, kind)


def drawing(figure: Figure, alt: str) -> str:
    """Return a figure as SVG in HTML, with a width proportional to its size in inches."""
    # Texts stay texts, because the browser has fonts for all scripts. A fixed salt and no date make the file
    # reproducible.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "lit_jax", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        content = save(figure, format="svg", metadata={"Date": None}, bbox_inches="tight")
    image = _image("image/svg+xml", content, alt, "figure")
    return f'<div class="pan" style="max-width:{figure.get_figwidth() * 110:.0f}px">{image}</div>'


def _image(mime: str, content: bytes, alt: str, kind: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{kind}" alt="{text(alt)}" src="data:{mime};base64,{data}">'
