"""One fine-tune of the smaller model, optionally with soft targets from the dense one."""
