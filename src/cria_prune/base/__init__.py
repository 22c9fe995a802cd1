"""What every room stands on: errors, batches, devices, ranks, progress, files."""
