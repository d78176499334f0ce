"""The door: one file a command, thin over the library."""
