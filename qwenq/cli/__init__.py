"""The door: one file per command, thin over the library."""
