"""The recipes: digits, CIFAR-10, SST-2, Shakespeare; their data, dense models and defaults."""
