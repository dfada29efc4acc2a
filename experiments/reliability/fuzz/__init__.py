"""Fuzzing of everything that reads files: a damaged file must be read correctly or refused with a `UserError`."""
