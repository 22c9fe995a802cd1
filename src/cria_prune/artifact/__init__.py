"""What a run leaves behind: a checkpoint, its provenance, a report and its pictures."""
