"""One module a word of the command line; importing them must stay cheap, so heavy imports stand in ``run``."""
