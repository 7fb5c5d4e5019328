"""A local knowledge base: files are read, split, indexed and searched; a model answers from what was found."""
