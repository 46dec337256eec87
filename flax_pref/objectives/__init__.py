"""Training objectives: pure functions `(predict, batch, key) -> (loss, metrics)`, one file per method."""
