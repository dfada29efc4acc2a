"""One small module per family of tables; each function takes a `Context` and gives a `Table`."""
