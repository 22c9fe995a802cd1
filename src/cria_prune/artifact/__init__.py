"""What a run leaves behind: a checkpoint, its provenance, a report and its pictures."""

from cria_prune.artifact.card import Card
from cria_prune.artifact.certificate import Certificate
from cria_prune.artifact.checkpoint import LoadedCheckpoint, load, save
from cria_prune.artifact.files import atomic, new_folder, sha256, write_text
from cria_prune.artifact.padded import save_padded
from cria_prune.artifact.plots import plot_rounds, plot_scores, plot_widths
from cria_prune.artifact.plots_ablation import plot_ablation
from cria_prune.artifact.pretrained import save_pretrained
from cria_prune.artifact.provenance import provenance
from cria_prune.artifact.report import render, write_report

__all__ = [
    "Card",
    "Certificate",
    "LoadedCheckpoint",
    "atomic",
    "load",
    "new_folder",
    "plot_ablation",
    "plot_rounds",
    "plot_scores",
    "plot_widths",
    "provenance",
    "render",
    "save",
    "save_padded",
    "save_pretrained",
    "sha256",
    "write_report",
    "write_text",
]
