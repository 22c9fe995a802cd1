"""What a run leaves behind: a checkpoint, its provenance, a report and its pictures."""

from cria_prune.artifact.card import Card
from cria_prune.artifact.cells import Bench, read_bench
from cria_prune.artifact.certificate import Certificate
from cria_prune.artifact.checkpoint import LoadedCheckpoint, load, save
from cria_prune.artifact.files import atomic, new_folder, sha256, write_text
from cria_prune.artifact.folder_report import FolderPage, folder_page
from cria_prune.artifact.padded import save_padded
from cria_prune.artifact.plots import plot_rounds, plot_scores, plot_widths
from cria_prune.artifact.plots_layer import plot_neuron_graph, plot_spectrum
from cria_prune.artifact.plots_metric import plot_ablation, plot_bench, plot_tradeoff
from cria_prune.artifact.pretrained import save_pretrained
from cria_prune.artifact.provenance import provenance
from cria_prune.artifact.report import render, write_report
from cria_prune.artifact.scores import load_scores, save_scores

__all__ = [
    "Bench",
    "Card",
    "Certificate",
    "FolderPage",
    "LoadedCheckpoint",
    "atomic",
    "folder_page",
    "load",
    "load_scores",
    "new_folder",
    "plot_ablation",
    "plot_bench",
    "plot_neuron_graph",
    "plot_rounds",
    "plot_scores",
    "plot_spectrum",
    "plot_tradeoff",
    "plot_widths",
    "provenance",
    "read_bench",
    "render",
    "save",
    "save_padded",
    "save_pretrained",
    "save_scores",
    "sha256",
    "write_report",
    "write_text",
]
