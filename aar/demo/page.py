"""The demo's web page: one file beside the sounds and pictures it names, without scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8d8de, #3a3a42); --soft: light-dark(#5c5c66, #a5a5b0);
        --card: light-dark(#fff, #1d1d22); --accent: light-dark(#a52c60, #f78f3f); }
* { box-sizing: border-box; }
body { max-width: 1500px; margin: 0 auto; padding: 2rem 1.5rem 4rem; font: 15px/1.5 system-ui, sans-serif;
       background: light-dark(#f6f6f8, #131316); }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .4rem; font-size: 1.35rem; }
h3 { margin: 1.4rem 0 0; font-size: 1.1rem; } h4 { margin: .9rem 0 .4rem; font-size: 1rem; }
h3::first-letter, h4::first-letter { text-transform: uppercase; }
p { max-width: 75ch; margin: .5rem 0; } small, .soft { color: var(--soft); font-weight: normal; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; margin-top: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; color: var(--soft); }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: .7rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 8px;
         background: var(--card); }
figure.source { border-color: var(--accent); }
figcaption { display: flex; justify-content: space-between; margin-bottom: .3rem; font-size: .9rem; }
img { display: block; width: 100%; height: 110px; border-radius: 4px; }
audio { width: 100%; height: 34px; margin-top: .4rem; }
"""


@dataclass(frozen=True)
class Version:
    """A clip as recorded or as reconstructed: a title, a remark, and paths relative to the page."""

    title: str
    remark: str
    sound: str
    picture: str


@dataclass(frozen=True)
class Clip:
    """A clip with all its versions, the one called "source" first if there is one; without a name it has no heading."""

    name: str
    kind: str
    versions: Sequence[Version]


@dataclass(frozen=True)
class Table:
    """A caption, column headings and rows of text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f"<table><caption>{escape(self.caption)}</caption>\n"
            f"<thead>{row(self.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>"
        )

    def text(self) -> str:
        """The same for a terminal."""
        first, *others = zip(self.head, *self.rows, strict=True)
        columns = [_align(first, str.ljust), *(_align(column, str.rjust) for column in others)]
        return "\n".join([self.caption, *("  ".join(("", *line)) for line in zip(*columns, strict=True))])


def _align(column: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(cell, width) for cell in column]


@dataclass(frozen=True)
class Section:
    """Clips under a title and a paragraph, those of a kind together."""

    title: str
    paragraph: str
    clips: Sequence[Clip]

    def html(self) -> str:
        parts = [f"<section>\n<h2>{escape(self.title)}</h2>\n<p>{escape(self.paragraph)}</p>"]
        for kind in dict.fromkeys(clip.kind for clip in self.clips):
            parts += [f"<h3>{escape(kind)}</h3>"] if kind else []
            parts += [_clip(clip) for clip in self.clips if clip.kind == kind]
        return "\n".join([*parts, "</section>"])


def _figure(version: Version) -> str:
    return (
        f"<figure{' class=source' if version.title == 'source' else ''}>"
        f"<figcaption><b>{escape(version.title)}</b> "
        f"<span class=soft>{escape(version.remark)}</span></figcaption>"
        f'<img src="{escape(version.picture)}" alt="spectrogram, {escape(version.title)}">'
        f'<audio controls preload="metadata" src="{escape(version.sound)}"></audio></figure>'
    )


def _clip(clip: Clip) -> str:
    heading = f"<h4>{escape(clip.name)}</h4>\n" if clip.name else ""
    figures = "\n".join(map(_figure, clip.versions))
    return f"{heading}<div class=row>\n{figures}\n</div>"


def render(title: str, paragraphs: Iterable[str], tables: Iterable[Table], sections: Iterable[Section]) -> str:
    """The whole page: text, tables, sections."""
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
    parts += ['<div class="tables">', *(table.html() for table in tables), "</div>"]
    parts += [section.html() for section in sections]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
