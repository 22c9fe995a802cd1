"""What every other folder stands on; it knows none of them."""
