"""Windows of tokens: from texts, from files, and from the model itself."""
