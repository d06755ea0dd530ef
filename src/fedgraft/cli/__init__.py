"""The command line: a thin verb each - parse, one call, print where the result is."""
