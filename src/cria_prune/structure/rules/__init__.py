"""One small rule per operation: how units pass through it."""
