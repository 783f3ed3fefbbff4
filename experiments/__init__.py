"""One module per table or figure: what to run, and how to read it from the records."""
