"""A directory of shards: opened and audited, laid out, its manifest and whether it still holds."""
