"""Stage one: one teacher pass feeds every student."""
