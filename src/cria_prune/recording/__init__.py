"""What the neurons do: the signals of every unit group over calibration batches."""
