"""A project on one's own images: what the data is like, and configs with values that fit it."""
