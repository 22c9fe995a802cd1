"""What a run leaves behind: checkpoints, folders for transformers, certificates, scores that are kept."""
