"""Wrong files for everything that reads files: each must be read, or refused by a `UserError`."""
