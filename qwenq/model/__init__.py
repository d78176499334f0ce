"""A decoder-only model: its shapes, one decoder layer at a time, attention, and what devices compute well."""
