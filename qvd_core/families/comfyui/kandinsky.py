"""Kandinsky 5 in ComfyUI, with the module names of diffusers."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families import kandinsky

KANDINSKY5 = replace(kandinsky.KANDINSKY5, classes=("Kandinsky5",), sample_argument="x", frames_dim=2)

FAMILIES = (KANDINSKY5,)
