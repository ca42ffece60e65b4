"""Text of users in figures and drawings: never markup, in whatever script the installed fonts have, in escapes otherwise."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text

from ..files import printable, short


@cache
def _base() -> str:
    return findfont("DejaVu Sans")  # which comes with matplotlib


@cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters of an upright font of ordinary weight; none of others, nor of one with bitmaps alone."""
    try:
        font = get_font(path)
        usable = font.scalable and not font.style_flags
        return frozenset(map(chr, font.get_charmap())) if usable else frozenset()
    except (OSError, RuntimeError):  # no font that FreeType reads
        return frozenset()


@cache
def _fonts_for(missing: frozenset[str]) -> tuple[str, ...]:
    """Return few installed fonts that together have these characters as far as any has them, those without serifs first."""
    chosen = []
    paths = sorted(findSystemFonts(), key=lambda path: ("sans" not in path.lower(), "mono" in path.lower(), path))
    while missing and (best := max(paths, key=lambda path: len(missing & _characters(path)), default="")):
        found = missing & _characters(best)
        if not found:
            break
        chosen.append(best)
        missing -= found
    return tuple(chosen)


def _font_that_has(character: str) -> str:
    """Return one by the names of the Noto fonts, which are by script."""
    kind, script = unicodedata.category(character), unicodedata.name(character, "").split(" ")[0]
    if script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "IDEOGRAPHIC"):
        return "Noto Sans CJK"
    if kind == "So":
        return "Noto Emoji"
    return f"Noto Sans {script.title() if kind[0] == 'L' else 'Symbols'}"


@cache
def _note(font: str) -> None:
    """Say once what is missing."""
    logging.getLogger(__name__).warning(
        f"drawn names have escapes such as \\u540d for characters that no installed font has: install {font}"
    )


def choose(texts: Iterable[str]) -> list[str]:
    """Return the files of fonts for texts: DejaVu Sans, and others that are installed if it lacks characters."""
    return [_base(), *_fonts_for(frozenset("".join(texts)) - _characters(_base()))]


def best_font(texts: Sequence[str]) -> str:
    """Return the file of the font that has most of the characters of texts, for what takes one font."""
    return max(choose(texts), key=lambda path: len(set("".join(texts)) & _characters(path)))


def drawable(text: str, fonts: Iterable[str]) -> str:
    """Return a text in which characters that no font has are escapes; a note says which font to install."""
    text = "\n".join(map(printable, text.split("\n")))
    for character in sorted(missing := set(text) - {"\n"}.union(*map(_characters, fonts))):
        _note(_font_that_has(character))
        text = text.replace(character, character.encode("unicode_escape").decode())
    return "\n".join(short(line, 60) for line in text.split("\n")) if missing else text  # escapes are long


def set_plain(figure: Figure) -> None:
    """Make every text of a figure plain: `$` is no formula in it, and each character is taken from a font that has it."""
    texts = figure.findobj(Text)
    fonts = choose(text.get_text() for text in texts)
    for path in fonts[1:]:
        fontManager.addfont(path)
    families = [get_font(path).family_name for path in fonts]
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        labels = [label.get_text() for label in axis.get_majorticklabels()]
        if (made := [drawable(label, fonts) for label in labels]) != labels:
            axis.set_ticklabels(made)  # setting a label's text alone does not last until it is drawn
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(families)
        text.set_text(drawable(text.get_text(), fonts))
