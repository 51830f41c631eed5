"""How the web page looks: its colours and fonts."""

from __future__ import annotations

import gradio as gr

CSS = """
.wrong span, .wrong .info { color: var(--error-text-color, #b91c1c) !important; font-weight: 600; }
#status code { white-space: normal; overflow-wrap: anywhere; }
.curve svg { max-width: 100%; height: auto; }
.sample pre { margin-top: 1em; font-family: ui-monospace, monospace; font-size: 0.9em; white-space: pre-wrap; }
.sample mark { color: #1f2937; background: #fde68a; }
.sample p { color: var(--block-info-text-color); }
button.selected { color: var(--body-text-color) !important; font-weight: 600; }
"""


def theme() -> gr.themes.Base:
    """Gradio's, with the fonts of the reader's machine (none is fetched), and its pale words dark enough to be read:
    a contrast of 4.5 at least (WCAG 2, criterion 1.4.3)."""
    base = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    colours = {}
    pale = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    for name in pale:
        colours[name] = "*neutral_600"
        colours[f"{name}_dark"] = "*neutral_300"
    for name in ("background_fill", "background_fill_hover", "border_color"):
        colours[f"button_primary_{name}"] = "*primary_700"
        colours[f"button_primary_{name}_dark"] = "*primary_700"
    return base.set(**colours)
