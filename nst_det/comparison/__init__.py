"""The comparison: every method and seed through both stages, done once, resumed anywhere, judged in pairs."""
