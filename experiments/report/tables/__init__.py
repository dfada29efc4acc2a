"""One module per group of tables; their functions make a `Table` from a `Context`."""
